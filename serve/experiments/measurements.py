"""What experiments observed: sums for each unit, in a database of their own, and never what anybody asked or was told.

Units are hashes; a request's id is kept for a while so that feedback finds its arm. Written in batches, each in one transaction:
a crash loses the last second and leaves nothing half counted.

Covered: a cap on units and on the requests of one; values that are not finite. Each epoch (set of weights) counts by itself. Not
covered: several servers on one state directory (there is a lock); a caller who invents units, where callers choose them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from guards.errors import GuardError
from serve.experiments.statistics import Sums
from serve.sqlite import READING, open_database

KEPT_REQUESTS = 100_000
"""Requests that feedback can still be given to."""
THUMB = "thumb"
DROPPED = "not answered in shadow: too many wait"
"""What is counted for an arm that was to answer behind a client's back, and had no room."""

BEYOND = "beyond the cap of their unit"
"""What is counted for a request of a unit that makes more than are counted."""

metadata = sa.MetaData()


def _key(name: str, kind: type[sa.types.TypeEngine[Any]] = sa.String) -> sa.Column[Any]:
    return sa.Column(name, kind, primary_key=True)


_units = sa.Table(
    "units",
    metadata,
    _key("experiment"),
    _key("epoch", sa.Integer),
    _key("unit"),
    sa.Column("arm", sa.String, nullable=False),
    sa.Column("requests", sa.Integer, nullable=False),
)
_sums = sa.Table(
    "sums",
    metadata,
    _key("experiment"),
    _key("epoch", sa.Integer),
    _key("arm"),
    _key("metric"),
    _key("paired", sa.Boolean),  # differences to the first arm's answer to the same prompt
    _key("unit"),
    sa.Column("n", sa.Float, nullable=False),
    sa.Column("total", sa.Float, nullable=False),
)
_counts = sa.Table(
    "counts",
    metadata,
    _key("experiment"),
    _key("epoch", sa.Integer),
    _key("arm"),
    _key("what"),
    sa.Column("n", sa.Integer, nullable=False),
)
_requests = sa.Table(
    "requests",
    metadata,
    _key("id"),
    sa.Column("experiment", sa.String, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("unit", sa.String, nullable=False),
    sa.Column("arm", sa.String, nullable=False),
    sa.Column("caller", sa.String, nullable=False),
    sa.Column("at", sa.String, nullable=False, index=True),
    sa.Column("thumb", sa.Float),
)


@dataclass(frozen=True)
class Measurement:
    """One thing to write down: an answer, or how two answers to one prompt differ."""

    experiment: str  # its id
    unit: str  # anonymous
    arm: str
    epoch: int
    values: Mapping[str, float] = field(default_factory=dict)  # metric -> value; of a difference, less the first arm's
    counts: Sequence[str] = ()  # things to count, such as "guard: gate refuse"
    request: str = ""  # the client's request id
    caller: str = ""
    role: Literal["shown", "later", "difference", "count"] = "shown"
    """An answer that a client saw; more about a request that was counted (also another arm's answer beside it); how another arm's
    answer differs from the first arm's; or only something to count."""
    most_requests: int = 100
    most_units: int = 100_000


@dataclass(frozen=True)
class Figures:
    """All that was observed in one epoch of an experiment."""

    sums: Mapping[tuple[str, str], Sums]  # (arm, metric)
    pairs: Mapping[tuple[str, str], Sums]  # (arm, metric) of differences
    counts: Mapping[str, Mapping[str, int]]  # arm -> what -> how often
    units: Mapping[str, int]  # arm -> units
    largest: int = 0  # requests of the unit that makes the most; no more than are counted of one


class UnknownRequest(GuardError):
    """Feedback to a request that took part in no experiment, was somebody else's, or is too long ago."""

    status = 404


class Measurements:
    """Blocking: call it from a thread when an event loop is running.

    Args:
        path: the database file; made if absent.
    """

    def __init__(self, path: Path) -> None:
        self._engine = open_database(path)
        with self._engine.begin() as connection:
            metadata.create_all(connection)

    def close(self) -> None:
        self._engine.dispose()

    def record(self, batch: Iterable[Measurement]) -> None:
        """Count a batch, all of it or nothing."""
        with self._engine.begin() as connection:
            known: dict[tuple[str, int], int] = {}  # units of an experiment's epoch so far
            for each in batch:
                self._record(connection, each, known)
            connection.execute(
                _requests.delete().where(
                    _requests.c.at
                    < sa.select(_requests.c.at).order_by(_requests.c.at.desc()).offset(KEPT_REQUESTS).limit(1).scalar_subquery()
                )
            )

    def _record(self, connection: sa.Connection, each: Measurement, known: dict[tuple[str, int], int]) -> None:
        counts = Counter(each.counts)
        if each.role == "shown":
            counted = self._admit(connection, each, known, counts)
        else:  # what stands beside an answer that was not counted is not counted either
            counted = each.role != "count" and self._was_counted(connection, each.request)
        if counted:
            for metric, value in each.values.items():
                if math.isfinite(value):
                    self._add(connection, each, metric, each.role == "difference", value)
                else:
                    counts["not a number"] += 1
        if counted and each.role == "shown" and each.request:
            named = {"id": each.request, "caller": each.caller, "at": datetime.now(UTC).isoformat()}
            place = {"experiment": each.experiment, "epoch": each.epoch, "unit": each.unit, "arm": each.arm}
            connection.execute(insert(_requests).values({**named, **place}).on_conflict_do_nothing())
        for what, n in counts.items():
            row: dict[str, Any] = {"experiment": each.experiment, "epoch": each.epoch, "arm": each.arm, "what": what}
            added = insert(_counts).values(**row, n=n)
            connection.execute(added.on_conflict_do_update(index_elements=list(row), set_={"n": _counts.c.n + n}))

    def _admit(self, connection: sa.Connection, each: Measurement, known: dict[tuple[str, int], int], counts: Counter[str]) -> bool:
        """Whether a request of this unit counts; if it does, it is one more."""
        counts["requests"] += 1
        epoch = (_units.c.experiment == each.experiment) & (_units.c.epoch == each.epoch)
        this = epoch & (_units.c.unit == each.unit)
        requests = connection.scalar(sa.select(_units.c.requests).where(this))
        if requests is None:
            key = each.experiment, each.epoch
            if key not in known:
                known[key] = connection.scalar(sa.select(sa.func.count()).where(epoch)) or 0
            if known[key] >= each.most_units:
                counts["beyond the cap on units"] += 1
                return False
            known[key] += 1
            values = {"experiment": each.experiment, "epoch": each.epoch, "unit": each.unit, "arm": each.arm, "requests": 1}
            connection.execute(_units.insert().values(values))
            return True
        if requests >= each.most_requests:
            counts[BEYOND] += 1
            return False
        connection.execute(_units.update().where(this).values(requests=requests + 1))
        return True

    @staticmethod
    def _was_counted(connection: sa.Connection, request: str) -> bool:
        return connection.scalar(sa.select(_requests.c.id).where(_requests.c.id == request)) is not None

    @staticmethod
    def _add(connection: sa.Connection, each: Measurement, metric: str, paired: bool, value: float) -> None:
        row: dict[str, Any] = {"experiment": each.experiment, "epoch": each.epoch, "arm": each.arm}
        row |= {"metric": metric, "paired": paired, "unit": each.unit}
        added = insert(_sums).values(**row, n=1.0, total=value)
        connection.execute(
            added.on_conflict_do_update(
                index_elements=list(row), set_={"n": _sums.c.n + 1.0, "total": _sums.c.total + added.excluded.total}
            )
        )

    def rate(self, request: str, thumb: float, *, caller: str) -> None:
        """Note what a client thought of an answer; a second opinion replaces the first.

        Args:
            thumb: 1 up, 0 down.

        Raises:
            UnknownRequest.
        """
        with self._engine.begin() as connection:
            row = connection.execute(sa.select(_requests).where(_requests.c.id == request)).mappings().first()
            if row is None or row["caller"] != caller:
                raise UnknownRequest(
                    f"request {request!r} is not one that feedback can be given to: it took part in no experiment, was made with "
                    "another key or is too long ago; send the x-request-id of an answer"
                )
            each = Measurement(row["experiment"], row["unit"], row["arm"], row["epoch"])
            self._add(connection, each, THUMB, False, thumb if row["thumb"] is None else thumb - row["thumb"])
            if row["thumb"] is not None:  # it was counted before
                same = (_sums.c.experiment == each.experiment) & (_sums.c.arm == each.arm) & (_sums.c.metric == THUMB)
                same &= (_sums.c.unit == each.unit) & (_sums.c.epoch == each.epoch) & _sums.c.paired.is_(False)
                connection.execute(_sums.update().where(same).values(n=_sums.c.n - 1.0))
            connection.execute(_requests.update().where(_requests.c.id == request).values(thumb=thumb))

    def figures(self, experiment: str, epoch: int) -> Figures:
        """Everything about one epoch, in one transaction, added up by the database: it holds a row for each unit and metric."""
        with self._engine.connect().execution_options(**READING) as connection, connection.begin():
            table = _sums.c
            sums = sa.select(
                table.arm,
                table.metric,
                table.paired,
                sa.func.count(),
                sa.func.sum(table.n),
                sa.func.sum(table.total),
                sa.func.sum(table.n * table.n),
                sa.func.sum(table.total * table.total),
                sa.func.sum(table.n * table.total),
            ).where((table.experiment == experiment) & (table.epoch == epoch))
            rows = connection.execute(sums.group_by(table.arm, table.metric, table.paired)).all()
            counts: dict[str, dict[str, int]] = {}
            here = (_counts.c.experiment == experiment) & (_counts.c.epoch == epoch)
            query = sa.select(_counts.c.arm, _counts.c.what, _counts.c.n).where(here)
            for arm, what, n in connection.execute(query.order_by(_counts.c.what)):
                counts.setdefault(arm, {})[what] = n
            seen = sa.select(_units.c.arm, sa.func.count()).group_by(_units.c.arm)
            here = (_units.c.experiment == experiment) & (_units.c.epoch == epoch)
            units = {row[0]: int(row[1]) for row in connection.execute(seen.where(here))}
            largest = connection.scalar(sa.select(sa.func.max(_units.c.requests)).where(here)) or 0
        plain, pairs = ({(row[0], row[1]): Sums(*row[3:]) for row in rows if bool(row[2]) is paired} for paired in (False, True))
        return Figures(plain, pairs, counts, units, largest)

    def keep_only(self, experiments: Iterable[str]) -> None:
        """Drop everything about other experiments: those that were deleted, perhaps while an answer was still under way."""
        wanted = list(experiments)
        with self._engine.begin() as connection:
            for table in (_units, _sums, _counts, _requests):
                connection.execute(table.delete().where(table.c.experiment.not_in(wanted)))
