"""Snapshots: everything that a request needs to know of the registry, immutable, at one revision."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from guards.errors import InvalidPolicy
from guards.kinds import SetArtifacts
from guards.policy import Policy
from guards.suppression.declaration import Suppress
from guards.text_plan import TextPlan
from guards.types import ArtifactRef, Plan
from serve.clock import never_back
from serve.experiment import Experiment
from serve.registry.plans import plan_of, text_plan_of

KeyScope = Literal["chat", "compare", "admin"]
SCOPES: dict[KeyScope, frozenset[KeyScope]] = {
    "chat": frozenset({"chat"}),
    "compare": frozenset({"chat", "compare"}),
    "admin": frozenset({"chat", "compare", "admin"}),
}
"""What a key of each scope may do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much a key may be used; None = without a limit."""

    expires_at: str | None = None  # UTC, ISO 8601
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None  # of prompts and answers
    in_experiments: bool = True  # whether its requests take part


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    name: str
    scopes: frozenset[KeyScope]
    limits: Limits = Limits()

    @property
    def expired(self) -> bool:
        """Whether the key is no longer valid."""
        ends = self.limits.expires_at
        return ends is not None and datetime.fromisoformat(ends) <= never_back()


LOOPBACK = Caller("loopback", SCOPES["admin"])
"""Anyone on this machine, while no key exists."""


@dataclass(frozen=True, slots=True)
class Key:
    id: str
    digest: str  # sha256 of the secret
    scope: KeyScope
    limits: Limits = Limits()


@dataclass(frozen=True)
class Snapshot:
    """What is in force at one revision."""

    revision: int
    sets: Mapping[str, SetArtifacts]  # enabled forget set -> what was made from it
    policies: Mapping[str, Policy]
    keys: tuple[Key, ...]
    experiments: tuple[Experiment, ...] = ()  # those that run
    head: str = ""  # hash of the audit row that made the revision
    plans: Mapping[str, Plan] = field(init=False)  # policy -> plan
    text_plans: Mapping[str, TextPlan | None] = field(init=False)  # policy -> what is judged of texts; None = nothing

    def __post_init__(self) -> None:
        plans = {name: plan_of(policy, self.sets, self.revision) for name, policy in self.policies.items()}
        object.__setattr__(self, "plans", plans)
        object.__setattr__(self, "text_plans", {name: text_plan_of(policy, self.sets) for name, policy in self.policies.items()})

    @property
    def vectors(self) -> list[str]:
        """Every similarity artifact that a text plan of this snapshot may name."""
        return sorted({each for plan in self.text_plans.values() if plan is not None for each in plan.sets})

    @property
    def artifacts(self) -> list[ArtifactRef]:
        """Every artifact that a plan of this snapshot may name, for the engine."""
        return sorted({artifact for plan in self.plans.values() for artifact in plan.artifacts})

    @property
    def phrases(self) -> list[str]:
        """Those of them that are compiled phrases, which this process reads as well."""
        return sorted({name for plan in self.plans.values() for name in plan.artifacts_of(Suppress)})

    def plan(self, policy: str) -> Plan:
        """The plan for a request under this policy.

        Raises:
            InvalidPolicy: there is no such policy.
        """
        if policy not in self.plans:
            raise InvalidPolicy(f"there is no policy {policy!r}; there are {', '.join(sorted(self.plans))}")
        return self.plans[policy]

    def caller(self, secret: str | None, *, open_without_keys: bool) -> Caller | None:
        """Who presents this secret, perhaps with a key that has expired; None if a key is needed and this is none.

        Args:
            open_without_keys: only this machine can reach the server, so that while no key exists, none is needed.
        """
        if not self.keys and open_without_keys:
            return LOOPBACK
        digest = digest_secret(secret or "")
        found = None
        for key in self.keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = Caller(key.id, SCOPES[key.scope], key.limits)
        return found


def digest_secret(secret: str) -> str:
    """How keys are stored: secrets are 256 random bits, so a plain hash cannot be reversed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
