"""The gate and the stream filter, declared: their settings and artifacts. Both judge text by names and by similarity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from guards.forget_set import Name
from guards.kinds import ArtifactFiles, Config, GuardKind

DEFAULT_GATE_THRESHOLD = 0.75
"""For sets that were not calibrated, with the bundled encoder: on TOFU's forget01 held-out paraphrases score .82 and more,
questions about other authors .68 and less."""
DEFAULT_STREAM_THRESHOLD = 0.8
"""The same for clauses of an answer."""


class GateConfig(Config):
    """Look at the conversation first: contrast engages only for the sets that it touches.

    ``on_hit``: ``engage`` the touched sets' contrast; ``refuse`` to answer; or only ``monitor``, and do as if there were no gate.
    ``refuse`` names the sets whose requests are refused where others are engaged. The gate looks again while the answer grows,
    since a reference can first appear there.
    """

    on_hit: Literal["engage", "refuse", "monitor"] = "engage"
    threshold: float | None = Field(None, ge=0.2, le=1, description="cosine; null = each set's calibrated one, or 0.75")
    pasted: Literal["counts", "ignored"] = Field("counts", description="text of the set that the user gives as context")
    refuse: tuple[Name, ...] = Field((), max_length=10_000, description="forget sets that are refused, where others are engaged")

    @model_validator(mode="after")
    def _check_refuse(self) -> GateConfig:
        if self.refuse and self.on_hit == "monitor":
            raise ValueError('a gate with on_hit "monitor" refuses nobody; drop refuse, or say "engage"')
        return self


class StreamConfig(Config):
    """Hold the answer back, clause by clause, until it is known to say nothing of the sets.

    ``on_hit``: ``refuse`` ends the answer; ``redact`` replaces the span; ``resample`` throws away what was not shown and goes on
    another way, at most ``retries`` times, then refuses; ``monitor`` only counts, and holds nothing back.
    """

    on_hit: Literal["refuse", "redact", "resample", "monitor"] = "refuse"
    threshold: float | None = Field(None, ge=0.2, le=1, description="cosine; null = each set's calibrated one, or 0.8")
    retries: int = Field(2, ge=0, le=10)
    marker: str = Field("[removed]", min_length=1, max_length=100, description="what is shown in place of a redacted span")


GATE = GuardKind(
    name="gate",
    acts_on="the prompt, and what of the answer could open it",
    config=GateConfig,
    shorthand="similarity",
    files=ArtifactFiles(("similarity",), "similarity", "guards.similarity.index:SetVectors", "it is built again at the next start"),
    calibrations=("gate",),
)
STREAM = GuardKind(name="stream", acts_on="the answer, clause by clause", config=StreamConfig, shorthand="similarity")
