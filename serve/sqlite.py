"""How SQLite files are opened: several processes may share one, writers queue, readers never wait, deleted text is overwritten.

What can go wrong with a file (a full disk, a damaged page, ...) becomes a `StorageFault`, which says what to do. A transaction that
meets one leaves the file as it was.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from serve.lock import private_directory

READING = {"lethe_reading": True}
"""Execution options of a connection that only reads."""


_FAULTS = {
    "SQLITE_FULL": "the disk is full; free some space and try again",
    "SQLITE_READONLY": "it may only be read; make the directory writable (its owner, how its disk is mounted) and try again",
    "SQLITE_IOERR": "the disk reports an error; see the machine's log; on a sound disk, `lethe restore FILE` brings a backup back",
    "SQLITE_CORRUPT": "it is damaged; stop the server and bring the last backup back with `lethe restore FILE`",
    "SQLITE_NOTADB": "it is no SQLite database; stop the server and bring the last backup back with `lethe restore FILE`",
    "SQLITE_CANTOPEN": "it cannot be opened; make the directory and the files in it readable and writable for this user",
    "SQLITE_BUSY": "another process has held its lock for half a minute; find it (`lsof` on the file) and end it",
}
"""SQLite's names of what can be wrong with a file, and what to do about each."""


class StorageFault(Exception):
    """A file cannot be read or written. The transaction changed nothing, and what is in force stays in force."""

    status = 503  # of the HTTP answer

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged  # what is in the file is lost, or it is no database


def open_database(path: Path) -> sa.Engine:
    """An engine over a file, which is made with its directory if absent. ``begin()`` takes the write lock at once.

    Whatever is done with it raises StorageFault where the file cannot be used.
    """
    try:
        private_directory(path.parent)
    except OSError as error:
        raise StorageFault(f"{path.parent} cannot be made: {error.strerror}; set LETHE_STATE_DIR to a writable directory") from None

    def name_the_fault(context: sa.ExceptionContext) -> None:
        if isinstance(context.original_exception, sqlite3.DatabaseError):
            name = getattr(context.original_exception, "sqlite_errorname", "")
            if name.startswith("SQLITE_IOERR") and _is_full(path.parent):  # SQLite's shared memory has no other name for it
                name = "SQLITE_FULL"
            what = next((what for kind, what in _FAULTS.items() if name == kind or name.startswith(kind + "_")), None)
            if what is not None:
                damaged = name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
                message = f"{path} cannot be used: {what} ({context.original_exception})"
                raise StorageFault(message, damaged=damaged) from context.original_exception

    # No connection outlives its transaction: one that did would go on using a file after another was put in its place.
    pool = None if str(path) == ":memory:" else sa.NullPool
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30}, poolclass=pool)
    sa.event.listen(engine, "handle_error", name_the_fault)
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin_immediately)
    return engine


def _is_full(directory: Path) -> bool:
    try:
        return shutil.disk_usage(directory).free < _LEAST
    except OSError:
        return False


_LEAST = 1 << 20
"""Bytes without which SQLite cannot open a file."""


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we begin transactions ourselves
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediately(connection: sa.Connection) -> None:
    # A writer takes the lock before it reads, so that what it read is still true when it writes.
    reading = connection.get_execution_options().get("lethe_reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
