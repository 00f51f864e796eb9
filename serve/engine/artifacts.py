"""Artifacts on the engine's side: loaded when a plan or the API process names them, kept while in use, then by recency."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from guards.errors import GuardError

logger = logging.getLogger(__name__)

KEPT_IDLE = 64
"""Artifacts of a kind that stay loaded although no request in the batch names them."""

A = TypeVar("A")


class ArtifactCache(Generic[A]):
    """Loads artifacts of one kind into their guard. Nothing that goes wrong there stops the engine.

    An artifact that cannot be loaded stays unloaded, and the guard closes every row whose plan names it.

    Args:
        read: reads and checks one by fingerprint; raises GuardError.
        load: makes exactly these the loaded ones.
    """

    def __init__(self, read: Callable[[str], A], load: Callable[[Mapping[str, A]], None]) -> None:
        self._read = read
        self._load = load
        self._loaded: OrderedDict[str, A] = OrderedDict()

    def ensure(self, fingerprints: Iterable[str], in_use: Iterable[str] = ()) -> dict[str, str]:
        """Load what is missing. Returns the failures: fingerprint -> reason."""
        wanted = list(dict.fromkeys(fingerprints))
        failures, loaded = {}, self._loaded.copy()
        for fingerprint in wanted:
            if fingerprint in loaded:
                loaded.move_to_end(fingerprint)
                continue
            try:
                loaded[fingerprint] = self._read(fingerprint)
            except GuardError as error:
                failures[fingerprint] = str(error)
                logger.error("lethe: %s", error)
            except Exception as error:  # a guard of another package, say
                failures[fingerprint] = f"{type(error).__name__}: {error}"
                logger.exception("lethe: artifact %s cannot be read", fingerprint[:12])
        if loaded.keys() == self._loaded.keys():
            self._loaded = loaded
            return failures
        keep = set(wanted) | set(in_use)
        idle = [name for name in loaded if name not in keep]
        for name in idle[: max(0, len(idle) - KEPT_IDLE)]:
            del loaded[name]
        try:
            self._load(loaded)
        except Exception as error:
            logger.exception("lethe: artifacts cannot be loaded; whoever needs them is closed")
            failures |= dict.fromkeys(loaded.keys() - self._loaded.keys(), f"{type(error).__name__}: {error}")
            self._load(self._loaded)
            return failures
        self._loaded = loaded
        return failures

    @property
    def loaded(self) -> list[str]:
        return list(self._loaded)
