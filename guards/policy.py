"""Policies: which forget sets apply to a request, through which guards, and what a hit does."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from guards.errors import InvalidPolicy
from guards.forget_set import Frozen, Name, describe_validation

DEFAULT = "default"
"""The policy of every request that does not select another. Can be changed, cannot be deleted."""
NONE = "none"
"""The policy without guards, for comparisons. Cannot be changed; only privileged keys may select it."""


RuleName = Literal["uld", "uld-raw", "whp", "ucd", "delta"]
"""How contrast sets an assistant against the base: see `guards.contrastive.rules`."""
Method = Literal["project", "steer", "adapter"]
"""How a set is steered: see `guards.steering`."""
METHODS: tuple[Method, ...] = get_args(Method)
Corruption = Literal["rand_noise_first_n", "zero_out_top_k", "flip_sign_first_n"]
"""How embeddings are corrupted: see `guards.steering.operators.corrupt`."""
DEFAULT_ALPHA = 1.0
"""Strength of contrast for sets that were not calibrated: where the order of the base's tokens begins to turn."""
DEFAULT_CORRUPTION: dict[Corruption, float] = {"rand_noise_first_n": 2.0, "zero_out_top_k": 1.0, "flip_sign_first_n": 1.0}
"""Strength of corruption for sets that were not calibrated: little of the name is left."""


DEFAULT_THRESHOLD = 0.75
"""For sets that were not calibrated, with the bundled encoder: on TOFU's forget01 held-out paraphrases score .82 and more,
questions about other authors .68 and less."""
DEFAULT_SAID = 0.8
"""The same for clauses of an answer."""


class SuppressionConfig(Frozen):
    """Keep the phrases of the policy's sets out of the output."""

    enabled: bool = True


class ContrastConfig(Frozen):
    """Decode against the assistants of the policy's sets. Sets without an assistant are left to the other guards."""

    enabled: bool = True
    rule: RuleName = "uld"
    alpha: float | None = Field(None, ge=0, le=100, description="strength; 0 is off; null = each set's calibrated one, or 1")
    margin: float = Field(4.0, ge=0, le=100, description="nats beyond chance that are not penalised")
    plausibility: float = Field(0.01, gt=0, le=1, description="keep tokens with at least this part of the top probability")


class GateConfig(Frozen):
    """Look at the conversation first: contrast engages only for the sets that it touches.

    ``on_hit``: ``engage`` the touched sets' contrast; ``refuse`` to answer; or only ``monitor``, and do as if there were no gate.
    The gate looks again while the answer grows, since a reference can first appear there.
    """

    enabled: bool = True
    on_hit: Literal["engage", "refuse", "monitor"] = "engage"
    threshold: float | None = Field(None, ge=0.2, le=1, description="cosine; null = each set's calibrated one, or 0.75")
    pasted: Literal["counts", "ignored"] = Field("counts", description="text of the set that the user gives as context")


class StreamConfig(Frozen):
    """Hold the answer back, clause by clause, until it is known to say nothing of the sets.

    ``on_hit``: ``refuse`` ends the answer; ``redact`` replaces the span; ``resample`` throws away what was not shown and goes on
    another way, at most ``retries`` times, then refuses; ``monitor`` only counts, and holds nothing back.
    """

    enabled: bool = True
    on_hit: Literal["refuse", "redact", "resample", "monitor"] = "refuse"
    threshold: float | None = Field(None, ge=0.2, le=1, description="cosine; null = each set's calibrated one, or 0.8")
    retries: int = Field(2, ge=0, le=10)
    marker: str = Field("[removed]", min_length=1, max_length=100, description="what is shown in place of a redacted span")


class SteeringConfig(Frozen):
    """Change what the network computes for a request: by what `lethe train --method` made of the policy's sets.

    ``project`` and ``steer`` move hidden states off the set; ``adapter`` runs projections with an unlearning adapter. Sets without
    such an artifact are left to the other guards.
    """

    method: Method
    enabled: bool = True
    strength: float = Field(1.0, gt=0, le=100, description="1 = as fitted or trained")


class CorruptConfig(Frozen):
    """Where the gate finds a set's names in a prompt, corrupt their embeddings, so that the network does not know of whom it is
    asked. Needs the gate. A conversation that touches a set without plainly naming it is refused, unless something else of the
    policy acts on it. Names that the answer itself brings up are left to the other guards.
    """

    enabled: bool = True
    kind: Corruption = "rand_noise_first_n"
    strength: float | None = Field(
        None,
        gt=0,
        le=1_000,
        description="of noise: in standard deviations of a token's embedding; else a share. null = each set's own, or 2 or 1",
    )
    first_n: int = Field(1_000_000, ge=1, le=1_000_000, description="dimensions that change; more than there are = all")
    seed: int = Field(0, ge=0, lt=2**31)


def _or_named(kind: str) -> BeforeValidator:
    """``"similarity"`` stands for the guard with its defaults."""
    return BeforeValidator(lambda value: {} if value == kind else value)


class GuardConfigs(Frozen):
    """One frozen config per guard; null = the guard is off."""

    gate: Annotated[GateConfig | None, _or_named("similarity")] = None
    stream: Annotated[StreamConfig | None, _or_named("similarity")] = None
    contrast: ContrastConfig = Field(default_factory=ContrastConfig)
    suppression: SuppressionConfig = Field(default_factory=SuppressionConfig)
    steering: tuple[SteeringConfig, ...] = Field((), max_length=8)
    corrupt: CorruptConfig | None = None

    @model_validator(mode="after")
    def _check_steering(self) -> GuardConfigs:
        methods = [each.method for each in self.steering]
        if len(set(methods)) < len(methods):
            raise ValueError(f"steering names {', '.join(methods)}: every method once")
        gated = self.gate is not None and self.gate.enabled and self.gate.on_hit == "engage"
        if self.corrupt is not None and self.corrupt.enabled and not gated:
            raise ValueError('corrupt needs a gate with on_hit "engage", which finds the names; add one')
        return self


class Policy(Frozen):
    """A named composition.

    ``forget_sets`` is ``"enabled"`` for all enabled sets, or names; a named set counts only while it is enabled, so that disabling
    a set switches it off everywhere. ``on_hit`` says what a guard does when it meets something to forget: ``unlearn`` steers the
    answer away from it. A request that cannot go on at all ends with ``finish_reason: "content_filter"`` and ``refusal``.
    """

    name: Name
    description: str = Field("", max_length=10_000)
    forget_sets: Literal["enabled"] | tuple[Name, ...] = "enabled"
    guards: GuardConfigs = Field(default_factory=GuardConfigs)
    on_hit: Literal["unlearn"] = "unlearn"
    refusal: str = Field("I cannot continue this answer.", min_length=1, max_length=1_000)


BUILT_IN = {
    DEFAULT: Policy(name=DEFAULT, description="Applies to every request that does not select another policy."),
    NONE: Policy(
        name=NONE,
        description="No guards at all: for comparisons.",
        guards=GuardConfigs(contrast=ContrastConfig(enabled=False), suppression=SuppressionConfig(enabled=False)),
    ),
}


def parse_policy(fields: dict[str, Any]) -> Policy:
    """Build a policy from untyped fields.

    Raises:
        InvalidPolicy: a field breaks its rule, or the policy is the built-in ``none``.
    """
    try:
        policy = Policy.model_validate(fields)
    except ValidationError as error:
        raise InvalidPolicy("; ".join(describe_validation(error))) from None
    if policy.name == NONE:
        raise InvalidPolicy(f"policy {NONE!r} is built in and stays without guards; choose another name")
    return policy
