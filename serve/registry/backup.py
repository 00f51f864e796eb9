"""Backups of a state directory, written and brought back while a server runs.

A backup is one tar file: the databases, each copied in one transaction, and the artifact files that the registry names. Bringing it
back is a change like every other where the registry of now can be read: forget sets, their artifacts and policies become those of
the backup, the audit trail goes on and says so, and a running server takes it up. Where there is no registry, or a damaged one, the
backup's takes its place.

Not covered: trainings under way (their files are large, and the same order trains again); what keys used today; the files of the
served model.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tarfile
import tempfile
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import sqlalchemy as sa

from guards.catalogue import guard_of
from guards.types import ArtifactRef
from guards.whole_file import write_whole
from serve.lock import private_directory, sole_server
from serve.protocol.artifacts import artifact_path
from serve.registry import tables
from serve.registry.position import Mark
from serve.registry.records import InUse, RegistryError, RolledBack, StoredSet, now
from serve.registry.rows import append, experiments_of, policies_of, stored_sets
from serve.registry.store import Registry
from serve.sqlite import StorageFault

DATABASE, OTHERS = "lethe.db", ("observations.db",)
ACTION = "state.restore"
_MANIFEST = "manifest.json"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, tarfile.TarError, sa.exc.SQLAlchemyError)
_COMPANIONS = ("", "-wal", "-shm")


@dataclass(frozen=True)
class Restoration:
    """What bringing a backup back would do."""

    revision: int  # of the backup
    at: str  # when it was made
    replaces: bool  # there is no registry that can be read: the backup's becomes the registry, keys and audit trail included
    why: str  # it cannot be read
    added: tuple[str, ...]  # forget sets that come back
    changed: tuple[str, ...]  # and those that become what they were
    removed: tuple[str, ...]  # and those that are not in the backup
    released: tuple[str, ...]  # sets that are in force now, and then would not be
    kept: tuple[str, ...]  # sets whose texts were dropped since: they stay as they are


class BrokenBackup(RegistryError):
    """A file that is no backup, or not a whole one. Nothing was changed."""


def write_backup(state: Path, file: Path) -> tuple[int, int, list[Path]]:
    """Write a backup of a state directory.

    Returns:
        The revision, the number of artifact files in it, and those that the registry names and that are not there.

    Raises:
        RegistryError: there is nothing to back up.
        StorageFault, OSError: the state cannot be read, or the file not be written.
    """
    if not (state / DATABASE).exists():
        raise RegistryError(f"there is no registry in {state}; set LETHE_STATE_DIR to the server's state directory")
    with tempfile.TemporaryDirectory() as place:
        copies = Path(place)
        for name in (DATABASE, *OTHERS):
            if (state / name).exists():
                _copy(state / name, copies / name)
        registry = Registry(copies / DATABASE)
        position, sets = registry.position(), registry.forget_sets()
        registry.close()
        named = sorted({path for each in sets for path in _files_of(state, each)})
        files = [path for path in named if path.exists()]
        manifest = {"version": version("lethe"), "at": now(), "revision": position.revision, "head": position.head}
        (copies / _MANIFEST).write_text(json.dumps(manifest), "utf-8")

        def write(path: Path) -> None:
            with tarfile.open(path, "w") as archive:
                for name in (_MANIFEST, DATABASE, *OTHERS):
                    if (copies / name).exists():
                        archive.add(copies / name, name)
                for each in files:
                    archive.add(each, each.relative_to(state))

        write_whole(file, write)  # made by mkstemp: only its owner may read it
    return position.revision, len(files), [path for path in named if path not in files]


class Backup:
    """A backup, unpacked into a folder of its own until `close`.

    Raises:
        BrokenBackup: the file is none, or not whole.
    """

    def __init__(self, file: Path) -> None:
        self._place = tempfile.TemporaryDirectory()
        self._files = Path(self._place.name)
        try:
            with tarfile.open(file) as archive:
                archive.extractall(self._files, filter="data")
            self._manifest = json.loads((self._files / _MANIFEST).read_text("utf-8"))
            stated = (self._manifest["revision"], self._manifest["head"], self._manifest["at"])
            if not (self._files / DATABASE).is_file():
                raise ValueError(f"there is no {DATABASE} in it")
            self._registry = Registry(self._files / DATABASE)
            self._registry.check_file()
            broken = self._registry.first_broken_audit_row()
            position = self._registry.position()
        except (*_UNREADABLE, StorageFault, RegistryError) as error:
            self._place.cleanup()
            raise BrokenBackup(f"{file} is not a whole backup: {error!s}; nothing was changed") from None
        if broken is not None or (position.revision, position.head) != stated[:2]:
            self.close()
            raise BrokenBackup(f"{file} was changed after it was made: its audit trail does not fit; nothing was changed")

    def close(self) -> None:
        self._registry.close()
        self._place.cleanup()

    def compare(self, state: Path) -> Restoration:
        """What `restore` would do to a state directory.

        Raises:
            StorageFault, RegistryError: its registry is sound, and cannot be used now.
        """
        theirs = {each.name: each for each in self._registry.forget_sets()}
        at, revision = str(self._manifest["at"]), int(self._manifest["revision"])
        ours: dict[str, StoredSet] = {}
        why = "" if (state / DATABASE).exists() else f"there is none in {state}"
        if not why:
            try:
                with closing(Registry(state / DATABASE)) as registry:
                    registry.check_file()
                    registry.check_history()
                    ours = {each.name: each for each in registry.forget_sets()}
            except RolledBack as error:
                why = str(error)
            except StorageFault as error:
                if not error.damaged:  # it is sound, and only cannot be used now
                    raise
                why = str(error)
        if why:
            return Restoration(revision, at, True, why, tuple(theirs), (), (), (), ())
        kept = {name for name in ours.keys() & theirs.keys() if ours[name].stripped and not theirs[name].stripped}
        after = {name: theirs[name].enabled for name in theirs.keys() - kept} | {name: ours[name].enabled for name in kept}
        return Restoration(
            revision,
            at,
            False,
            "",
            tuple(sorted(theirs.keys() - ours.keys())),
            tuple(sorted(n for n in ours.keys() & theirs.keys() - kept if _differs(ours[n], theirs[n]))),
            tuple(sorted(ours.keys() - theirs.keys())),
            tuple(sorted(name for name, each in ours.items() if each.enabled and not after.get(name, False))),
            tuple(sorted(kept)),
        )

    def restore(self, state: Path, *, actor: str) -> int:
        """Bring the backup back. Returns the new revision.

        Raises:
            InUseElsewhere: a server runs on a registry that would have to be replaced.
            InUse: an experiment needs a policy that the backup lacks.
            StorageFault, OSError: the state cannot be written.
        """
        private_directory(state)
        plan = self.compare(state)
        with sole_server(state) if plan.replaces else nullcontext():
            for file in (self._files / "artifacts").rglob("*.safetensors"):  # before anything names them
                place = state / file.relative_to(self._files)
                write_whole(place, lambda path, file=file: path.write_bytes(file.read_bytes()))  # type: ignore[misc]
            if plan.replaces:
                self._replace(state)
            with closing(Registry(state / DATABASE)) as registry, registry.changing() as connection:
                if not plan.replaces:
                    self._take_over(registry, connection)
                connection.execute(
                    _building().values(status="failed", detail="was not ready when the backup was made; PUT the set again")
                )
                return append(connection, actor, ACTION, DATABASE, {"backup_of_revision": plan.revision, "at": plan.at})

    def _replace(self, state: Path) -> None:
        """If this is interrupted, either every file is whole, or the mark of what was in force keeps a server from starting."""
        stamp = now().replace(":", "")
        for name in (*OTHERS, DATABASE):
            if not (self._files / name).exists():
                continue
            new = state / f"{name}.restoring"
            _copy(self._files / name, new)  # what may fail for want of room comes first
            for companion in _COMPANIONS:
                there = state / (name + companion)
                if there.exists():
                    os.replace(there, state / f"{name}{companion}.before-{stamp}")
            os.replace(new, state / name)
        Mark(state / DATABASE).path.unlink(missing_ok=True)

    def _take_over(self, registry: Registry, connection: sa.Connection) -> None:
        stripped = {each.name for each in stored_sets(connection) if each.stripped}
        kept = {each.name for each in self._registry.forget_sets() if each.name in stripped and not each.stripped}
        with self._registry.reading() as source:
            rows = {
                table: [dict(row) for row in source.execute(sa.select(table)).mappings()]
                for table in (tables.forget_sets, tables.artifacts, tables.policies)
            }
            policies = policies_of(source)
        for experiment in experiments_of(connection):
            for arm in experiment.order.arms:
                if arm.policy not in policies:
                    raise InUse(
                        f"policy {arm.policy!r} answers in experiment {experiment.name!r} and is not in the backup; stop that first"
                    )
        connection.execute(tables.forget_sets.delete().where(tables.forget_sets.c.name.not_in(kept)))
        connection.execute(tables.policies.delete())
        for table, name in ((tables.forget_sets, "name"), (tables.artifacts, "set_name"), (tables.policies, "")):
            values = [row for row in rows[table] if not name or row[name] not in kept]
            if values:
                connection.execute(table.insert(), values)


def _building() -> sa.Update:
    return tables.artifacts.update().where(tables.artifacts.c.status == "building")


def _copy(source: Path, target: Path) -> None:
    """Copy a database as one transaction sees it."""
    target.unlink(missing_ok=True)
    try:
        address = source.resolve().as_uri() + "?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)) as connection:
            connection.execute("VACUUM INTO ?", (str(target),))
    except sqlite3.DatabaseError as error:
        raise StorageFault(f"{source} cannot be copied: {error}") from None


def _files_of(state: Path, stored: StoredSet) -> list[Path]:
    found = ((guard_of(each.kind), each.fingerprint) for each in stored.artifacts)
    return [
        artifact_path(state / "artifacts", ArtifactRef(guard.name, name)) for guard, name in found if guard is not None and name
    ]


def _differs(one: StoredSet, two: StoredSet) -> bool:
    def seen(each: StoredSet) -> object:
        return each.header["fingerprint"], each.enabled, {(a.kind, a.fingerprint) for a in each.artifacts}

    return seen(one) != seen(two)
