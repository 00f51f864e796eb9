"""The registry's store: SQLite through SQLAlchemy, one transaction per change.

Every change is one transaction that writes the rows, appends one audit row and thereby sets the new revision; a crash leaves
either all of it or nothing. Several processes may share the file: writers queue on SQLite's lock, readers never wait.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from guards.catalogue import CALIBRATIONS, TRAINED
from guards.forget_set import ForgetSet, describe_validation
from guards.kinds import SetArtifacts
from guards.policy import BUILT_IN, DEFAULT, Policy
from serve.experiment import Experiment
from serve.registry import tables
from serve.registry.audit import GENESIS, AuditRow, first_broken, seal
from serve.registry.models import (
    STRIPPED,
    Artifact,
    InUse,
    NameTaken,
    NotReady,
    RegistryError,
    RolledBack,
    StoredKey,
    StoredSet,
    Stripped,
    UnknownName,
    UnreadablePolicy,
    now,
)
from serve.registry.plans import enforcing, judging
from serve.registry.position import Mark, Position
from serve.registry.snapshot import Key, KeyScope, Limits, Snapshot, digest_secret
from serve.sqlite import READING, StorageFault, open_database


class Registry:
    """Reads and changes. Blocking: call it from a thread when an event loop is running.

    Args:
        path: the database file; made with its directory if absent.

    Every method raises StorageFault where the file cannot be used, and those that change something, and `snapshot`, raise
    RolledBack where it holds an older history than before.

    Raises:
        RegistryError: the file was written by a newer release.
        StorageFault: see `open_database`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = Mark(path)
        self._seen = self._mark.read()  # as far as the history has come
        self._engine = open_database(path)
        with self._engine.begin() as connection:
            tables.metadata.create_all(connection)
            version = connection.scalar(sa.select(tables.schema.c.version))
            if version is None:
                connection.execute(tables.schema.insert().values(version=tables.SCHEMA))
            elif version > tables.SCHEMA:
                raise RegistryError(f"{path} has schema {version}, this release reads up to {tables.SCHEMA}; upgrade lethe")
            elif version < tables.SCHEMA:
                _upgrade(connection)

    def close(self) -> None:
        self._engine.dispose()

    # Reading

    def revision(self) -> int:
        """The revision in force: the number of changes so far."""
        with self.reading() as connection:
            return self.revision_of(connection)

    def position(self) -> Position:
        """The end of the history as the file has it now."""
        with self.reading() as connection:
            return self._position_of(connection)

    def forget_sets(self) -> list[StoredSet]:
        with self.reading() as connection:
            return self.stored_sets(connection)

    def forget_set(self, name: str) -> StoredSet:
        """Raises UnknownName."""
        with self.reading() as connection:
            return self._stored_set(connection, name)

    def content(self, name: str) -> ForgetSet:
        """Everything in a forget set. Raises UnknownName."""
        with self.reading() as connection:
            content = connection.scalar(sa.select(tables.forget_sets.c.content).where(tables.forget_sets.c.name == name))
            if content is None:
                raise _unknown_set(name)
            if content == STRIPPED:
                raise Stripped(
                    f"the texts of forget set {name!r} were dropped, only what was made from them is kept; PUT the set to change it"
                )
            return ForgetSet.model_validate_json(content)

    def stored_keys(self) -> list[StoredKey]:
        with self.reading() as connection:
            rows = connection.execute(sa.select(tables.keys).order_by(tables.keys.c.created_at)).mappings()
            return [StoredKey(row["id"], row["scope"], row["label"], row["created_at"], _limits(row)) for row in rows]

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
            position = self._position_of(connection)
            keys = connection.execute(sa.select(tables.keys)).mappings()
            self._note(position)
            return Snapshot(
                revision=position.revision,
                head=position.head,
                sets={stored.name: stored.made for stored in self.stored_sets(connection) if stored.enabled},
                policies=self.policies_of(connection),
                keys=tuple(Key(row["id"], row["digest"], row["scope"], _limits(row)) for row in keys),
                experiments=tuple(experiments_of(connection)),
            )

    # Changing. Each returns the new revision.

    def create_set(self, content: ForgetSet, artifacts: Sequence[Artifact] = (), *, actor: str) -> int:
        """Store a set together with the artifacts that are about to be built. Raises NameTaken."""
        with self.changing() as connection:
            if connection.scalar(sa.select(tables.forget_sets.c.name).where(tables.forget_sets.c.name == content.name)):
                raise NameTaken(f"forget set {content.name!r} exists; use PUT (`--replace`) or another name")
            at = now()
            header = _summary(content)
            values = {"header": header, "content": content.model_dump_json(), "created_at": at, "updated_at": at}
            connection.execute(tables.forget_sets.insert().values(name=content.name, **values))
            for artifact in artifacts:
                self._put_artifact(connection, content.name, artifact)
            return self.append(connection, actor, "forget_set.create", content.name, _audited(header))

    def replace_set(self, content: ForgetSet, artifacts: Sequence[Artifact], *, actor: str) -> int:
        """Replace a set together with its artifacts, so that an enabled set stays enforced. Raises UnknownName.

        What was trained for it stays: it takes minutes to make again. It says that it knows the content before.
        """
        with self.changing() as connection:
            stored = self._stored_set(connection, content.name)
            note = "; trained on earlier content"
            trained = [each for each in stored.artifacts if each.kind in TRAINED]
            artifacts = [*artifacts, *(replace(each, detail=each.detail.removesuffix(note) + note) for each in trained)]
            artifacts = [*artifacts, *(each for each in stored.artifacts if each.kind in CALIBRATIONS)]
            values = {"header": _summary(content), "content": content.model_dump_json(), "updated_at": now()}
            connection.execute(tables.forget_sets.update().where(tables.forget_sets.c.name == content.name).values(values))
            connection.execute(tables.artifacts.delete().where(tables.artifacts.c.set_name == content.name))
            for artifact in artifacts:
                self._put_artifact(connection, content.name, artifact)
            return self.append(connection, actor, "forget_set.replace", content.name, _audited(_summary(content)))

    def strip_set(self, name: str, *, actor: str) -> int:
        """Drop a set's texts for good and keep what was made from them. A stripped set stays as it is.

        Raises:
            UnknownName: there is no such set.
            NotReady: something that its texts are needed for is not ready.
        """
        with self.changing() as connection:
            stored = self._stored_set(connection, name)
            if stored.stripped:
                return self.revision_of(connection)
            unready = [artifact.kind for artifact in stored.artifacts if artifact.status != "ready"]
            if unready or stored.artifact("similarity") is None:
                raise NotReady(
                    f"forget set {name!r} is not embedded, or its {', '.join(unready) or 'similarity'} is not ready; wait"
                )
            header = {**stored.header, "description": "", "stripped_at": now()}
            row = tables.forget_sets.c.name == name
            connection.execute(tables.forget_sets.update().where(row).values(content=STRIPPED, header=header))
            return self.append(connection, actor, "forget_set.strip", name, {})

    def forget_deleted_pages(self) -> None:
        """Move the write-ahead log into the file and empty it: what was deleted is then nowhere on disk (see ``secure_delete``)."""
        with self._engine.connect() as connection:
            connection.connection.dbapi_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # type: ignore[union-attr]

    def delete_set(self, name: str, *, actor: str) -> int:
        """Raises UnknownName."""
        with self.changing() as connection:
            stored = self._stored_set(connection, name)
            connection.execute(tables.forget_sets.delete().where(tables.forget_sets.c.name == name))
            return self.append(connection, actor, "forget_set.delete", name, _audited(stored.header))

    def enable(self, name: str, *, actor: str) -> int:
        """Put a set in force. Enabling an enabled set changes nothing and returns the current revision.

        Raises:
            UnknownName: there is no such set.
            NotReady: it has expired, no policy would enforce it, or something that would is building or failed.
        """
        with self.changing() as connection:
            stored = self._stored_set(connection, name)
            if stored.enabled:
                return self.revision_of(connection)
            if stored.expired:
                raise NotReady(f"forget set {name!r} expired at {stored.header['expires_at']}; replace it with a later expires_at")
            policies = self.policies_of(connection).values()
            enforced_by = enforcing(policies, stored.made)
            judged = judging(policies, name)
            if judged and enforced_by and "similarity" not in stored.made.artifacts:
                raise NotReady(
                    f"the similarity of forget set {name!r} is {_state(stored.artifact('similarity'))}, and {', '.join(judged)} "
                    "would judge by it, so that all their requests would be refused; wait for status 'ready', or PUT the set again"
                )
            phrases = stored.artifact("phrases")
            if stored.header["phrases"] and (phrases is None or phrases.status != "ready"):
                state = _state(phrases)
                raise NotReady(f"the phrases of forget set {name!r} are {state}; wait for status 'ready', or PUT the set again")
            if not enforced_by:
                raise NotReady(
                    f"no policy would enforce forget set {name!r} as it is: add phrases, train it (`lethe train {name}`), "
                    "or put a policy that steers by what it has, that refuses by its gate or has a stream filter (the set's "
                    "similarity must be 'ready' for the last two); `lethe policy list` shows the policies"
                )
            connection.execute(tables.forget_sets.update().where(tables.forget_sets.c.name == name).values(enabled_at=now()))
            return self.append(connection, actor, "forget_set.enable", name, _enforced_by(stored))

    def disable(self, name: str, *, actor: str, only_if_expired: bool = False) -> int:
        """Take a set out of force; a no-op for a disabled one. Raises UnknownName."""
        with self.changing() as connection:
            stored = self._stored_set(connection, name)
            if not stored.enabled or (only_if_expired and not stored.expired):
                return self.revision_of(connection)
            connection.execute(tables.forget_sets.update().where(tables.forget_sets.c.name == name).values(enabled_at=None))
            reason = f"expired at {stored.header['expires_at']}" if only_if_expired else ""
            return self.append(connection, actor, "forget_set.disable", name, {"reason": reason} if reason else {})

    def put_trained(self, name: str, content_fingerprint: str, artifact: Artifact, *, actor: str) -> int:
        """Give a set what was trained for it, in place of any earlier one of its kind. An enabled set has it in force at once.

        Raises:
            UnknownName: the set is gone.
            NotReady: the set has changed since training began.
        """
        with self.changing() as connection:
            stored = self._stored_set(connection, name)
            if stored.header["fingerprint"] != content_fingerprint:
                raise NotReady(f"forget set {name!r} was replaced while its {artifact.kind} was trained; train it again")
            self._put_artifact(connection, name, artifact)
            return self.append(connection, actor, f"forget_set.{artifact.kind}", name, {artifact.kind: artifact.fingerprint})

    def put_calibration(
        self,
        name: str,
        strength: float,
        evidence: dict[str, Any],
        *,
        actor: str,
        corrupt: str | None = None,
        measured: str | None = None,
    ) -> int:
        """Store the strength that suits a set, with the evidence for it.

        Args:
            corrupt: the kind of corruption whose strength it is; None for contrast.
            measured: fingerprint of the assistant, or for corruption of the vectors, that was measured; None for those of now.

        Raises:
            UnknownName: there is no such set.
            NotReady: it has no assistant (no vectors), or others than were measured.
        """
        what = "assistant" if corrupt is None else "similarity"
        with self.changing() as connection:
            stored = self._stored_set(connection, name)
            artifact = stored.artifact(what)
            if artifact is None:
                how = f"train one with `lethe train {name}`" if corrupt is None else "it needs questions, texts or aliases"
                raise NotReady(f"forget set {name!r} has no {what} to calibrate; {how}")
            if measured not in (None, artifact.fingerprint):
                raise NotReady(f"forget set {name!r} got another {what} while this one was measured; calibrate again")
            kind = "calibration" if corrupt is None else "corruption"
            detail = {**evidence, "strength": strength}
            if corrupt is not None:  # one for each kind, as long as the vectors are the same
                earlier = stored.artifact(kind)
                others = json.loads(earlier.detail) if earlier and earlier.fingerprint == artifact.fingerprint else {}
                detail = {**others, corrupt: detail}
            self._put_artifact(connection, name, Artifact(kind, artifact.fingerprint, "ready", json.dumps(detail), now()))
            kept = {"strength": strength, what: artifact.fingerprint} | ({} if corrupt is None else {"kind": corrupt})
            return self.append(connection, actor, "forget_set.calibrate", name, kept)

    def put_gate(self, name: str, vectors: str, fitted: dict[str, Any], *, actor: str) -> int:
        """Store the thresholds of a set's gate, with the evidence for them.

        Args:
            vectors: the similarity artifact that was measured.
            fitted: has ``threshold`` and ``stream_threshold``.

        Raises:
            UnknownName: there is no such set.
            NotReady: it has other vectors by now.
        """
        with self.changing() as connection:
            artifact = self._stored_set(connection, name).artifact("similarity")
            if artifact is None or artifact.fingerprint != vectors:
                raise NotReady(f"forget set {name!r} was replaced while its gate was calibrated; calibrate again")
            self._put_artifact(connection, name, Artifact("gate", vectors, "ready", json.dumps(fitted), now()))
            kept = {key: fitted[key] for key in ("threshold", "stream_threshold", "epsilon", "delta", "positives", "negatives")}
            return self.append(connection, actor, "forget_set.gate", name, kept)

    def record_artifact(self, name: str, content_fingerprint: str, artifact: Artifact) -> bool:
        """Note the state of an artifact. Returns False, and notes nothing, if the set is gone or has changed meanwhile."""
        with self.changing() as connection:
            try:
                stored = self._stored_set(connection, name)
            except UnknownName:
                return False
            if stored.header["fingerprint"] != content_fingerprint:
                return False
            self._put_artifact(connection, name, artifact)
            return True

    def put_policy(self, policy: Policy, *, actor: str) -> int:
        """Create or replace a policy. Raises UnknownName if it names a set that does not exist."""
        with self.changing() as connection:
            if policy.forget_sets != "enabled":
                for name in policy.forget_sets:
                    self._stored_set(connection, name)
            connection.execute(tables.policies.delete().where(tables.policies.c.name == policy.name))
            connection.execute(tables.policies.insert().values(name=policy.name, content=policy.model_dump_json()))
            return self.append(connection, actor, "policy.put", policy.name, policy.model_dump(mode="json"))

    def delete_policy(self, name: str, *, actor: str) -> int:
        """Delete a policy; for the default policy, return to its built-in form. Raises UnknownName, InUse."""
        with self.changing() as connection:
            for experiment in experiments_of(connection):
                if name != DEFAULT and any(arm.policy == name for arm in experiment.order.arms):
                    raise InUse(f"policy {name!r} answers in experiment {experiment.name!r}; stop that first")
            deleted = connection.execute(tables.policies.delete().where(tables.policies.c.name == name)).rowcount
            if not deleted:
                hint = "it is built in" if name in BUILT_IN else "see GET /lethe/v1/policies"
                raise UnknownName(f"there is no policy {name!r} to delete; {hint}")
            return self.append(connection, actor, "policy.reset" if name == DEFAULT else "policy.delete", name, {})

    def create_key(self, scope: KeyScope, label: str, *, actor: str, limits: Limits | None = None) -> tuple[str, str]:
        """Make a key. Returns its id and its secret; the secret is not stored and cannot be shown again."""
        secret = f"lethe-{secrets.token_urlsafe(32)}"
        key_id = f"key-{secrets.token_hex(4)}"
        limited = {name: value for name, value in asdict(limits or Limits()).items() if value != getattr(Limits(), name)}
        values = {"id": key_id, "digest": digest_secret(secret), "scope": scope, "label": label, "limits": limited}
        with self.changing() as connection:
            connection.execute(tables.keys.insert().values(**values, created_at=now()))
            self.append(connection, actor, "key.create", key_id, {"scope": scope, "label": label, **limited})
        return key_id, secret

    def revoke_key(self, key_id: str, *, actor: str) -> int:
        """Raises UnknownName."""
        with self.changing() as connection:
            if not connection.execute(tables.keys.delete().where(tables.keys.c.id == key_id)).rowcount:
                raise UnknownName(f"there is no key {key_id!r}; `lethe key list` shows them")
            return self.append(connection, actor, "key.revoke", key_id, {})

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
            position = self._position_of(connection)
        self._note(position)

    def _check_history(self, connection: sa.Connection) -> None:
        seen = self._seen
        if seen is None or seen.revision == 0:
            return
        head = connection.scalar(sa.select(tables.audit.c.hash).where(tables.audit.c.revision == seen.revision))
        if head != seen.head:
            raise RolledBack(
                f"{self._path} holds revision {self.revision_of(connection)} of another history than was in force up to "
                f"revision {seen.revision}: an older copy was put in its place, in which later removals are missing. Nothing was "
                "changed, and a running server keeps what was in force. Stop the server and put the newest copy back, or a backup "
                f"with `lethe restore FILE`; to go on with this copy as it is, delete {self._mark.path} and start again"
            )

    def _note(self, position: Position) -> None:
        if self._seen is None or position.revision > self._seen.revision:
            self._seen = position
            self._mark.write(position)

    @staticmethod
    def _position_of(connection: sa.Connection) -> Position:
        columns = (tables.audit.c.revision, tables.audit.c.hash)
        last = connection.execute(sa.select(*columns).order_by(tables.audit.c.revision.desc()).limit(1)).first()
        return Position(0, GENESIS) if last is None else Position(*last)

    def enforced(self, made: SetArtifacts) -> bool:
        """Whether some policy would do anything for a set of which this was made."""
        with self.reading() as connection:
            return bool(enforcing(self.policies_of(connection).values(), made))

    @staticmethod
    def revision_of(connection: sa.Connection) -> int:
        """The revision that a transaction sees."""
        return connection.scalar(sa.select(sa.func.coalesce(sa.func.max(tables.audit.c.revision), 0))) or 0

    def append(self, connection: sa.Connection, actor: str, action: str, subject: str, detail: dict[str, Any]) -> int:
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

    @staticmethod
    def _put_artifact(connection: sa.Connection, name: str, artifact: Artifact) -> None:
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

    @staticmethod
    def policies_of(connection: sa.Connection) -> dict[str, Policy]:
        """All policies, built in and stored."""
        stored = {}
        for name, content in connection.execute(sa.select(tables.policies.c.name, tables.policies.c.content)):
            try:
                stored[name] = Policy.model_validate_json(content)
            except ValidationError as error:
                raise UnreadablePolicy(
                    f"policy {name!r} cannot be read: {'; '.join(describe_validation(error))}; install the guard that it "
                    "names, or the release that wrote it"
                ) from None
        return BUILT_IN | stored

    @staticmethod
    def stored_sets(connection: sa.Connection, name: str | None = None) -> list[StoredSet]:
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

    @classmethod
    def _stored_set(cls, connection: sa.Connection, name: str) -> StoredSet:
        found = cls.stored_sets(connection, name)
        if not found:
            raise _unknown_set(name)
        return found[0]


