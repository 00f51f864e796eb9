"""How SQLite files are opened: several processes may share one, writers queue, readers never wait, deleted text is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

READING = {"lethe_reading": True}
"""Execution options of a connection that only reads."""


def open_database(path: Path) -> sa.Engine:
    """An engine over a file, which is made with its directory if absent. ``begin()`` takes the write lock at once."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # removal requests are nobody else's business
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin_immediately)
    return engine


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
