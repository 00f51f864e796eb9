"""Experiments without a server around them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from guards.errors import InvalidArtifact
from guards.suppression.artifact import CompiledPhrases
from serve.control.similarity import Similarity
from serve.experiments.live import LiveExperiments
from serve.experiments.measurements import Measurements
from serve.experiments.shadow import Shadow
from serve.registry.snapshot import Snapshot


def live_experiments(snapshot: Callable[[], Snapshot], measurements: Measurements | None = None) -> LiveExperiments:
    def phrases(fingerprint: str) -> CompiledPhrases:
        raise InvalidArtifact(fingerprint)

    if measurements is None:
        measurements = Measurements(Path(tempfile.mkdtemp()) / "observations.db")
    shadow = Shadow(waiting=4, beside=0, quiet_s=0, at_once=1, tokens_per_minute=1_000)
    return LiveExperiments(snapshot, measurements, phrases, Similarity(None, Path()), shadow)