def experiments_of(connection: sa.Connection, *, running: bool = True) -> list[Experiment]:
    """The experiments, in the order of their names; all of them, or those that run."""
    contents = connection.scalars(sa.select(tables.experiments.c.content).order_by(tables.experiments.c.name))
    found = map(Experiment.model_validate_json, contents)
    return [each for each in found if each.stopped_at is None or not running]


def _unknown_set(name: str) -> UnknownName:
    return UnknownName(f"there is no forget set {name!r}; `lethe forget list` shows them")


def _summary(content: ForgetSet) -> dict[str, Any]:
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


def _limits(row: sa.RowMapping) -> Limits:
    return Limits(**(row["limits"] or {}))


def _upgrade(connection: sa.Connection) -> None:
    """From schema 1: the strength of a calibration was called alpha. From schema 2: keys had no limits."""
    if "limits" not in {column["name"] for column in sa.inspect(connection).get_columns("keys")}:
        connection.execute(sa.DDL("ALTER TABLE keys ADD COLUMN limits JSON"))
    calibrations = tables.artifacts.c.kind == "calibration"
    for row in connection.execute(sa.select(tables.artifacts).where(calibrations)).mappings().all():
        detail = json.loads(row["detail"])
        if "alpha" in detail:
            detail["strength"] = detail.pop("alpha")
            same = calibrations & (tables.artifacts.c.set_name == row["set_name"])
            connection.execute(tables.artifacts.update().where(same).values(detail=json.dumps(detail)))
    connection.execute(tables.schema.update().values(version=tables.SCHEMA))


def _state(artifact: Artifact | None) -> str:
    return "not built" if artifact is None else f"{artifact.status} {artifact.detail}".strip()


def _enforced_by(stored: StoredSet) -> dict[str, Any]:
    return {artifact.kind: artifact.fingerprint for artifact in stored.artifacts}


def _audited(header: dict[str, Any]) -> dict[str, Any]:
    """What the audit keeps of a set for ever: no content and no description, which may tell what must be forgotten."""
    return {name: value for name, value in header.items() if name != "description"}
