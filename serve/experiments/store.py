"""Experiments in the registry: who changed what live traffic is answered with, and when, is audited like everything else.

What was observed is not here: see `serve.experiments.measurements`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import sqlalchemy as sa

from guards.errors import InvalidPolicy
from serve.experiment import Experiment, ExperimentOrder, InvalidExperiment, check_weights, free_slice
from serve.registry import tables
from serve.registry.records import InUse, NameTaken, UnknownName, now
from serve.registry.rows import append, experiments_of, policies_of, revision_of
from serve.registry.store import Registry

MOST_CHANGES = 10_000
"""Of the audit trail, that are looked through for one experiment."""


class Experiments:
    """Reads and changes, like `Registry`, and in the same transactions. Blocking."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def all(self) -> list[Experiment]:
        with self._registry.reading() as connection:
            return experiments_of(connection, running=False)

    def get(self, name: str) -> Experiment:
        """Raises UnknownName."""
        with self._registry.reading() as connection:
            return self._get(connection, name)

    def create(self, order: ExperimentOrder, *, actor: str) -> Experiment:
        """Begin an experiment.

        Raises:
            NameTaken: there is or was one of that name.
            InvalidPolicy: an arm names a policy that does not exist.
            InUse: the units that it needs take part in others.
        """
        with self._registry.changing() as connection:
            others = experiments_of(connection, running=False)
            if order.name in {each.name for each in others}:
                raise NameTaken(f"experiment {order.name!r} exists; its figures would be mixed up: take another name, or delete it")
            running = [each for each in others if each.stopped_at is None]
            policies = policies_of(connection)
            for arm in order.arms:
                if arm.policy not in policies:
                    raise InvalidPolicy(f"there is no policy {arm.policy!r}; there are {', '.join(sorted(policies))}")
            other = next((each for each in running if _unit(each.order) != _unit(order)), None)
            if other is not None:
                wanted, runs = _unit(order), _unit(other.order)
                raise InUse(f"unit is {wanted!r}, but {other.name} runs with {runs!r}: one kind at a time; stop that first")
            start = free_slice([(each.start, each.order.share) for each in running], order.share)
            if start is None:
                taken = ", ".join(f"{each.name} {each.order.share:.0%}" for each in running)
                raise InUse(f"share {order.share:g} of all units is not free ({taken}); ask for less, or stop one")
            experiment = Experiment(
                id=secrets.token_hex(8),
                order=order,
                salt=order.salt or secrets.token_hex(16),
                start=start,
                epochs=({arm.name: arm.weight for arm in order.arms},),
                revision=revision_of(connection) + 1,
                created_at=now(),
            )
            values = {"name": order.name, "content": experiment.model_dump_json()}
            connection.execute(tables.experiments.insert().values(values))
            append(connection, actor, "experiment.create", order.name, order.model_dump(mode="json"))
            return experiment

    def reweigh(self, name: str, weights: Mapping[str, float], *, actor: str) -> Experiment:
        """Change arms' weights, from a new epoch on.

        Raises:
            UnknownName, InUse: it is not there, or has stopped.
            InvalidExperiment: an unknown arm, or weights that are none.
        """
        with self._registry.changing() as connection:
            experiment = self._get(connection, name)
            self._require_running(experiment)
            for arm in weights:
                experiment.arm(arm)
            changed = {**experiment.weights, **weights}
            try:
                check_weights(changed)
            except ValueError as error:
                raise InvalidExperiment(str(error)) from None
            if changed == experiment.weights:
                return experiment
            experiment = experiment.model_copy(update={"epochs": (*experiment.epochs, changed)})
            self._put(connection, experiment)
            append(connection, actor, "experiment.reweigh", name, changed)
            return experiment

    def stop(self, name: str, *, actor: str) -> Experiment:
        """End an experiment; its figures stay. Stopping one that has stopped changes nothing. Raises UnknownName."""
        with self._registry.changing() as connection:
            experiment = self._get(connection, name)
            if experiment.stopped_at is None:
                experiment = experiment.model_copy(update={"stopped_at": now()})
                self._put(connection, experiment)
                append(connection, actor, "experiment.stop", name, {})
            return experiment

    def delete(self, name: str, *, actor: str) -> int:
        """Delete an experiment that has stopped. Returns the revision. Raises UnknownName, InUse."""
        with self._registry.changing() as connection:
            if self._get(connection, name).stopped_at is None:
                raise InUse(f"experiment {name!r} runs; stop it first")
            connection.execute(tables.experiments.delete().where(tables.experiments.c.name == name))
            return append(connection, actor, "experiment.delete", name, {})

    def changes_since(self, experiment: Experiment) -> list[str]:
        """What was done since an experiment began that changes how its arms answer or are judged, as "action subject"."""
        until = experiment.stopped_at or now()
        rows = self._registry.audit(after=experiment.revision, limit=MOST_CHANGES)
        found = [
            f"{row.action} {row.subject}" for row in rows if row.at <= until and row.action.startswith(("forget_set.", "policy."))
        ]
        return list(dict.fromkeys(found))

    @staticmethod
    def _require_running(experiment: Experiment) -> None:
        if experiment.stopped_at is not None:
            raise InUse(f"experiment {experiment.name!r} stopped at {experiment.stopped_at}; begin another one")

    @staticmethod
    def _get(connection: sa.Connection, name: str) -> Experiment:
        content = connection.scalar(sa.select(tables.experiments.c.content).where(tables.experiments.c.name == name))
        if content is None:
            raise UnknownName(f"there is no experiment {name!r}; `lethe experiment list` shows them")
        return Experiment.model_validate_json(content)

    @staticmethod
    def _put(connection: sa.Connection, experiment: Experiment) -> None:
        row = tables.experiments.c.name == experiment.name
        connection.execute(tables.experiments.update().where(row).values(content=experiment.model_dump_json()))


def _unit(order: ExperimentOrder) -> str:
    """What kind of unit keeps its arm, with the header that names it."""
    return f"header {order.header.lower()}" if order.unit == "header" else order.unit
