"""``lethe key``: make, list and revoke keys. Works without a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.cli.talk import err, fail, folding_table, out
from serve.registry.snapshot import SCOPES
from serve.registry.store import Registry
from serve.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys. Works without a running server.")


@app.command("create")
def key_create(
    scope: Annotated[str, typer.Option(help="chat: talk; compare: also choose policies; admin: everything.")],
    label: Annotated[str, typer.Option(help="Whose key it is.")] = "",
) -> None:
    """Make a key and print it once. As soon as one key exists, every route needs one."""
    if scope not in SCOPES:
        fail(f"scope {scope!r} must be one of {', '.join(SCOPES)}")
    key_id, secret = _registry().create_key(scope, label, actor="command line")  # type: ignore[arg-type]
    err.print(f"{key_id} ({scope}); keep the secret, it is not shown again:")
    print(secret)


@app.command("list")
def key_list() -> None:
    """List all keys (not their secrets)."""
    table = folding_table("id", "scope", "label", "created")
    for each in _registry().stored_keys():
        table.add_row(each.id, each.scope, each.label, each.created_at)
    out.print(table)


@app.command("revoke")
def key_revoke(key_id: Annotated[str, typer.Argument(help="The key's id, from `lethe key list`.")]) -> None:
    """Revoke a key. Running servers follow within a second."""
    out.print(f"{key_id} is revoked (revision {_registry().revoke_key(key_id, actor='command line')})")


def _registry() -> Registry:
    return Registry(Settings().state_dir / "lethe.db")
