"""The registry's store: SQLite through SQLAlchemy, one transaction per change.

Every change is one transaction that writes the rows, appends one audit row and thereby sets the new revision; a crash leaves
either all of it or nothing. Several processes may share the file: writers queue on SQLite's lock, readers never wait.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from guards.catalogue import BUILT, CALIBRATIONS, TRAINED
from guards.forget_set import ForgetSet
from guards.policy import BUILT_IN, DEFAULT, Policy
from guards.steering.declaration import Method, calibration_of
from serve.registry import tables
from serve.registry.plans import enforcing, judging
from serve.registry.reader import RegistryReader
from serve.registry.records import STRIPPED, Artifact, InUse, NameTaken, NotReady, StoredSet, UnknownName, now
from serve.registry.rows import append, audited, experiments_of, policies_of, put_artifact, revision_of, stored_set, summary_of
from serve.registry.snapshot import KeyScope, Limits, digest_secret


class Registry(RegistryReader):
    """Reads and changes. Every change returns the new revision, and raises RolledBack where the file holds an older history."""

    def create_set(self, content: ForgetSet, artifacts: Sequence[Artifact] = (), *, actor: str) -> int:
        """Store a set together with the artifacts that are about to be built. Raises NameTaken."""
        with self.changing() as connection:
            if connection.scalar(sa.select(tables.forget_sets.c.name).where(tables.forget_sets.c.name == content.name)):
                raise NameTaken(f"forget set {content.name!r} exists; use PUT (`--replace`) or another name")
            at = now()
            header = summary_of(content)
            values = {"header": header, "content": content.model_dump_json(), "created_at": at, "updated_at": at}
            connection.execute(tables.forget_sets.insert().values(name=content.name, **values))
            for artifact in artifacts:
                put_artifact(connection, content.name, artifact)
            return append(connection, actor, "forget_set.create", content.name, audited(header))

    def replace_set(self, content: ForgetSet, artifacts: Sequence[Artifact], *, actor: str) -> int:
        """Replace a set together with its artifacts, so that an enabled set stays enforced. Raises UnknownName.

        What was trained for it stays: it takes minutes to make again. Its detail then says that it was trained on earlier content.
        """
        with self.changing() as connection:
            stored = stored_set(connection, content.name)
            note = "; trained on earlier content"
            trained = [each for each in stored.artifacts if each.kind in TRAINED]
            artifacts = [*artifacts, *(replace(each, detail=each.detail.removesuffix(note) + note) for each in trained)]
            artifacts = [*artifacts, *(each for each in stored.artifacts if each.kind in CALIBRATIONS)]
            values = {"header": summary_of(content), "content": content.model_dump_json(), "updated_at": now()}
            connection.execute(tables.forget_sets.update().where(tables.forget_sets.c.name == content.name).values(values))
            connection.execute(tables.artifacts.delete().where(tables.artifacts.c.set_name == content.name))
            for artifact in artifacts:
                put_artifact(connection, content.name, artifact)
            return append(connection, actor, "forget_set.replace", content.name, audited(summary_of(content)))

    def strip_set(self, name: str, *, actor: str) -> int:
        """Drop a set's texts for good and keep what was made from them. A stripped set stays as it is.

        Raises:
            UnknownName: there is no such set.
            NotReady: something that its texts are needed for is not ready.
        """
        with self.changing() as connection:
            stored = stored_set(connection, name)
            if stored.stripped:
                return revision_of(connection)
            unready = [artifact.kind for artifact in stored.artifacts if artifact.status != "ready"]
            if unready or stored.artifact("similarity") is None:
                raise NotReady(
                    f"forget set {name!r} is not embedded, or its {', '.join(unready) or 'similarity'} is not ready; wait"
                )
            header = {**stored.header, "description": "", "stripped_at": now()}
            row = tables.forget_sets.c.name == name
            connection.execute(tables.forget_sets.update().where(row).values(content=STRIPPED, header=header))
            return append(connection, actor, "forget_set.strip", name, {})

    def forget_deleted_pages(self) -> None:
        """Move the write-ahead log into the file and empty it: what was deleted is then nowhere on disk (see ``secure_delete``)."""
        with self._engine.connect() as connection:
            connection.connection.dbapi_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # type: ignore[union-attr]

    def delete_set(self, name: str, *, actor: str) -> int:
        """Raises UnknownName."""
        with self.changing() as connection:
            stored = stored_set(connection, name)
            connection.execute(tables.forget_sets.delete().where(tables.forget_sets.c.name == name))
            return append(connection, actor, "forget_set.delete", name, audited(stored.header))

    def enable(self, name: str, *, actor: str) -> int:
        """Put a set in force. Enabling an enabled set changes nothing and returns the current revision.

        Raises:
            UnknownName: there is no such set.
            NotReady: it has expired, no policy would enforce it, or something that would is building or failed.
        """
        with self.changing() as connection:
            stored = stored_set(connection, name)
            if stored.enabled:
                return revision_of(connection)
            if stored.expired:
                raise NotReady(f"forget set {name!r} expired at {stored.header['expires_at']}; replace it with a later expires_at")
            policies = policies_of(connection).values()
            enforced_by = enforcing(policies, stored.made)
            judged = judging(policies, name)
            if judged and enforced_by and "similarity" not in stored.made.artifacts:
                raise NotReady(
                    f"the similarity of forget set {name!r} is {_state(stored.artifact('similarity'))}, and {', '.join(judged)} "
                    "would judge by it, so that all their requests would be refused; wait for status 'ready', or PUT the set again"
                )
            for kind in BUILT:
                artifact = stored.artifact(kind)
                missing = artifact is None and kind == "phrases" and stored.header["phrases"]
                if missing or (artifact is not None and artifact.status != "ready"):
                    state = _state(artifact)
                    raise NotReady(f"the {kind} of forget set {name!r} are {state}; wait for status 'ready', or PUT the set again")
            if not enforced_by:
                raise NotReady(
                    f"no policy would enforce forget set {name!r} as it is: add phrases, train it (`lethe train {name}`), "
                    "or put a policy that steers by what it has, that refuses by its gate or has a stream filter (the set's "
                    "similarity must be 'ready' for the last two); `lethe policy list` shows the policies"
                )
            connection.execute(tables.forget_sets.update().where(tables.forget_sets.c.name == name).values(enabled_at=now()))
            return append(connection, actor, "forget_set.enable", name, _enforced_by(stored))

    def disable(self, name: str, *, actor: str, only_if_expired: bool = False) -> int:
        """Take a set out of force; a no-op for a disabled one. Raises UnknownName."""
        with self.changing() as connection:
            stored = stored_set(connection, name)
            if not stored.enabled or (only_if_expired and not stored.expired):
                return revision_of(connection)
            connection.execute(tables.forget_sets.update().where(tables.forget_sets.c.name == name).values(enabled_at=None))
            reason = f"expired at {stored.header['expires_at']}" if only_if_expired else ""
            return append(connection, actor, "forget_set.disable", name, {"reason": reason} if reason else {})

    def put_trained(self, name: str, content_fingerprint: str, artifact: Artifact, *, actor: str) -> int:
        """Give a set what was trained for it, in place of any earlier one of its kind. An enabled set has it in force at once.

        Raises:
            UnknownName: the set is gone.
            NotReady: the set has changed since training began.
        """
        with self.changing() as connection:
            stored = stored_set(connection, name)
            if stored.header["fingerprint"] != content_fingerprint:
                raise NotReady(f"forget set {name!r} was replaced while its {artifact.kind} was trained; train it again")
            put_artifact(connection, name, artifact)
            return append(connection, actor, f"forget_set.{artifact.kind}", name, {artifact.kind: artifact.fingerprint})

    def put_calibration(
        self,
        name: str,
        strength: float,
        evidence: dict[str, Any],
        *,
        actor: str,
        corrupt: str | None = None,
        steering: Method | None = None,
        plausibility: float | None = None,
        measured: str | None = None,
    ) -> int:
        """Store the strength that suits a set, with the evidence for it.

        Args:
            corrupt, steering: the kind of corruption, or the method of steering, whose strength it is; without either: contrast.
            plausibility: contrast's, too, where it suits the set; None for the usual one.
            measured: fingerprint of what was measured: the assistant, the vectors (corruption) or the method's artifact; None for
                that of now.

        Raises:
            UnknownName: there is no such set.
            NotReady: it has no such artifact, or another than was measured.
        """
        what = steering or ("assistant" if corrupt is None else "similarity")
        with self.changing() as connection:
            stored = stored_set(connection, name)
            artifact = stored.artifact(what)
            if artifact is None:
                train = f"train one with `lethe train {name}{f' --method {steering}' if steering else ''}`"
                how = train if corrupt is None else "it needs questions, texts or aliases"
                raise NotReady(f"forget set {name!r} has no {what} to calibrate; {how}")
            if measured not in (None, artifact.fingerprint):
                raise NotReady(f"forget set {name!r} got another {what} while this one was measured; calibrate again")
            kind = "corruption" if corrupt else calibration_of(steering) if steering else "calibration"
            of = {"strength": strength} | ({"plausibility": plausibility} if what == "assistant" else {})
            detail = {**evidence, **of}
            if corrupt is not None:  # one for each kind, as long as the vectors are the same
                earlier = stored.artifact(kind)
                others = json.loads(earlier.detail) if earlier and earlier.fingerprint == artifact.fingerprint else {}
                detail = {**others, corrupt: detail}
            put_artifact(connection, name, Artifact(kind, artifact.fingerprint, "ready", json.dumps(detail), now()))
            kept = {**of, what: artifact.fingerprint} | ({} if corrupt is None else {"kind": corrupt})
            return append(connection, actor, "forget_set.calibrate", name, kept)

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
            artifact = stored_set(connection, name).artifact("similarity")
            if artifact is None or artifact.fingerprint != vectors:
                raise NotReady(f"forget set {name!r} was replaced while its gate was calibrated; calibrate again")
            put_artifact(connection, name, Artifact("gate", vectors, "ready", json.dumps(fitted), now()))
            kept = {key: fitted[key] for key in ("threshold", "stream_threshold", "epsilon", "delta", "positives", "negatives")}
            return append(connection, actor, "forget_set.gate", name, kept)

    def record_artifact(self, name: str, content_fingerprint: str, artifact: Artifact) -> bool:
        """Note the state of an artifact. Returns False, and notes nothing, if the set is gone or has changed meanwhile."""
        with self.changing() as connection:
            try:
                stored = stored_set(connection, name)
            except UnknownName:
                return False
            if stored.header["fingerprint"] != content_fingerprint:
                return False
            put_artifact(connection, name, artifact)
            return True

    def put_policy(self, policy: Policy, *, actor: str) -> int:
        """Create or replace a policy. Raises UnknownName if it names a set that does not exist."""
        with self.changing() as connection:
            if policy.forget_sets != "enabled":
                for name in policy.forget_sets:
                    stored_set(connection, name)
            connection.execute(tables.policies.delete().where(tables.policies.c.name == policy.name))
            connection.execute(tables.policies.insert().values(name=policy.name, content=policy.model_dump_json()))
            return append(connection, actor, "policy.put", policy.name, policy.model_dump(mode="json"))

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
            return append(connection, actor, "policy.reset" if name == DEFAULT else "policy.delete", name, {})

    def create_key(self, scope: KeyScope, label: str, *, actor: str, limits: Limits | None = None) -> tuple[str, str]:
        """Make a key. Returns its id and its secret; the secret is not stored and cannot be shown again."""
        secret = f"lethe-{secrets.token_urlsafe(32)}"
        key_id = f"key-{secrets.token_hex(4)}"
        limited = {name: value for name, value in asdict(limits or Limits()).items() if value != getattr(Limits(), name)}
        values = {"id": key_id, "digest": digest_secret(secret), "scope": scope, "label": label, "limits": limited}
        with self.changing() as connection:
            connection.execute(tables.keys.insert().values(**values, created_at=now()))
            append(connection, actor, "key.create", key_id, {"scope": scope, "label": label, **limited})
        return key_id, secret

    def revoke_key(self, key_id: str, *, actor: str) -> int:
        """Raises UnknownName."""
        with self.changing() as connection:
            if not connection.execute(tables.keys.delete().where(tables.keys.c.id == key_id)).rowcount:
                raise UnknownName(f"there is no key {key_id!r}; `lethe key list` shows them")
            return append(connection, actor, "key.revoke", key_id, {})


def _state(artifact: Artifact | None) -> str:
    return "not built" if artifact is None else f"{artifact.status} {artifact.detail}".strip()


def _enforced_by(stored: StoredSet) -> dict[str, Any]:
    return {artifact.kind: artifact.fingerprint for artifact in stored.artifacts}
