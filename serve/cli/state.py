"""``lethe backup``, ``restore``, ``doctor``: the state directory, with or without a running server."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from serve import doctor as checks
from serve.cli.talk import JsonOption, err, folding_table, out, print_json
from serve.lock import server_runs
from serve.registry.backup import Backup, write_backup
from serve.settings import Settings

FileArgument = Annotated[Path, typer.Argument(help="The backup, one tar file.")]


def backup(file: FileArgument) -> None:
    """Write a backup of the state directory, while the server runs: registry, audit trail, keys, artifacts, experiments' figures.

    It holds what the forget sets hold: keep it as they are kept, and not longer.
    """
    revision, files, missing = write_backup(Settings().state_dir, file)
    out.print(f"{file} holds revision {revision} and {files} artifact files, {file.stat().st_size / 2**20:.1f} MiB")
    for path in missing:
        out.print(f"Note: {path} is not there and so not in the backup; phrases and vectors are made anew, what was trained is not")


def restore(file: FileArgument, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Bring back the forget sets and policies of a backup, while the server runs.

    Keys, experiments and the audit trail stay as they are, and the trail says what was brought back. Only where the registry is
    missing, damaged, or older than what was in force, does all of the backup's take its place; the server must be stopped for that.
    """
    state = Settings().state_dir
    with closing(Backup(file)) as found:
        plan = found.compare(state)
        out.print(f"{file}: revision {plan.revision}, made at {plan.at}")
        if plan.replaces:
            out.print(f"The registry cannot be kept: {plan.why}")
            out.print("All of the backup takes its place, with its keys: also with those that were revoked since.")
        for what, names in (
            ("comes back", plan.added),
            ("becomes what it was", plan.changed),
            ("is deleted, the backup lacks it", plan.removed),
            ("stays as it is, its texts were dropped since", plan.kept),
        ):
            for name in names:
                out.print(f"  {name}: {what}" + ("; IT IS NO LONGER IN FORCE THEN" if name in plan.released else ""))
        for name in set(plan.released) - {*plan.added, *plan.changed, *plan.removed, *plan.kept}:
            out.print(f"  {name}: IS NO LONGER IN FORCE THEN")
        if not yes:
            typer.confirm("Bring it back?", abort=True)
        revision = found.restore(state, actor="command line")
    out.print(f"brought back, as revision {revision}; a running server follows within a second")


def doctor(
    model: Annotated[str | None, typer.Option(help="The model that is to be served. Default: the bundled one.")] = None,
    port: Annotated[int, typer.Option(help="The port that the server is to listen on.")] = 8000,
    as_json: JsonOption = False,
) -> None:
    """Check what would keep this machine from serving, and say how to mend it. Exit status 1 if something would."""
    settings = Settings()
    table = folding_table("", "what", "found", "to do")
    with err.status("Looking"):
        found = list(checks.run(settings, model, port, server_runs=server_runs(settings.state_dir)))
    for check in found:
        table.add_row(check.state, check.what, check.found, check.to_do)
    failed = any(check.state == "fails" for check in found)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in found]})
    else:
        out.print(table)
    if failed:
        raise typer.Exit(1)
    if not as_json:
        out.print("Nothing here would keep this machine from serving.")
