"""Between the registry's rows and what they mean. Every function works in the caller's transaction."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from guards.forget_set import ForgetSet, describe_validation
from guards.policy import BUILT_IN, STORED, Policy
from serve.experiment import Experiment
from serve.registry import tables
from serve.registry.audit import GENESIS, AuditRow, seal
from serve.registry.position import Position
from serve.registry.records import Artifact, StoredSet, UnknownName, UnreadablePolicy, now
from serve.registry.snapshot import Limits


def position_of(connection: sa.Connection) -> Position:
    """The end of the history as a transaction sees it."""
    columns = (tables.audit.c.revision, tables.audit.c.hash)
    last = connection.execute(sa.select(*columns).order_by(tables.audit.c.revision.desc()).limit(1)).first()
    return Position(0, GENESIS) if last is None else Position(*last)


def revision_of(connection: sa.Connection) -> int:
    """The revision that a transaction sees."""
    return connection.scalar(sa.select(sa.func.coalesce(sa.func.max(tables.audit.c.revision), 0))) or 0


def append(connection: sa.Connection, actor: str, action: str, subject: str, detail: dict[str, Any]) -> int:
    """Write the audit row of a change, which makes the new revision. Returns it."""
    last = connection.execute(sa.select(tables.audit).order_by(tables.audit.c.revision.desc()).limit(1)).mappings().first()
    row = AuditRow(
        revision=(last["revision"] if last else 0) + 1,
        at=now(),
        actor=actor,
        action=action,
        subject=subject,
        detail=detail,
        previous=last["hash"] if last else GENESIS,
    )
    values = {name: getattr(row, name) for name in AuditRow.__dataclass_fields__} | {"hash": seal(row)}
    connection.execute(tables.audit.insert().values(values))
    return row.revision


def put_artifact(connection: sa.Connection, name: str, artifact: Artifact) -> None:
    """Store an artifact, in place of an earlier one of its kind."""
    same = (tables.artifacts.c.set_name == name) & (tables.artifacts.c.kind == artifact.kind)
    connection.execute(tables.artifacts.delete().where(same))
    connection.execute(
        tables.artifacts.insert().values(
            set_name=name,
            kind=artifact.kind,
            fingerprint=artifact.fingerprint,
            status=artifact.status,
            detail=artifact.detail,
            updated_at=artifact.updated_at,
        )
    )


def policies_of(connection: sa.Connection) -> dict[str, Policy]:
    """All policies, built in and stored."""
    stored = {}
    for name, content in connection.execute(sa.select(tables.policies.c.name, tables.policies.c.content)):
        try:
            stored[name] = Policy.model_validate_json(content, context=STORED)
        except ValidationError as error:
            raise UnreadablePolicy(
                f"policy {name!r} cannot be read: {'; '.join(describe_validation(error))}; install the guard that it "
                "names, or the release that wrote it"
            ) from None
    return BUILT_IN | stored


def stored_sets(connection: sa.Connection, name: str | None = None) -> list[StoredSet]:
    """All sets by name, or the one of that name."""
    columns = [column for column in tables.forget_sets.c if column.name != "content"]
    query, artifact_query = sa.select(*columns).order_by(tables.forget_sets.c.name), sa.select(tables.artifacts)
    if name is not None:
        query, artifact_query = (
            query.where(tables.forget_sets.c.name == name),
            artifact_query.where(tables.artifacts.c.set_name == name),
        )
    artifacts: dict[str, list[Artifact]] = {}
    for row in connection.execute(artifact_query).mappings():
        fields = {key: value for key, value in row.items() if key != "set_name"}
        artifacts.setdefault(row["set_name"], []).append(Artifact(**fields))
    return [StoredSet(**row, artifacts=tuple(artifacts.get(row["name"], ()))) for row in connection.execute(query).mappings()]


def stored_set(connection: sa.Connection, name: str) -> StoredSet:
    """Raises UnknownName."""
    found = stored_sets(connection, name)
    if not found:
        raise unknown_set(name)
    return found[0]


def experiments_of(connection: sa.Connection, *, running: bool = True) -> list[Experiment]:
    """The experiments, in the order of their names; all of them, or those that run."""
    contents = connection.scalars(sa.select(tables.experiments.c.content).order_by(tables.experiments.c.name))
    found = map(Experiment.model_validate_json, contents)
    return [each for each in found if each.stopped_at is None or not running]


def unknown_set(name: str) -> UnknownName:
    """The error that says so."""
    return UnknownName(f"there is no forget set {name!r}; `lethe forget list` shows them")


def summary_of(content: ForgetSet) -> dict[str, Any]:
    """What lists say of a set: fingerprint, description, sizes and paperwork."""
    return {
        "fingerprint": content.fingerprint,
        "description": content.description,
        "phrases": len(content.phrases),
        "aliases": len(content.aliases),
        "questions": len(content.questions),
        "texts": len(content.texts),
        "requester": content.requester,
        "legal_basis": content.legal_basis,
        "expires_at": content.expires_at.isoformat() if content.expires_at else None,
    }


def limits_of(row: sa.RowMapping) -> Limits:
    """How much a key may be used."""
    return Limits(**(row["limits"] or {}))


def audited(header: dict[str, Any]) -> dict[str, Any]:
    """What the audit keeps of a set for ever: no content and no description, which may tell what must be forgotten."""
    return {name: value for name, value in header.items() if name != "description"}
