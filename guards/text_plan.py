"""What is judged of one request's text, in the API process: the counterpart of `guards.types.Plan` (the engine sees no text)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from guards.kinds import SetArtifacts, TextConfig
from guards.similarity.declaration import GateConfig, StreamConfig
from guards.steering.declaration import CorruptConfig


@dataclass(frozen=True, slots=True)
class TextCheck:
    """What a guard of another package is to judge."""

    guard: str  # its name in the catalogue
    config: TextConfig
    sets: tuple[SetArtifacts, ...]  # the enabled ones of the policy

    @property
    def acts(self) -> bool:
        """Whether a hit does more than to be counted."""
        return self.config.prompt == "refuse" or self.config.answer in ("refuse", "redact")


@dataclass(frozen=True, slots=True)
class TextPlan:
    """What similarity, and other guards that judge text, are to do for one request. An *owner* is a similarity artifact."""

    gate: GateConfig | None = None
    stream: StreamConfig | None = None
    gate_thresholds: Mapping[str, float] = field(default_factory=dict)  # owner -> cosine from which a conversation touches its set
    stream_thresholds: Mapping[str, float] = field(default_factory=dict)  # the same for a passage of an answer
    engages: Mapping[str, frozenset[tuple[str, tuple[str, ...]]]] = field(default_factory=dict)  # owner -> `Entry.key`s it gates
    sets: Mapping[str, str] = field(default_factory=dict)  # owner -> name of its set, for reports
    missing: tuple[str, ...] = ()  # sets without such an artifact: nothing can be said about them
    corrupt: CorruptConfig | None = None  # how names that the gate finds are corrupted
    corrupt_strength: Mapping[str, float] = field(default_factory=dict)  # owner -> how strongly; of several, the most
    checks: tuple[TextCheck, ...] = ()
    refused: frozenset[str] = frozenset()  # owners of sets that the gate refuses though it engages others; or names of missing ones

    @property
    def by_similarity(self) -> bool:
        """Whether anything is judged by names and meaning."""
        return self.gate is not None or self.stream is not None

    @property
    def acts(self) -> bool:
        """Whether a hit by similarity does anything by itself, beyond engaging other guards or being counted."""
        gate, stream = self.gate, self.stream
        return bool(self.refused or (gate and gate.on_hit == "refuse") or (stream and stream.on_hit != "monitor"))

    def refuses(self, owners: Iterable[str]) -> bool:
        """Whether a conversation that touches these is refused."""
        touched = frozenset(owners)
        return bool(touched) and self.gate is not None and (self.gate.on_hit == "refuse" or not touched.isdisjoint(self.refused))
