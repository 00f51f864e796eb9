"""What the registry holds, and what can be wrong with a change to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from guards.catalogue import CALIBRATIONS, guard_of
from guards.kinds import SetArtifacts
from serve.registry.snapshot import KeyScope, Limits

STRIPPED = ""
"""The stored content of a set whose texts were dropped."""
ArtifactStatus = Literal["building", "ready", "failed"]


class RegistryError(Exception):
    """A change that cannot be made. Nothing was written."""

    status: ClassVar[int] = 409  # of the HTTP answer


class UnknownName(RegistryError):
    """There is no such forget set, policy or key."""

    status = 404


class NameTaken(RegistryError):
    """A forget set of that name exists."""


class InUse(RegistryError):
    """Something that runs needs it."""


class Stripped(RegistryError):
    """The set's texts are gone, as somebody asked."""


class NotReady(RegistryError):
    """The set cannot be enabled: something that would enforce it is missing."""


class RolledBack(RegistryError):
    """The registry holds another history than before: somebody put an older copy in its place."""

    status = 503


class UnreadablePolicy(RegistryError):
    """A stored policy cannot be read by this release, or without a guard that was uninstalled."""

    status = 503


@dataclass(frozen=True, slots=True)
class Artifact:
    """One thing made from a forget set.

    What was measured (`guards.catalogue.CALIBRATIONS`) is no file: it has the fingerprint of the artifact that it holds for, and
    its detail is JSON.
    """

    kind: str  # as a guard declares it, or one of `guards.catalogue.CALIBRATIONS`
    fingerprint: str
    status: ArtifactStatus
    detail: str  # why it failed, or figures about it
    updated_at: str


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A forget set as the registry holds it, without its entries, which may be many: see `store.Registry.content`."""

    name: str
    header: dict[str, Any]  # the set without its entries, and how many of each kind there are
    enabled_at: str | None  # since when it is in force; None while disabled
    created_at: str
    updated_at: str
    artifacts: tuple[Artifact, ...]

    @property
    def enabled(self) -> bool:
        return self.enabled_at is not None

    @property
    def stripped(self) -> bool:
        """Whether its texts were dropped."""
        return bool(self.header.get("stripped_at"))

    @property
    def expired(self) -> bool:
        """Whether its ``expires_at`` has passed."""
        expires_at = self.header["expires_at"]
        return expires_at is not None and datetime.fromisoformat(expires_at) <= datetime.now(UTC)

    def artifact(self, kind: str) -> Artifact | None:
        return next((artifact for artifact in self.artifacts if artifact.kind == kind), None)

    @property
    def made(self) -> SetArtifacts:
        """What guards can act by.

        Also what the engine needs and is not ready: a plan that names it closes its rows. Vectors that are not ready count as
        missing, which closes requests where anything would be judged by them.
        """
        usable = {}
        for each in self.artifacts:
            guard = guard_of(each.kind)
            if guard is not None and (each.status == "ready" or guard.entry is not None):
                usable[each.kind] = each.fingerprint
        measured = {
            each.kind: json.loads(each.detail)
            for each in self.artifacts
            if each.kind in CALIBRATIONS and each.fingerprint in usable.values()
        }
        return SetArtifacts(self.name, usable, measured)


@dataclass(frozen=True, slots=True)
class StoredKey:
    id: str
    scope: KeyScope
    label: str
    created_at: str
    limits: Limits


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
