"""``lethe policy``: which sets apply, through which guards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guards.errors import InvalidPolicy
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
    fields = {key: value for key, value in shown.items() if key in Policy.model_fields}
    try:
        print_json(parse_policy(fields).model_dump(mode="json", exclude={"name"}, exclude_defaults=not defaults))
    except InvalidPolicy:  # it names a guard that the server has and this machine has not
        print_json({key: value for key, value in fields.items() if key != "name"})


@app.command("guards")
def policy_guards(
    name: Annotated[str | None, typer.Argument(help="A guard, to see its settings.")] = None, as_json: JsonOption = False
) -> None:
    """List the guards that a policy may name, or the settings of one."""
    with connect() as client:
        listed = unwrap(client.get("/guards"))
    found = [each for each in listed["data"] if name in (None, each["name"])]
    if not found:
        fail(f"there is no guard {name!r}; there are {', '.join(each['name'] for each in listed['data'])}")
    if as_json:
        print_json({"data": found})
        return
    if name is None:
        table = folding_table("guard", "acts on", "by default", "what it does")
        for each in found:
            table.add_row(each["name"], each["acts_on"], "on" if each["on_by_default"] else "off", each["summary"])
    else:
        table = folding_table("setting", "default", "may be", "meaning", title=f"{name}: {found[0]['summary']}")
        for setting, schema in found[0]["settings"].get("properties", {}).items():
            may_be = schema.get("enum") or [each.get("type", "") for each in schema.get("anyOf", [schema])]
            default = json.dumps(schema["default"]) if "default" in schema else "needed"
            table.add_row(setting, default, ", ".join(map(str, may_be)), schema.get("description", ""))
    out.print(table)
    for each in found:
        if each["unable"]:
            out.print(f"{each['name']} cannot be used on this server: {each['unable']}.")


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
