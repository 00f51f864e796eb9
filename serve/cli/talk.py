"""What every command shares: the server at LETHE_URL, its errors, and how a forget set is shown."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.table import Column, Table

from guards.catalogue import CALIBRATIONS
from serve.settings import Settings

out = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)
NameArgument = Annotated[str, typer.Argument(help="The forget set's name: 1 to 63 of a-z, 0-9, _ and -.")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def print_json(shown: Any) -> None:
    """For programs: what the server returned, or what a command found."""
    print(json.dumps(shown, indent=1, ensure_ascii=False))


def folding_table(*columns: str, **options: Any) -> Table:
    """A table whose cells go on in the next line where the terminal is narrow, rather than being cut off."""
    return Table(*(Column(name, overflow="fold") for name in columns), **options)


class ServerSaysNo(Exception):
    """The server refused, with a message for people."""


IDLE_S = 2.0
"""After that a connection is not used again. The server closes one that was idle for 5 s, perhaps while a request is on its way."""


def http_client(**options: Any) -> httpx.Client:
    """For a command that asks many times, with pauses between. ``options``: of `httpx.Client`."""
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=IDLE_S)
    return httpx.Client(timeout=600, limits=limits, **options)


def connect() -> httpx.Client:
    """To the admin API of the server at LETHE_URL."""
    settings = Settings()
    headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    return http_client(base_url=settings.url.rstrip("/") + "/lethe/v1", headers=headers)


def unwrap(answer: httpx.Response) -> Any:
    if answer.is_success:
        return answer.json()
    try:
        error = answer.json()["error"]
        message = "\n".join(error.get("problems", [error["message"]]))
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {answer.status_code}: {answer.text[:500]}"
    if answer.status_code == 401:
        message += " (this command sends the one in LETHE_KEY)"
    raise ServerSaysNo(message)


def act(method: str, path: str, done: str, **options: Any) -> None:
    with connect() as client:
        revision = unwrap(client.request(method, path, **options))["revision"]
    out.print(f"{done} from revision {revision} on")


def print_set(shown: dict[str, Any]) -> None:
    table = folding_table("", "", show_header=False, title=shown["name"])
    table.add_row("enabled", f"since {shown['enabled_at']}" if shown["enabled"] else "no")
    for name in ("description", "requester", "legal_basis", "expires_at", "fingerprint", "revision"):
        if shown[name]:
            table.add_row(name, str(shown[name]))
    for artifact in shown["artifacts"]:
        if artifact["kind"] in CALIBRATIONS and artifact["kind"] != "gate":
            found = json.loads(artifact["detail"])
            one = "contrast" if artifact["kind"] == "calibration" else artifact["kind"].removesuffix("_strength")
            for kind, each in found.items() if artifact["kind"] == "corruption" else [(one, found)]:
                strength = f"strength {each['strength']:.2f}, reference {each.get('reference')}"
                table.add_row(kind, f"calibrated: {strength}, {artifact['updated_at']}")
        elif artifact["kind"] == "gate":
            found = json.loads(artifact["detail"])
            promise = f"P(miss) <= {found['epsilon']:.3g}, P(false alarm) <= {found['delta']:.3g}"
            table.add_row("gate", f"cosine {found['threshold']:.3f}: {promise}, {artifact['updated_at']}")
        else:
            table.add_row(artifact["kind"], f"{artifact['status']} {artifact['detail']}")
    if training := shown.get("training"):
        state = training.get("reason") or f"{training.get('stage', '')} {training.get('step', '')}/{training.get('steps', '')}"
        table.add_row("training", f"{training['status']} {state}")
    if shown.get("stripped_at"):
        table.add_row("texts dropped", shown["stripped_at"])
    for name in ("phrases", "aliases", "questions", "texts"):
        entries = shown.get("content", {}).get(name, [])
        listed = [entry["question"] if isinstance(entry, dict) else entry for entry in entries[:20]]
        more = [f"... and {len(entries) - 20:,} more"] if len(entries) > 20 else []
        if shown[name]:
            table.add_row(name, "\n".join([f"{shown[name]:,}", *listed, *more]))
    out.print(table)


def artifact_of(shown: dict[str, Any], kind: str) -> dict[str, Any] | None:
    return next((artifact for artifact in shown["artifacts"] if artifact["kind"] == kind), None)


def fail(message: str) -> NoReturn:
    print(f"lethe: {message}", file=sys.stderr)
    raise SystemExit(1)
