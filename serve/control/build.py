"""Building: what is made from a forget set's content alone, each in one content-addressed file.

Guards declare what they build (`guards.kinds.Build`); vectors are made by the encoder, which belongs to `Similarity`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import cast

from guards.catalogue import GUARDS
from guards.errors import GuardError, InvalidArtifact
from guards.forget_set import ForgetSet
from guards.kinds import GuardKind, resolve
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary
from guards.types import ArtifactRef
from guards.whole_file import write_whole
from serve.control.similarity import Similarity
from serve.protocol.artifacts import artifact_path, load_artifact
from serve.registry.records import Artifact, now

logger = logging.getLogger(__name__)

_KEPT_COMPILED = 64
_BUILT = [kind for kind in GUARDS.values() if kind.build is not None]


class BuildFailed(GuardError):
    """One of a set's artifacts could not be built. ``artifacts`` says which, and why, beside those that were."""

    def __init__(self, artifact: Artifact, cause: GuardError | OSError) -> None:
        super().__init__(artifact.detail)
        self.artifacts = [artifact]
        self.status = cause.status if isinstance(cause, GuardError) else 503


class Builder:
    """One per API process.

    Args:
        artifacts: the directory of artifact files.
    """

    def __init__(self, vocabulary: Vocabulary, artifacts: Path, similarity: Similarity) -> None:
        self._vocabulary = vocabulary
        self._artifacts = artifacts
        self._similarity = similarity
        self._compiled: OrderedDict[str, CompiledPhrases] = OrderedDict()
        self._compiled_lock = threading.Lock()  # the event loop and its threads both read

    def to_build(self, content: ForgetSet) -> list[Artifact]:
        """The artifacts that a set will have, not built yet."""
        found = [(_kind_of(kind), self._fingerprint(kind, content)) for kind in _BUILT]
        found.append(("similarity", self._similarity.fingerprint(content)))
        return [Artifact(name, fingerprint, "building", "", now()) for name, fingerprint in found if fingerprint is not None]

    async def make(self, content: ForgetSet) -> list[Artifact]:
        """Everything that is made from a set's content. What the engine acts by must succeed; vectors say why they failed.

        Raises:
            BuildFailed.
        """
        made: list[Artifact] = []
        failed: BuildFailed | None = None
        for kind in _BUILT:
            try:
                if (artifact := await self._build(kind, content)) is not None:
                    made.append(artifact)
            except BuildFailed as error:
                failed = failed or error
                made += error.artifacts
        made.append(await self._embed(content))
        if failed is not None:
            failed.artifacts = made
            raise failed
        return made

    def _fingerprint(self, kind: GuardKind, content: ForgetSet) -> str | None:
        assert kind.build is not None
        return cast("str | None", resolve(kind.build.fingerprint)(content, self._vocabulary))

    async def _build(self, kind: GuardKind, content: ForgetSet) -> Artifact | None:
        """Build one artifact unless its file is there and sound. None if there is nothing to build."""
        if (fingerprint := self._fingerprint(kind, content)) is None:
            return None
        assert kind.build is not None
        ref, make, started = ArtifactRef(kind.name, fingerprint), resolve(kind.build.make), time.perf_counter()

        def build_and_write() -> str:
            with contextlib.suppress(InvalidArtifact):
                return str(load_artifact(self._artifacts, ref).summary)
            made = make(content, self._vocabulary)
            write_whole(artifact_path(self._artifacts, ref), made.save)
            return str(made.summary)

        try:
            summary = await asyncio.to_thread(build_and_write)
        except (GuardError, OSError) as error:
            logger.error("lethe: the %s of forget set %r could not be built: %s", _kind_of(kind), content.name, error)
            raise BuildFailed(Artifact(_kind_of(kind), fingerprint, "failed", str(error), now()), error) from error
        return Artifact(_kind_of(kind), fingerprint, "ready", f"{summary} in {time.perf_counter() - started:.2f} s", now())

    async def _embed(self, content: ForgetSet) -> Artifact:
        """Embed a set unless the file is there and sound."""
        fingerprint, started = self._similarity.fingerprint(content), time.perf_counter()
        if fingerprint is None:
            return Artifact("similarity", "", "failed", str(self._similarity.failure), now())
        try:
            try:
                vectors = await asyncio.to_thread(self._similarity.read, fingerprint)
            except InvalidArtifact:
                vectors = await self._similarity.build(content)
                path = artifact_path(self._artifacts, ArtifactRef("gate", fingerprint))
                await asyncio.to_thread(write_whole, path, vectors.save)
        except (GuardError, OSError) as error:
            logger.error("lethe: forget set %r could not be embedded: %s", content.name, error)
            return Artifact("similarity", fingerprint, "failed", str(error), now())
        figures = f"{len(vectors.vectors):,} vectors in {time.perf_counter() - started:.2f} s"
        return Artifact("similarity", fingerprint, "ready", figures, now())

    def phrases(self, fingerprint: str, at_least: int = 0) -> CompiledPhrases:
        """Compiled phrases by fingerprint, kept in memory by recency, and not fewer than so many. Raises InvalidArtifact."""
        with self._compiled_lock:
            compiled = self._compiled.get(fingerprint)
            if compiled is None:
                compiled = load_artifact(self._artifacts, ArtifactRef("suppression", fingerprint))
                self._compiled[fingerprint] = compiled
                while len(self._compiled) > max(_KEPT_COMPILED, at_least):
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(fingerprint)
            return compiled


def _kind_of(guard: GuardKind) -> str:
    """As the registry names what the guard builds."""
    assert guard.files is not None, f"guard {guard.name!r} builds artifacts, so it says where they lie"
    return guard.files.kinds[0]
