"""``lethe key``: make, list and revoke keys. Works without a running server."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from serve.cli.talk import JsonOption, err, fail, folding_table, out, print_json
from serve.clock import never_back
from serve.registry.snapshot import SCOPES, Limits
from serve.registry.store import Registry
from serve.registry.usage import FILE as USAGE
from serve.registry.usage import Usage, Used
from serve.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys. Works without a running server.")


@app.command("create")
def key_create(
    scope: Annotated[str, typer.Option(help="chat: talk; compare: also choose policies; admin: everything.")],
    label: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    expires: Annotated[str | None, typer.Option(help="When it ends: 30d, 12h, or 2027-01-31 (UTC).")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="At most; more get a 429.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Of prompts and answers, at most; a day is UTC's.")] = None,
    in_experiments: Annotated[bool, typer.Option(help="Whether its requests take part in experiments.")] = True,
) -> None:
    """Make a key and print it once. As soon as one key exists, every route needs one."""
    if scope not in SCOPES:
        fail(f"scope {scope!r} must be one of {', '.join(SCOPES)}")
    limits = Limits(None if expires is None else _end(expires), requests_per_minute, tokens_per_day, in_experiments)
    key_id, secret = _registry().create_key(scope, label, actor="command line", limits=limits)  # type: ignore[arg-type]
    err.print(f"{key_id} ({scope}); keep the secret, it is not shown again:")
    print(secret)


@app.command("list")
def key_list(as_json: JsonOption = False) -> None:
    """List all keys (not their secrets), what limits them, and what they used today."""
    table = folding_table("id", "scope", "label", "created", "expires", "limits", "tokens today", "used last")
    state = Settings().state_dir
    used, last = {}, {}
    if (state / USAGE).exists():
        usage = Usage(state / USAGE)
        used, last = usage.of_day(never_back().date().isoformat()), usage.last()
    keys = _registry().stored_keys()
    if as_json:
        found = [asdict(each) | {"used_today": asdict(used.get(each.id, Used())), "used_last": last.get(each.id)} for each in keys]
        print_json({"data": found})
        return
    for each in keys:
        limits = each.limits
        described = [
            f"{limits.requests_per_minute:,} requests a minute" if limits.requests_per_minute else "",
            f"{limits.tokens_per_day:,} tokens a day" if limits.tokens_per_day else "",
            "" if limits.in_experiments else "in no experiment",
        ]
        tokens = f"{used[each.id].tokens:,}" if each.id in used else "0"
        ends, limited = limits.expires_at or "never", ", ".join(filter(None, described)) or "none"
        table.add_row(each.id, each.scope, each.label, each.created_at, ends, limited, tokens, last.get(each.id, "never"))
    out.print(table)


@app.command("revoke")
def key_revoke(key_id: Annotated[str, typer.Argument(help="The key's id, from `lethe key list`.")]) -> None:
    """Revoke a key. Running servers follow within a second."""
    out.print(f"{key_id} is revoked (revision {_registry().revoke_key(key_id, actor='command line')})")


def _end(expires: str) -> str:
    """When a key ends, UTC, ISO 8601."""
    if expires[:-1].isdecimal() and len(expires) < 8 and expires[-1:] in ("d", "h"):
        count = int(expires[:-1])
        length = timedelta(days=count) if expires[-1] == "d" else timedelta(hours=count)
        try:
            ends = datetime.now(UTC) + length
        except OverflowError:
            fail(f"--expires {expires!r} is beyond the calendar; leave it out for a key that does not end")
    else:
        try:
            ends = datetime.fromisoformat(expires)
        except ValueError:
            fail(f"--expires {expires!r} must be a time from now such as 30d or 12h, or a date such as 2027-01-31")
        ends = ends if ends.tzinfo else ends.replace(tzinfo=UTC)
    if ends <= datetime.now(UTC):
        fail(f"--expires {expires!r} is past; name a later time")
    return ends.astimezone(UTC).isoformat(timespec="seconds")


def _registry() -> Registry:
    return Registry(Settings().state_dir / "lethe.db")
