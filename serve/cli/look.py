"""``lethe check``, ``why``, ``revision``, ``audit``: what is in force, what it would hit, what it hit, who changed it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from serve.cli.talk import JsonOption, connect, fail, folding_table, out, print_json, unwrap


def check(
    text: Annotated[str, typer.Argument(help="Any text; - reads standard input.")],
    policy: Annotated[str, typer.Option(help="The policy to check against.")] = "default",
    as_json: JsonOption = False,
) -> None:
    """Show what the forget sets would hit in a text. Exit status 1 if something in force is hit."""
    text = sys.stdin.read() if text == "-" else text
    with connect() as client:
        found = unwrap(client.post("/check", json={"text": text, "policy": policy}))
    table = folding_table("forget set", "guard", "signal", "place", "text", "in force")
    for hit in found["hits"]:
        place = f"{hit['start']}-{hit['end']}"
        in_force = "yes" if hit["in_force"] else "no"
        table.add_row(hit["forget_set"], hit["guard"], _signal(hit), place, hit["text"], in_force)
    if as_json:
        print_json(found)
    else:
        out.print(table if found["hits"] else "Nothing is hit.")
    if any(hit["in_force"] for hit in found["hits"]):
        raise typer.Exit(1)


def why(request_id: Annotated[str, typer.Argument(help="The x-request-id of an answer.")], as_json: JsonOption = False) -> None:
    """Show what guards found in a request, and where: the forget set, the signal, the place in the prompt or the answer."""
    with connect() as client:
        found = unwrap(client.get(f"/requests/{request_id}"))
    if as_json:
        print_json(found)
        return
    refused = "refused" if found["refused"] else "answered"
    title = f"{found['at'][:19]}Z, {found['caller']}, policy {found['policy']}, revision {found['revision']}: {refused}"
    table = folding_table("forget set", "did", "signal", "place", "text", title=title)
    for hit in found["hits"]:
        turn = f", turn {hit['turn'] + 1}" if hit["turn"] is not None else ""
        table.add_row(
            hit["forget_set"], hit["action"], _signal(hit), f"{hit['where']}{turn}, {hit['start']}-{hit['end']}", hit["text"]
        )
    out.print(table)


def _signal(hit: dict[str, Any]) -> str:
    signal = str(hit["signal"]) if hit["how"] == "plain" else f"{hit['signal']} ({hit['how']})"
    return f"{signal} {hit['score']:.3f} >= {hit['threshold']:.3f}" if hit["signal"] == "similarity" else signal


def revision(as_json: JsonOption = False) -> None:
    """Show what is in force."""
    with connect() as client:
        shown = unwrap(client.get("/revision"))
    table = folding_table("policy", "forget sets that it applies", title=f"revision {shown['revision']}")
    for name, names in shown["policies"].items():
        table.add_row(name, ", ".join(names) or "none")
    print_json(shown) if as_json else out.print(table)
    if shown["fault"]:
        fail(f"this stays in force, since the registry cannot be read: {shown['fault']}")


def audit(
    after: Annotated[int, typer.Option(help="Show what came after this revision.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with everything.")] = False,
) -> None:
    """Show who changed what, and whether the record is intact."""
    rows: list[dict[str, Any]] = []
    shown = None
    with connect() as client:
        while shown is None or shown["data"]:
            shown = unwrap(client.get("/audit", params={"after": rows[-1]["revision"] if rows else after, "limit": 1_000}))
            rows += shown["data"]
    for row in rows:
        detail = {name: value for name, value in row["detail"].items() if value not in ("", None, 0, False)}
        told = ("requester", "legal_basis", "reason", "scope", "expires_at", "backup_of_revision")
        brief = ", ".join(f"{name} {value}" for name, value in detail.items() if name in told)
        line = f"{row['revision']:>6}  {row['at'][:19]}Z  {row['action']:<19}  {row['subject']}  by {row['actor']}"
        print(json.dumps(row) if as_json else f"{line}  {brief}".rstrip())
    if not shown["intact"]:
        fail(f"the record was tampered with: revision {shown['first_broken']} does not fit the ones before it")
    if not as_json:
        head = rows[-1]["hash"] if rows else "none"
        print(f"The chain is intact. Note its head elsewhere to notice if its end is cut off: {head}")
