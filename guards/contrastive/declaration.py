"""Contrast, declared: its settings, what a plan holds of it, its artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import Field

from guards.kinds import ArtifactFiles, Config, GuardKind, SetArtifacts, Training
from guards.types import Entry

RuleName = Literal["uld", "uld-raw", "whp", "ucd", "delta"]
"""How contrast sets an assistant against the base: see `guards.contrastive.rules`."""
DEFAULT_ALPHA = 1.0
"""Strength of contrast for sets that were not calibrated: where the order of the base's tokens begins to turn."""
DEFAULT_PLAUSIBILITY = 0.006
"""Likewise; see the tables in DECISIONS.md."""


class ContrastConfig(Config):
    """Decode against the assistants of the policy's sets. Sets without an assistant are left to the other guards."""

    rule: RuleName = "uld"
    alpha: float | None = Field(None, ge=0, le=100, description="strength; 0 is off; null = each set's calibrated one, or 1")
    margin: float = Field(4.0, ge=0, le=100, description="nats beyond chance that are not penalised")
    plausibility: float | None = Field(
        None,
        gt=0,
        le=1,
        description="acts on tokens with at least this part of the top probability; null = each set's calibrated one, or 0.006",
    )


@dataclass(frozen=True, slots=True, order=True)
class Contrast(Entry):
    """One assistant and how it is set against the target."""

    guard: ClassVar[str] = "contrast"
    assistant: str  # the artifact's fingerprint
    rule: str  # a key of guards.contrastive.rules.RULES, one for all assistants of a plan
    alpha: float  # >= 0, dimensionless
    margin: float  # nats
    plausibility: float  # in [0, 1]; 0 = no cut

    @property
    def artifacts(self) -> tuple[str, ...]:
        return (self.assistant,)

    def under_constraints(self) -> Contrast:
        """Without the plausibility cut: a constraint may leave only tokens that the base finds implausible."""
        return replace(self, plausibility=0.0)


def _entries(config: ContrastConfig, made: SetArtifacts) -> Sequence[Contrast]:
    if "assistant" not in made.artifacts:
        return []
    measured = made.measured.get("calibration", {})
    alpha = measured.get("strength", DEFAULT_ALPHA) if config.alpha is None else config.alpha
    plausibility = config.plausibility or measured.get("plausibility") or DEFAULT_PLAUSIBILITY
    if alpha <= 0:
        return []  # strength 0 is no guard, so it costs nothing either
    return [Contrast(made.artifacts["assistant"], config.rule, alpha, config.margin, plausibility)]


CONTRAST = GuardKind(
    name="contrast",
    acts_on="tokens, where they are chosen",
    config=ContrastConfig,
    default=ContrastConfig(),
    entry=Contrast,
    entries=_entries,
    gated=True,
    files=ArtifactFiles(("assistant",), "assistants", "guards.contrastive.assistant:Assistant", "train it again"),
    training=Training(
        program="guards.contrastive.train",
        route="assistant",
        order="guards.contrastive.assistant:AssistantOrder",
        methods={"contrast": "assistant"},
        check="guards.contrastive.assistant:check_order",
    ),
    calibrations=("calibration",),
)
