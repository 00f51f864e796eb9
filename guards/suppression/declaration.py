"""Suppression, declared: its settings, what a plan holds of it, its artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from guards.kinds import ArtifactFiles, Build, Config, GuardKind, SetArtifacts
from guards.types import Entry


class SuppressionConfig(Config):
    """Keep the phrases of the policy's sets out of the output."""


@dataclass(frozen=True, slots=True, order=True)
class Suppress(Entry):
    """One set's phrases."""

    guard: ClassVar[str] = "suppression"
    phrases: str  # fingerprint of a CompiledPhrases artifact

    @property
    def artifacts(self) -> tuple[str, ...]:
        return (self.phrases,)


def _entries(_: SuppressionConfig, made: SetArtifacts) -> Sequence[Suppress]:
    return [Suppress(made.artifacts["phrases"])] if "phrases" in made.artifacts else []


SUPPRESSION = GuardKind(
    name="suppression",
    acts_on="tokens, where they are chosen",
    config=SuppressionConfig,
    default=SuppressionConfig(),
    entry=Suppress,
    entries=_entries,
    files=ArtifactFiles(("phrases",), "phrases", "guards.suppression.artifact:CompiledPhrases", "delete it and restart"),
    build=Build("guards.suppression.automaton:fingerprint_of_set", "guards.suppression.automaton:compile_set"),
    logits="guards.suppression.guard:SuppressionGuard",
)
