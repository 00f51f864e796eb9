"""Artifacts on the engine's side: loaded when a plan or the API process names them, kept while in use, then by recency."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from guards.errors import GuardError
from guards.suppression.automaton import CompiledPhrases
from guards.suppression.mask import SuppressionGuard
from serve.wire import load_phrases

logger = logging.getLogger(__name__)

KEPT_IDLE = 64
"""Artifacts that stay loaded although no request in the batch names them."""


class ArtifactCache:
    """Loads compiled phrases into the suppression guard.

    An artifact that cannot be loaded stays unloaded, and the guard closes every row whose plan names it.
    """

    def __init__(self, directory: Path, guard: SuppressionGuard) -> None:
        self._directory = directory
        self._guard = guard
        self._loaded: OrderedDict[str, CompiledPhrases] = OrderedDict()

    def ensure(self, fingerprints: Iterable[str], in_use: Iterable[str] = ()) -> dict[str, str]:
        """Load what is missing. Returns the failures: fingerprint -> reason."""
        wanted = list(dict.fromkeys(fingerprints))
        failures, loaded = {}, self._loaded.copy()
        for fingerprint in wanted:
            if fingerprint in loaded:
                loaded.move_to_end(fingerprint)
                continue
            try:
                artifact = load_phrases(self._directory, fingerprint)
                self._guard.check(artifact)
                loaded[fingerprint] = artifact
            except GuardError as error:
                failures[fingerprint] = str(error)
                logger.error("lethe: %s", error)
        if loaded.keys() == self._loaded.keys():
            self._loaded = loaded
            return failures
        keep = set(wanted) | set(in_use)
        idle = [name for name in loaded if name not in keep]
        for name in idle[: max(0, len(idle) - KEPT_IDLE)]:
            del loaded[name]
        self._guard.load(list(loaded.values()))
        self._loaded = loaded
        return failures

    @property
    def loaded(self) -> list[str]:
        return list(self._loaded)
