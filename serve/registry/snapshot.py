"""Snapshots: everything that a request needs to know of the registry, immutable, at one revision."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from guards.errors import InvalidPolicy
from guards.policy import DEFAULT_ALPHA, DEFAULT_CORRUPTION, DEFAULT_SAID, DEFAULT_THRESHOLD, Policy
from guards.types import Contrast, Plan, Steer, TextPlan
from serve.clock import never_back
from serve.experiment import Experiment

Scope = Literal["chat", "compare", "admin"]
SCOPES: dict[Scope, frozenset[Scope]] = {
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
    scopes: frozenset[Scope]
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
    scope: Scope
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Cosines from which similarity is a hit."""

    asked: float = DEFAULT_THRESHOLD  # of a conversation
    said: float = DEFAULT_SAID  # of a passage of an answer


@dataclass(frozen=True)
class Snapshot:
    """What is in force at one revision."""

    revision: int
    enabled: Mapping[str, str | None]  # enabled forget set -> fingerprint of its compiled phrases; None without phrases
    policies: Mapping[str, Policy]
    keys: tuple[Key, ...]
    assistants: Mapping[str, str] = field(default_factory=dict)  # enabled forget set -> fingerprint of its assistant
    steering: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # enabled forget set -> method -> fingerprint
    alphas: Mapping[str, float] = field(default_factory=dict)  # assistant -> its calibrated strength
    similarity: Mapping[str, str] = field(default_factory=dict)  # enabled forget set -> fingerprint of its vectors
    thresholds: Mapping[str, Thresholds] = field(default_factory=dict)  # vectors -> their calibrated thresholds
    corruptions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # vectors -> kind -> its calibrated strength
    experiments: tuple[Experiment, ...] = ()  # those that run
    head: str = ""  # hash of the audit row that made the revision
    plans: Mapping[str, Plan] = field(init=False)  # policy -> plan
    text_plans: Mapping[str, TextPlan | None] = field(init=False)  # policy -> what similarity does; None = nothing

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", {name: self._plan(policy) for name, policy in self.policies.items()})
        object.__setattr__(self, "text_plans", {name: self._text_plan(policy) for name, policy in self.policies.items()})

    def forget_sets_of(self, policy: Policy) -> list[str]:
        """The sets that act on a request under this policy."""
        plan = self._plan(policy)
        acting = {
            *plan.suppression,
            *(each.assistant for each in plan.contrast),
            *(each.artifact for each in plan.steering),
        }
        text = self._text_plan(policy)
        judged = set(text.sets.values()) if text is not None and (text.acts or text.corrupt is not None) else set()

        def made(name: str) -> set[str | None]:
            return {self.enabled[name], self.assistants.get(name), *self.steering.get(name, {}).values()}

        return [name for name in self._chosen(policy) if name in judged or made(name) & acting]

    def notes(self, policy: Policy) -> list[str]:
        """What a policy does not do and its author may expect: one sentence for each enabled set that it chooses."""
        acting, gate = self.forget_sets_of(policy), policy.guards.gate
        if (
            not policy.guards.suppression.enabled
            and not policy.guards.contrast.enabled
            and not policy.guards.steering
            and gate is None
            and not policy.guards.stream
        ):
            return []  # meant to do nothing
        found = [f"nothing under this policy acts on forget set {name!r}" for name in self._chosen(policy) if name not in acting]
        if gate is not None and gate.enabled and gate.on_hit == "engage":
            plan, corrupts = self._plan(policy), policy.guards.corrupt is not None and policy.guards.corrupt.enabled
            engaged = {*(each.assistant for each in plan.contrast), *(each.artifact for each in plan.steering)}
            found += [
                f"the gate has no contrast to engage for {name!r}"
                for name in self._chosen(policy)
                if not corrupts and not {self.assistants.get(name), *self.steering.get(name, {}).values()} & engaged
            ]
        for each in policy.guards.steering:
            found += [
                f"forget set {name!r} has no artifact by {each.method}; make one with `lethe train {name} --method {each.method}`"
                for name in self._chosen(policy)
                if each.enabled and each.method not in self.steering.get(name, {})
            ]
        return found

    def _chosen(self, policy: Policy) -> list[str]:
        return sorted(self.enabled if policy.forget_sets == "enabled" else set(policy.forget_sets) & set(self.enabled))

    def _plan(self, policy: Policy) -> Plan:
        suppression, contrast = policy.guards.suppression, policy.guards.contrast
        chosen = self._chosen(policy)
        phrases = {self.enabled[name] for name in chosen if suppression.enabled}
        assistants = {self.assistants[name] for name in chosen if name in self.assistants}

        def alpha(assistant: str) -> float:
            return self.alphas.get(assistant, DEFAULT_ALPHA) if contrast.alpha is None else contrast.alpha

        return Plan(
            self.revision,
            policy.name,
            tuple(sorted(name for name in phrases if name is not None)),
            tuple(
                Contrast(assistant, contrast.rule, alpha(assistant), contrast.margin, contrast.plausibility)
                for assistant in sorted(assistants)
                if contrast.enabled and alpha(assistant) > 0  # strength 0 is no guard, so it costs nothing either
            ),
            tuple(
                sorted(
                    {
                        Steer(self.steering[name][each.method], each.strength)
                        for name in chosen
                        for each in policy.guards.steering
                        if each.enabled and each.method in self.steering.get(name, {})
                    },
                    key=lambda each: each.artifact,
                )
            ),
        )

    def _text_plan(self, policy: Policy) -> TextPlan | None:
        gate, stream = policy.guards.gate, policy.guards.stream
        gate, stream = gate if gate and gate.enabled else None, stream if stream and stream.enabled else None
        if gate is None and stream is None:
            return None
        asked: dict[str, float] = {}
        said: dict[str, float] = {}
        assistants: dict[str, tuple[str, ...]] = {}
        sets: dict[str, str] = {}
        strengths: dict[str, float] = {}
        missing: list[str] = []
        corrupt = policy.guards.corrupt if policy.guards.corrupt and policy.guards.corrupt.enabled else None
        for name in self._chosen(policy):
            if (vectors := self.similarity.get(name)) is None:
                missing.append(name)  # its contrast then engages always
                continue
            fitted = self.thresholds.get(vectors, Thresholds())
            sets[vectors] = name
            if gate is not None:
                asked[vectors] = fitted.asked if gate.threshold is None else gate.threshold
            if stream is not None:
                said[vectors] = fitted.said if stream.threshold is None else stream.threshold
            engages = [*([self.assistants[name]] if name in self.assistants else []), *self.steering.get(name, {}).values()]
            if engages:
                assistants[vectors] = (*assistants.get(vectors, ()), *engages)
            if corrupt is not None:
                calibrated = self.corruptions.get(vectors, {}).get(corrupt.kind, DEFAULT_CORRUPTION[corrupt.kind])
                strengths[vectors] = calibrated if corrupt.strength is None else corrupt.strength
        if not sets and not missing:
            return None
        return TextPlan(gate, stream, asked, said, assistants, sets, tuple(missing), corrupt, strengths)

    @property
    def vectors(self) -> list[str]:
        """Every similarity artifact that a text plan of this snapshot may name."""
        return sorted({each for plan in self.text_plans.values() if plan is not None for each in plan.sets})

    @property
    def fingerprints(self) -> list[str]:
        """Every artifact of compiled phrases that a plan of this snapshot may name."""
        return sorted({fingerprint for plan in self.plans.values() for fingerprint in plan.suppression})

    @property
    def trained_fingerprints(self) -> list[str]:
        """Every assistant and steering artifact that a plan of this snapshot may name."""
        assistants = {each.assistant for plan in self.plans.values() for each in plan.contrast}
        return sorted(assistants | {each.artifact for plan in self.plans.values() for each in plan.steering})

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
