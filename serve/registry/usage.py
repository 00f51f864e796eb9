"""What each key used, day by day: requests and tokens, in a database of their own.

Written in batches, so that a crash loses the last seconds and a request waits for no disk. Never what anybody asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from serve.clock import never_back
from serve.sqlite import READING, open_database

FILE = "usage.db"
KEPT_DAYS = 400

_metadata = sa.MetaData()
_days = sa.Table(
    "days",
    _metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("day", sa.String, primary_key=True),  # UTC
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),  # of prompts and answers
    sa.Column("last", sa.String, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Used:
    """What a key used."""

    requests: int = 0
    tokens: int = 0
    last: str = ""  # when it was used last; empty if never

    def and_more(self, requests: int, tokens: int, last: str) -> Used:
        return Used(self.requests + requests, self.tokens + tokens, last)


class Usage:
    """Blocking: call it from a thread when an event loop is running. Every method raises StorageFault."""

    def __init__(self, path: Path) -> None:
        self._engine = open_database(path)
        oldest = (never_back() - timedelta(days=KEPT_DAYS)).date().isoformat()
        with self._engine.begin() as connection:
            _metadata.create_all(connection)
            connection.execute(_days.delete().where(_days.c.day < oldest))

    def close(self) -> None:
        self._engine.dispose()

    def add(self, used: Mapping[tuple[str, str], Used]) -> None:
        """Add to what was used, (day, key) -> how much; all of it or nothing."""
        with self._engine.begin() as connection:
            _metadata.create_all(connection)  # the file may have been taken away
            for (day, key), each in used.items():
                added = insert(_days).values(key=key, day=day, requests=each.requests, tokens=each.tokens, last=each.last)
                more = {"requests": _days.c.requests + each.requests, "tokens": _days.c.tokens + each.tokens, "last": each.last}
                connection.execute(added.on_conflict_do_update(index_elements=["key", "day"], set_=more))

    def of_day(self, day: str) -> dict[str, Used]:
        """What each key used on a day."""
        with self._engine.connect().execution_options(**READING) as connection:
            rows = connection.execute(sa.select(_days).where(_days.c.day == day)).mappings()
            return {row["key"]: Used(row["requests"], row["tokens"], row["last"]) for row in rows}

    def last(self) -> dict[str, str]:
        """When each key was used last."""
        with self._engine.connect().execution_options(**READING) as connection:
            query = sa.select(_days.c.key, sa.func.max(_days.c.last)).group_by(_days.c.key)
            return {row[0]: row[1] for row in connection.execute(query)}
