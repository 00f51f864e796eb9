"""Short ways to write plans and guards in tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from guards.closing import RowCloser
from guards.kinds import SetArtifacts
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.declaration import Suppress
from guards.suppression.guard import SuppressionGuard
from guards.suppression.vocabulary import Vocabulary


def suppress(*fingerprints: str) -> tuple[Suppress, ...]:
    """A plan's entries for compiled phrases."""
    return tuple(map(Suppress, fingerprints))


def context(vocabulary: Vocabulary) -> Any:
    """What the engine gives a guard, on the CPU."""
    device = torch.device("cpu")
    return SimpleNamespace(vocabulary=vocabulary, closer=RowCloser(torch.from_numpy(vocabulary.lengths > 0)), device=device)


def suppression_guard(vocabulary: Vocabulary, *artifacts: CompiledPhrases) -> SuppressionGuard:
    """A guard with these phrases loaded."""
    guard = SuppressionGuard(context(vocabulary))
    guard.load({artifact.fingerprint: artifact for artifact in artifacts})
    return guard


def made(name: str, *, measured: dict[str, Any] | None = None, **artifacts: str) -> dict[str, SetArtifacts]:
    """An enabled set, as a snapshot holds it: ``made("a", phrases="fingerprint")``."""
    return {name: SetArtifacts(name, artifacts, measured or {})}
