"""The nouns that guards, the API process and the engine process share. Importable by any process: torch is typing only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from guards.policy import CorruptConfig, GateConfig, StreamConfig

BOUNDARY = -1
"""Stands in ``Rows.suffix`` for "nothing before this can be part of a match": before the first token, or a chat-template
token of the prompt."""

UNKNOWN = -2
"""Stands in ``Rows.suffix`` for a token that nobody knows. A row that would need it may produce no text."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """One assistant and how it is set against the target."""

    assistant: str  # the artifact's fingerprint
    rule: str  # a key of guards.contrastive.rules.RULES, one for all assistants of a plan
    alpha: float  # >= 0, dimensionless
    margin: float  # nats
    plausibility: float  # in [0, 1]; 0 = no cut


@dataclass(frozen=True, slots=True)
class Steer:
    """One steering artifact and how strongly it acts."""

    artifact: str  # its fingerprint
    strength: float  # > 0, dimensionless; 1 = as fitted or trained


@dataclass(frozen=True, slots=True)
class Corrupt:
    """How embeddings of a prompt are corrupted, and which."""

    kind: str  # a guards.policy.Corruption
    strength: float
    first_n: int
    seed: int
    spans: tuple[tuple[int, int], ...]  # first token and the one after the last, by position in the request


@dataclass(frozen=True, slots=True)
class Plan:
    """What the guards are to do for one request. Decided once, at admission; travels with the request.

    Toggling a forget set never changes a plan that is under way: a request keeps the revision it was admitted under.
    """

    revision: int  # the registry revision in force at admission
    policy: str  # the policy's name, for reports; the engine does not interpret it
    suppression: tuple[str, ...] = ()  # fingerprints of CompiledPhrases artifacts
    contrast: tuple[Contrast, ...] = ()
    steering: tuple[Steer, ...] = ()
    corrupt: Corrupt | None = None
    output_start: int | None = None  # index of the first output token; None = the prompt's length
    forced: tuple[int, ...] = ()  # what is sampled, whatever the logits say: to read off how likely it was

    @property
    def engages(self) -> bool:
        """Whether the engine has anything to do for this request."""
        return bool(self.suppression or self.contrast or self.changes_cache)

    @property
    def changes_cache(self) -> bool:
        """Whether keys and values depend on this plan, so that no other request may share them."""
        return bool(self.steering or (self.corrupt is not None and self.corrupt.spans))

    @property
    def cache_salt(self) -> str | None:
        """What keeps the cached keys and values of this plan apart: requests of the same salt compute the same. None = plain."""
        if not self.changes_cache:
            return None
        return hashlib.sha256(repr((self.steering, self.corrupt)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TextPlan:
    """What similarity is to do for one request: stays in the API process, since the engine sees no text."""

    gate: GateConfig | None
    stream: StreamConfig | None
    asked: Mapping[str, float]  # similarity artifact -> cosine from which a conversation touches its set
    said: Mapping[str, float]  # the same for a passage of an answer
    assistants: Mapping[str, tuple[str, ...]]  # similarity artifact -> assistants and steering artifacts that it engages
    sets: Mapping[str, str]  # similarity artifact -> name of its set, for reports
    missing: tuple[str, ...]  # sets without an artifact: nothing can be said about them
    corrupt: CorruptConfig | None = None  # how names that the gate finds are corrupted
    corrupt_strength: Mapping[str, float] = field(default_factory=dict)  # similarity artifact -> how strongly; of several, the most

    @property
    def acts(self) -> bool:
        """Whether a hit does anything by itself, beyond engaging contrast or being counted."""
        return bool((self.gate and self.gate.on_hit == "refuse") or (self.stream and self.stream.on_hit != "monitor"))


@dataclass(frozen=True, slots=True)
class AssistantLines:
    """What assistants say about a step's rows, P lines: one for each row and assistant of its plan."""

    row: Tensor  # [P] int64, which row
    nth: Tensor  # [P] int64, which entry of its plan's ``contrast``
    logits: Tensor  # [P, V] float


@dataclass(frozen=True, slots=True)
class Rows:
    """One step's layout, R rows of logits. A row is not a request: prompt positions have rows too, and rows reorder."""

    plan: Tensor  # [R] int64, index into the step's list of plans; -1 = unguarded
    suffix: Tensor  # [R, W] int64, the last W token ids before the token to predict, oldest first; BOUNDARY pads on the left
    lines: AssistantLines | None = None


class LogitsGuard(Protocol):
    """A guard that edits logits. Holds no per-request state: everything it needs is in ``rows``.

    Laws, checked for every implementation by tests/guards/test_conformance.py: unguarded rows stay bit-identical, ``-inf``
    stays ``-inf``, no row turns all ``-inf``, permuting rows permutes the result, a batch equals its rows one by one.
    """

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Return [R, V] logits. May write into ``logits``. ``rows.plan`` points into ``plans``."""
        ...
