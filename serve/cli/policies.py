"""``lethe policy``: which sets apply, through which guards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guards.policy import Policy, parse_policy
from serve.cli.talk import JsonOption, act, connect, fail, folding_table, out, print_json, unwrap

app = typer.Typer(no_args_is_help=True, help="Show and change policies: which sets apply, through which guards.")


@app.command("list")
def policy_list(as_json: JsonOption = False) -> None:
    """List all policies."""
    with connect() as client:
        listed = unwrap(client.get("/policies"))
    if as_json:
        print_json(listed)
        return
    table = folding_table("name", "forget sets", "guards", "description", title=f"revision {listed['revision']}")
    for each in listed["data"]:
        sets = each["forget_sets"] if isinstance(each["forget_sets"], str) else ", ".join(each["forget_sets"])
        guards = ", ".join(name for name, config in each["guards"].items() if config and config.get("enabled", True))
        table.add_row(each["name"], sets, guards or "none", each["description"])
    out.print(table)


@app.command("show")
def policy_show(
    name: Annotated[str, typer.Argument(help="The policy's name.")],
    defaults: Annotated[bool, typer.Option("--all", help="Also what is as it is by default.")] = False,
) -> None:
    """Print a policy as JSON, as `lethe policy put` takes it."""
    with connect() as client:
        shown = unwrap(client.get(f"/policies/{name}"))
    policy = parse_policy({key: value for key, value in shown.items() if key in Policy.model_fields})
    print_json(policy.model_dump(mode="json", exclude={"name"}, exclude_defaults=not defaults))


@app.command("put")
def policy_put(
    name: Annotated[str, typer.Argument(help="The policy's name.")],
    file: Annotated[Path, typer.Argument(help="JSON: {'forget_sets': 'enabled' or [...], 'guards': {...}, 'refusal': ...}")],
) -> None:
    """Create or replace a policy."""
    try:
        fields = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        fail(f"cannot read {file} as JSON: {error}")
    with connect() as client:
        put = unwrap(client.put(f"/policies/{name}", json=fields))
    out.print(f"{name} holds from revision {put['revision']} on")
    for note in put["notes"]:
        out.print(f"Note: {note}.")


@app.command("remove")
def policy_remove(name: Annotated[str, typer.Argument(help="The policy's name.")]) -> None:
    """Delete a policy; `default` returns to its built-in form."""
    act("DELETE", f"/policies/{name}", f"{name} is removed")
