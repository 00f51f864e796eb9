"""Artifacts on the engine's side: loaded when a plan or the API process names them, kept while in use, then by recency."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from guards.errors import GuardError

logger = logging.getLogger(__name__)

KEPT_IDLE = 64
"""Artifacts of a kind that stay loaded although no request in the batch names them."""

ELSEWHERE = "another worker could not load it; its log says why"
A = TypeVar("A")


class ArtifactCache(Generic[A]):
    """Loads artifacts of one kind into their guard. Nothing that goes wrong there stops the engine.

    An artifact that cannot be loaded stays unloaded, and the guard closes every row whose plan names it.

    Args:
        read: reads and checks one by fingerprint; raises GuardError.
        load: makes exactly these the loaded ones.
        agree: what worked here -> what worked in every process of the engine; what one process lacks, none may use.
    """

    def __init__(
        self,
        read: Callable[[str], A],
        load: Callable[[Mapping[str, A]], None],
        agree: Callable[[Sequence[bool]], Sequence[bool]] = tuple,
    ) -> None:
        self._read = read
        self._load = load
        self._agree = agree
        self._loaded: OrderedDict[str, A] = OrderedDict()

    def ensure(self, fingerprints: Iterable[str], in_use: Iterable[str] = ()) -> dict[str, str]:
        """Load what is missing. Returns the failures: fingerprint -> reason."""
        wanted = list(dict.fromkeys(fingerprints))
        missing = [fingerprint for fingerprint in wanted if fingerprint not in self._loaded]
        failures: dict[str, str] = {}
        loaded = self._loaded.copy()
        for fingerprint in wanted:
            if fingerprint in loaded:
                loaded.move_to_end(fingerprint)
        if not missing:
            self._loaded = loaded
            return failures
        for fingerprint in missing:
            try:
                loaded[fingerprint] = self._read(fingerprint)
            except GuardError as error:
                failures[fingerprint] = str(error)
                logger.error("lethe: %s", error)
            except Exception as error:  # a guard of another package, say
                failures[fingerprint] = f"{type(error).__name__}: {error}"
                logger.exception("lethe: artifact %s cannot be read", fingerprint[:12])
        for fingerprint, everywhere in zip(missing, self._agree([name not in failures for name in missing]), strict=True):
            if not everywhere and loaded.pop(fingerprint, None) is not None:
                failures[fingerprint] = ELSEWHERE
        if loaded.keys() != self._loaded.keys():
            keep = set(wanted) | set(in_use)
            idle = [name for name in loaded if name not in keep]
            for name in idle[: max(0, len(idle) - KEPT_IDLE)]:
                del loaded[name]
            fault = self._try(loaded)
            if not self._agree([fault is None])[0]:
                failures |= dict.fromkeys(loaded.keys() - self._loaded.keys(), fault or ELSEWHERE)
                if self._try(self._loaded) is not None:  # not even what was there: nobody may use anything of this guard
                    failures |= dict.fromkeys(self._loaded, fault or ELSEWHERE)
                    self._loaded = OrderedDict()
                    self._try(self._loaded)
                return failures
        self._loaded = loaded
        return failures

    def _try(self, artifacts: Mapping[str, A]) -> str | None:
        """Load, and say what went wrong."""
        try:
            self._load(artifacts)
        except Exception as error:
            logger.exception("lethe: artifacts cannot be loaded; whoever needs them is closed")
            return f"{type(error).__name__}: {error}"
        return None

    @property
    def loaded(self) -> list[str]:
        return list(self._loaded)
