"""Building: what is made from a forget set's content alone, compiled phrases and vectors, each in one content-addressed file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TypedDict

from guards.errors import GuardError, InvalidArtifact
from guards.forget_set import ForgetSet
from guards.similarity.index import similarity_path
from guards.suppression.automaton import CompiledPhrases, compile_phrases, phrases_fingerprint
from guards.suppression.folding import Match
from guards.suppression.vocabulary import Vocabulary
from guards.whole_file import write_whole
from serve.control.similarity import Similarity
from serve.protocol.wire import load_phrases, phrases_path
from serve.registry.models import Artifact, now

logger = logging.getLogger(__name__)

_KEPT_COMPILED = 64


class _Options(TypedDict):
    """How a set's phrases match, as the compiler takes it."""

    fold_case: bool
    left_boundary: bool
    match: Match


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

    def phrases_fingerprint(self, content: ForgetSet) -> str:
        return phrases_fingerprint(content.phrases, self._vocabulary.fingerprint, **_options(content))

    def to_build(self, content: ForgetSet) -> list[Artifact]:
        """The artifacts that a set will have, not built yet."""
        phrases = [Artifact("phrases", self.phrases_fingerprint(content), "building", "", now())] if content.phrases else []
        vectors = self._similarity.fingerprint(content)
        return [*phrases, *([Artifact("similarity", vectors, "building", "", now())] if vectors is not None else [])]

    async def make(self, content: ForgetSet) -> list[Artifact]:
        """Everything that is made from a set's content. Raises GuardError, OSError for phrases; the rest says why it failed."""
        phrases = [await self._compile(content)] if content.phrases else []
        return [*phrases, await self._embed(content)]

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
                await asyncio.to_thread(write_whole, similarity_path(self._artifacts, fingerprint), vectors.save)
        except (GuardError, OSError) as error:
            logger.error("lethe: forget set %r could not be embedded: %s", content.name, error)
            return Artifact("similarity", fingerprint, "failed", str(error), now())
        figures = f"{len(vectors.vectors):,} vectors in {time.perf_counter() - started:.2f} s"
        return Artifact("similarity", fingerprint, "ready", figures, now())

    async def _compile(self, content: ForgetSet) -> Artifact:
        """Compile a set's phrases unless the file is there and sound. Raises GuardError, OSError."""
        fingerprint = self.phrases_fingerprint(content)
        started = time.perf_counter()

        def compile_and_write() -> CompiledPhrases:
            path = phrases_path(self._artifacts, fingerprint)
            with contextlib.suppress(InvalidArtifact):
                return load_phrases(self._artifacts, fingerprint)
            compiled = compile_phrases(content.phrases, self._vocabulary, **_options(content))
            write_whole(path, compiled.save)
            return compiled

        compiled = await asyncio.to_thread(compile_and_write)
        figures = f"{compiled.phrase_count:,} phrases in {time.perf_counter() - started:.2f} s"
        return Artifact("phrases", fingerprint, "ready", figures, now())

    def phrases(self, fingerprint: str, at_least: int = 0) -> CompiledPhrases:
        """Compiled phrases by fingerprint, kept in memory by recency, and not fewer than so many. Raises InvalidArtifact."""
        with self._compiled_lock:
            compiled = self._compiled.get(fingerprint)
            if compiled is None:
                compiled = self._compiled[fingerprint] = load_phrases(self._artifacts, fingerprint)
                while len(self._compiled) > max(_KEPT_COMPILED, at_least):
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(fingerprint)
            return compiled


def _options(content: ForgetSet) -> _Options:
    return {"fold_case": not content.case_sensitive, "left_boundary": content.word_boundary, "match": content.match}
