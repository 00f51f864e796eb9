"""The registry's file: opened, brought to the newest schema, watched for older copies, and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from guards.forget_set import ForgetSet
from guards.kinds import SetArtifacts
from serve.registry import tables
from serve.registry.audit import AuditRow, first_broken
from serve.registry.migrations import HEAD, NewerDatabase, upgrade
from serve.registry.plans import enforcing
from serve.registry.position import Mark, Position
from serve.registry.records import STRIPPED, RegistryError, RolledBack, StoredKey, StoredSet, Stripped
from serve.registry.rows import (
    experiments_of,
    limits_of,
    policies_of,
    position_of,
    revision_of,
    stored_set,
    stored_sets,
    unknown_set,
)
from serve.registry.snapshot import Key, Snapshot
from serve.sqlite import READING, StorageFault, open_database


class RegistryReader:
    """What `serve.registry.store.Registry` reads. Blocking: call it from a thread when an event loop is running.

    Args:
        path: the database file; made with its directory if absent.

    Every method raises StorageFault where the file cannot be used; `snapshot` raises RolledBack where it holds an older history
    than before.

    Raises:
        RegistryError: the file was written by a newer release.
        StorageFault: see `open_database`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = Mark(path)
        self._seen = self._mark.read()  # as far as the history has come
        self._engine = open_database(path)
        try:
            with self._engine.begin() as connection:
                upgrade(connection)
        except NewerDatabase as newer:
            self.close()
            raise RegistryError(f"{path} has {newer}, this release reads up to revision {HEAD}; upgrade lethe") from None

    def close(self) -> None:
        self._engine.dispose()

    # Reading

    def revision(self) -> int:
        """The revision in force: the number of changes so far."""
        with self.reading() as connection:
            return revision_of(connection)

    def position(self) -> Position:
        """The end of the history as the file has it now."""
        with self.reading() as connection:
            return position_of(connection)

    def forget_sets(self) -> list[StoredSet]:
        with self.reading() as connection:
            return stored_sets(connection)

    def forget_set(self, name: str) -> StoredSet:
        """Raises UnknownName."""
        with self.reading() as connection:
            return stored_set(connection, name)

    def content(self, name: str) -> ForgetSet:
        """Everything in a forget set. Raises UnknownName."""
        with self.reading() as connection:
            content = connection.scalar(sa.select(tables.forget_sets.c.content).where(tables.forget_sets.c.name == name))
            if content is None:
                raise unknown_set(name)
            if content == STRIPPED:
                raise Stripped(
                    f"the texts of forget set {name!r} were dropped, only what was made from them is kept; PUT the set to change it"
                )
            return ForgetSet.model_validate_json(content)

    def stored_keys(self) -> list[StoredKey]:
        with self.reading() as connection:
            rows = connection.execute(sa.select(tables.keys).order_by(tables.keys.c.created_at)).mappings()
            return [StoredKey(row["id"], row["scope"], row["label"], row["created_at"], limits_of(row)) for row in rows]

    def audit(self, *, after: int = 0, limit: int = 1_000) -> list[AuditRow]:
        """Audit rows in order, from the one after revision ``after``."""
        with self.reading() as connection:
            query = sa.select(tables.audit).where(tables.audit.c.revision > after).order_by(tables.audit.c.revision).limit(limit)
            return [AuditRow(**row) for row in connection.execute(query).mappings()]

    def check_file(self) -> None:
        """Read the whole file. Raises StorageFault if a page of it is damaged."""
        with self.reading() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise StorageFault(
                f"{self._path} cannot be used: it is damaged; stop the server and bring the last backup back with "
                f"`lethe restore FILE` ({found})",
                damaged=True,
            )

    def check_history(self) -> None:
        """Raises RolledBack if an older copy was put in the file's place."""
        with self.reading() as connection:
            self._check_history(connection)

    def first_broken_audit_row(self) -> int | None:
        """The first revision whose audit row was tampered with, or None."""
        with self.reading() as connection:
            rows = connection.execution_options(yield_per=1_000).execute(sa.select(tables.audit).order_by(tables.audit.c.revision))
            return first_broken(AuditRow(**row) for row in rows.mappings())

    def snapshot(self) -> Snapshot:
        """What is in force, read in one transaction."""
        with self.reading() as connection:
            self._check_history(connection)
            position = position_of(connection)
            keys = connection.execute(sa.select(tables.keys)).mappings()
            self._note(position)
            return Snapshot(
                revision=position.revision,
                head=position.head,
                sets={stored.name: stored.made for stored in stored_sets(connection) if stored.enabled},
                policies=policies_of(connection),
                keys=tuple(Key(row["id"], row["digest"], row["scope"], limits_of(row)) for row in keys),
                experiments=tuple(experiments_of(connection)),
            )

    def enforced(self, made: SetArtifacts) -> bool:
        """Whether some policy would do anything for a set of which this was made."""
        with self.reading() as connection:
            return bool(enforcing(policies_of(connection).values(), made))

    # Inside

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One transaction that sees one revision."""
        with self._engine.connect().execution_options(**READING) as connection:
            yield connection

    @contextmanager
    def changing(self) -> Iterator[sa.Connection]:
        """One transaction that changes everything or nothing; see `append`."""
        with self._engine.begin() as connection:
            self._check_history(connection)
            yield connection
            position = position_of(connection)
        self._note(position)

    def _check_history(self, connection: sa.Connection) -> None:
        seen = self._seen
        if seen is None or seen.revision == 0:
            return
        head = connection.scalar(sa.select(tables.audit.c.hash).where(tables.audit.c.revision == seen.revision))
        if head != seen.head:
            raise RolledBack(
                f"{self._path} holds revision {revision_of(connection)} of another history than was in force up to "
                f"revision {seen.revision}: an older copy was put in its place, in which later removals are missing. Nothing was "
                "changed, and a running server keeps what was in force. Stop the server and put the newest copy back, or a backup "
                f"with `lethe restore FILE`; to go on with this copy as it is, delete {self._mark.path} and start again"
            )

    def _note(self, position: Position) -> None:
        if self._seen is None or position.revision > self._seen.revision:
            self._seen = position
            self._mark.write(position)
