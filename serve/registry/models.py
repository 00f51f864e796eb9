"""What the registry holds, and what can be wrong with a change to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from guards.policy import METHODS
from serve.registry.snapshot import Limits, Scope

STRIPPED = ""
"""The stored content of a set whose texts were dropped."""
ArtifactKind = Literal["phrases", "similarity", "assistant", "project", "steer", "adapter", "calibration", "corruption", "gate"]
ArtifactStatus = Literal["building", "ready", "failed"]
TRAINED = ("assistant", *METHODS)
"""Kinds of artifacts that are trained or fitted on order, and kept until the next order."""


class RegistryError(Exception):
    """A change that cannot be made. Nothing was written."""


class UnknownName(RegistryError):
    """There is no such forget set, policy or key."""


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


@dataclass(frozen=True, slots=True)
class Artifact:
    """One thing made from a forget set.

    A calibration (of contrast) is no file, nor is a corruption (its calibration), nor a gate: they have the fingerprint of the
    assistant, or of the vectors, that they hold for, and their detail is JSON.
    """

    kind: ArtifactKind
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


@dataclass(frozen=True, slots=True)
class StoredKey:
    id: str
    scope: Scope
    label: str
    created_at: str
    limits: Limits


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
