"""``lethe forget``: add, show, enable, disable and remove forget sets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from guards.forget_set import write_jsonl
from guards.removal_list import Kind, read_removal_list
from serve.cli.talk import (
    JsonOption,
    NameArgument,
    act,
    artifact_of,
    connect,
    err,
    fail,
    folding_table,
    out,
    print_json,
    print_set,
    unwrap,
)

app = typer.Typer(no_args_is_help=True, help="Add, show, enable, disable and remove forget sets.")


@app.command("add")
def forget_add(
    name: NameArgument,
    file: Annotated[
        Path,
        typer.Argument(help="JSON lines: {'phrase': ...}, {'alias': ...}, {'question': ..., 'answer': ...}; or CSV, or a list"),
    ],
    replace: Annotated[bool, typer.Option(help="Replace the set if it exists.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Add also what nobody is likely to mean, such as the phrase 'the'.")
    ] = False,
    column: Annotated[str | None, typer.Option(help="Of a CSV file, the column to read.")] = None,
    kind: Annotated[Kind | None, typer.Option("--as", help="What the column's cells, or the lines of a plain list, are.")] = None,
) -> None:
    """Add a forget set from a file, and wait until it is compiled. It does nothing until enabled.

    Says what was left out of the file, and which phrases occur in a sample of ordinary text.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror}")
    # The server makes the same checks; here they come before anything is sent, and for every form of file.
    read = read_removal_list(content, name, column=column, kind=kind, force=force)
    for note in read.notes:
        out.print(f"Note: {note}")
    with connect() as client:
        body: dict[str, Any] = {"content": write_jsonl(read.forget_set).encode(), "headers": {"content-type": "application/jsonl"}}
        options = {"force": "true"} if force else {}
        if replace and client.get(f"/forget_sets/{name}").status_code == 200:
            answer = client.put(f"/forget_sets/{name}", params=options, **body)
        else:
            answer = client.post("/forget_sets", params={"name": name, **options}, **body)
        added = unwrap(answer)
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as progress:
            progress.add_task(f"Compiling {added['phrases']:,} phrases and embedding the rest")
            while any(artifact["status"] == "building" for artifact in added["artifacts"]):
                time.sleep(0.2)
                listed = unwrap(client.get("/forget_sets"))["data"]  # not the set itself, whose content may be large
                added = {**added, **next(each for each in listed if each["name"] == name)}
    print_set(added)
    if any(artifact["kind"] == "phrases" and artifact["status"] == "failed" for artifact in added["artifacts"]):
        raise typer.Exit(1)
    if added["phrases"] and not added["enabled"]:
        out.print(f"Next: lethe forget enable {name}")
    elif not added["phrases"] and artifact_of(added, "assistant") is None:
        out.print(f"This set has no phrases. Next: lethe train {name}, so that an assistant enforces it; or a policy that refuses")


@app.command("list")
def forget_list(as_json: JsonOption = False) -> None:
    """List all forget sets."""
    with connect() as client:
        listed = unwrap(client.get("/forget_sets"))
    if as_json:
        print_json(listed)
        return
    table = folding_table(
        "name", "enabled since", "phrases", "artifacts", "requester", "expires", title=f"revision {listed['revision']}"
    )
    for each in listed["data"]:
        artifacts = ", ".join(f"{artifact['kind']} {artifact['status']}" for artifact in each["artifacts"])
        since = f"{each['enabled_at'][:19]}Z" if each["enabled"] else "no"
        table.add_row(each["name"], since, f"{each['phrases']:,}", artifacts, each["requester"], each["expires_at"] or "")
    out.print(table)


@app.command("show")
def forget_show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show a set: its state, its artifacts, its paperwork, its content."""
    with connect() as client:
        shown = unwrap(client.get(f"/forget_sets/{name}"))
    print_json(shown) if as_json else print_set(shown)


@app.command("enable")
def forget_enable(name: NameArgument) -> None:
    """Put a set in force, from the next request on."""
    act("POST", f"/forget_sets/{name}/enable", f"{name} is in force")
    with connect() as client:
        policies = unwrap(client.get("/revision"))["policies"]
    if name not in policies["default"]:
        out.print("Note: the default policy leaves this set out; `lethe revision` shows which policies apply it.")


@app.command("disable")
def forget_disable(name: NameArgument) -> None:
    """Take a set out of force, from the next request on."""
    act("POST", f"/forget_sets/{name}/disable", f"{name} is not in force")


@app.command("strip")
def forget_strip(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Drop a set's texts for good and keep only what was made from them: embeddings, names as letters, compiled phrases, assistant.

    It stays in force. Its content cannot be shown, trained or embedded again; `lethe forget add --replace` brings a new one.
    """
    if not yes:
        typer.confirm(f"Drop the texts of {name}? This cannot be undone", abort=True)
    act("POST", f"/forget_sets/{name}/strip", f"the texts of {name} are gone")


@app.command("remove")
def forget_remove(name: NameArgument) -> None:
    """Delete a set. If it was enabled, it is out of force from the next request on."""
    act("DELETE", f"/forget_sets/{name}", f"{name} is deleted")
