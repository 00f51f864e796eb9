"""Experiments on live traffic: which arm answers a request, what is observed of it, and what other arms would have said.

A request that names no policy may take part; its arm's policy then answers it, through the same choke point as ever. In shadow and
paired mode a copy of it is answered by the other arms, behind everybody's back: see `serve.api.shadow`. Answers are judged (do
they tell what a set in force holds?) after they were given, the same way whatever arm gave them, and then forgotten.

Covered: all five generating endpoints, streamed or not. Not covered: a client that goes away is not counted; feedback that comes
after `KEPT_REQUESTS` more requests is refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import Counter, Histogram

from guards.errors import GuardError
from guards.similarity.stream import clauses_of
from guards.suppression.automaton import CompiledPhrases
from serve.api.admission import AdmittedRequest
from serve.api.shadow import Job, Shadow
from serve.api.similarity import Similarity
from serve.compare.observations import Observations, Observed
from serve.compare.verdict import COUNTED
from serve.experiment import ARM_HEADER, UNIT_HEADER, Experiment, ExperimentArm, InvalidExperiment, UnitKind
from serve.registry.snapshot import Caller, Snapshot, Thresholds

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
MOST_UNJUDGED = 256
_answered = Counter("lethe_experiment_requests_total", "Answers that experiments observed.", ["experiment", "arm"])
_lost = Counter("lethe_experiment_lost_total", "Observations that were not recorded.", ["why"])
_first_token = Histogram(
    "lethe_first_token_seconds", "Time to the first token, as sent by the engine or shown by a guard.", ["policy"]
)
_seconds = Histogram("lethe_request_seconds", "Time of a whole answer.", ["policy"])


@dataclass(frozen=True)
class Entry:
    """A request's place in an experiment."""

    experiment: Experiment
    unit: str
    arm: ExperimentArm
    forced: bool = False


@dataclass
class Finished:
    """An answer that was given; ``values`` grows by ``told`` once it is judged."""

    entry: Entry
    request_id: str
    caller: str
    counts: list[str]
    values: dict[str, float]
    text: str
    answers: dict[str, Finished]  # arm -> answer to the same prompt, once judged; shared by all of them
    shown: bool = True  # to the client


def unit_of(kind: UnitKind, fields: Mapping[str, Any], headers: Mapping[bytes, bytes], caller: Caller) -> str | None:
    """Whose request it is, in an experiment's terms; None if it does not say."""
    if kind == "key":
        return caller.name
    if kind == "header":
        value = headers.get(UNIT_HEADER, b"").decode("latin-1").strip()
        return f"{caller.name}\0{value}" if value else None
    if kind == "user":
        metadata = fields.get("metadata")
        named = (
            fields.get("user"),
            fields.get("safety_identifier"),
            metadata.get("user_id") if isinstance(metadata, dict) else None,
        )
        value = next((each for each in named if isinstance(each, str) and each), "")
        return f"{caller.name}\0{value}" if value else None
    if fields.get("previous_response_id") or fields.get("conversation"):
        return None  # a later turn, without the first
    turns = next((fields[name] for name in ("messages", "input", "prompt") if fields.get(name)), None)
    if isinstance(turns, list):
        asked = next((i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"), len(turns))
        turns = turns[: asked + 1]
    return None if turns is None else f"{caller.name}\0{json.dumps([fields.get('system'), turns], sort_keys=True)}"


class LiveExperiments:
    """One per API process.

    Args:
        snapshot: what is in force now.
        phrases: loads compiled phrases by fingerprint.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        observations: Observations,
        phrases: Callable[[str], CompiledPhrases],
        similarity: Similarity,
        shadow: Shadow,
    ) -> None:
        self._snapshot = snapshot
        self._observations = observations
        self._phrases = phrases
        self._similarity = similarity
        self.shadow = shadow
        self._unjudged: asyncio.Queue[Finished] = asyncio.Queue(MOST_UNJUDGED)
        self._pending: list[Observed] = []
        self._flushing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._answer: Callable[[str, bytes, AdmittedRequest], Awaitable[int]] | None = None

    def start(self, answer: Callable[[str, bytes, AdmittedRequest], Awaitable[int]]) -> None:
        """Begin to observe.

        Args:
            answer: answers (path, body) as an admitted request without showing it to anybody; returns the HTTP status.
        """
        self._answer = answer
        self.shadow.start(self._answer_in_shadow)
        self._tasks = [asyncio.create_task(self._judge()), asyncio.create_task(self._flush_now_and_then())]

    async def stop(self) -> None:
        await self.shadow.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._unjudged.empty():
            self._note(self._unjudged.get_nowait(), "not judged")
        await self.flush()

    # A request comes, and goes

    def enter(self, snapshot: Snapshot, fields: Mapping[str, Any], headers: Mapping[bytes, bytes], caller: Caller) -> Entry | None:
        """The experiment that a request takes part in, and its arm; None if in none.

        Raises:
            InvalidExperiment: an arm is forced that no running experiment has.
        """
        forced = headers.get(ARM_HEADER, b"").decode("latin-1")
        for experiment in snapshot.experiments:
            if forced:
                name, _, arm = forced.rpartition("/")
                if name in ("", experiment.name) and any(each.name == arm for each in experiment.order.arms):
                    return Entry(experiment, "", experiment.arm(arm), forced=True)
                continue
            unit = unit_of(experiment.order.unit, fields, headers, caller)
            if unit is not None and experiment.takes(unit):
                return Entry(experiment, unit, experiment.assigned(unit))
        if forced:
            raise InvalidExperiment(
                f"no running experiment has an arm {forced!r}; name it as EXPERIMENT/ARM, see GET /lethe/v1/experiments"
            )
        return None

    def completed(self, request: AdmittedRequest, status: int | None, request_id: str, path: str, body: bytes) -> None:
        """A request was answered, or its client went away (``status`` None).

        Args:
            body: as it was sent on; other arms may answer it, too.
        """
        policy = request.policy.name
        if status is not None and status < 400:
            _seconds.labels(policy).observe(request.observation.total_s)
            if request.observation.first_token_s is not None:
                _first_token.labels(policy).observe(request.observation.first_token_s)
        if (entry := request.entry) is None:
            return
        if entry.forced or status is None:
            why = ["arm forced"] if entry.forced else ["client went away"]
            self._pending.append(Observed(entry.experiment.name, "", entry.arm.name, 0, counts=why, role="count"))
            return
        finished = self._finished(entry, request, status, request_id)
        self._to_judge(finished)
        if entry.experiment.sampled(request_id) and status < 400:
            for arm in entry.experiment.order.arms:
                if arm.name != entry.arm.name:
                    self.shadow.offer(Job(finished, arm, path, body, request.caller, request.has_tools))

    def _finished(self, entry: Entry, request: AdmittedRequest, status: int, request_id: str) -> Finished:
        seen = request.observation
        values = {"error": float(status >= 400)}
        if status < 400:
            values["refused"] = float(request.blocked)
            values["total_ms"] = math.log(max(1_000 * seen.total_s, 1e-3))
            values["tokens"] = math.log(max(seen.tokens, 1))
            if seen.first_token_s is not None:
                values["first_token_ms"] = math.log(max(1_000 * seen.first_token_s, 1e-3))
                if seen.tokens > 1:
                    # A guard may show a whole answer at once: no time between tokens, and no logarithm of it.
                    values["token_ms"] = math.log(max(1_000 * (seen.total_s - seen.first_token_s) / (seen.tokens - 1), 0.1))
        assert values.keys() <= COUNTED
        counts = [f"guard: {fired}" for fired in dict.fromkeys(request.fired)]
        _answered.labels(entry.experiment.name, entry.arm.name).inc()
        return Finished(entry, request_id, request.caller.name, counts, values, seen.text if status < 400 else "", {})

    async def _answer_in_shadow(self, job: Job) -> int:
        """Answer a copy under another arm. Returns the tokens that it took. Raises whatever the answering raised."""
        shown: Finished = job.shown
        snapshot, entry = self._snapshot(), Entry(shown.entry.experiment, shown.entry.unit, job.arm)
        running = {each.name for each in snapshot.experiments}
        if entry.experiment.name not in running or job.arm.policy not in snapshot.policies:
            return 0
        policy = job.arm.policy
        request = AdmittedRequest(
            job.caller, snapshot.policies[policy], snapshot.plan(policy), snapshot.text_plans[policy], job.has_tools, in_shadow=True
        )
        assert self._answer is not None, "started"
        status = await self._answer(job.path, job.body, request)
        finished = self._finished(entry, request, status, shown.request_id)
        finished.shown, finished.answers = False, shown.answers
        self._to_judge(finished)
        return request.observation.tokens

    # Judging and writing

    def _to_judge(self, finished: Finished) -> None:
        try:
            self._unjudged.put_nowait(finished)
        except asyncio.QueueFull:
            _lost.labels("not judged").inc()
            self._note(finished, "not judged")

    async def _judge(self) -> None:
        while True:
            finished = await self._unjudged.get()
            why = []
            if finished.text:
                try:
                    told = await self._tells(finished.text)
                    if told is not None:
                        finished.values["told"] = float(told)
                except GuardError:
                    why = ["not judged"]
                except Exception:  # observing must not end because one answer could not be judged
                    logger.exception("lethe: an answer could not be judged")
                    why = ["not judged"]
            self._note(finished, *why)
            self._unjudged.task_done()

    async def _tells(self, text: str) -> bool | None:
        """Whether a text tells something of a set in force: its phrases, or what a stream filter would stop. None without a set."""
        snapshot = self._snapshot()
        if not snapshot.enabled:
            return None
        for fingerprint in {each for each in snapshot.enabled.values() if each is not None}:
            compiled = await asyncio.to_thread(self._phrases, fingerprint)
            if await asyncio.to_thread(compiled.find, text):
                return True
        thresholds = {each: snapshot.thresholds.get(each, Thresholds()).said for each in snapshot.similarity.values()}
        if thresholds:
            await self._similarity.load(also=list(thresholds))
            for clause in clauses_of(text):
                if await self._similarity.said(clause, thresholds):
                    return True
        return False

    def _note(self, finished: Finished, *counts: str) -> None:
        experiment, arm = finished.entry.experiment, finished.entry.arm.name
        about = Observed(
            experiment.name,
            experiment.anonymous(finished.entry.unit),
            arm,
            len(experiment.epochs) - 1,
            dict(finished.values),
            (*finished.counts, *counts),
            finished.request_id,
            finished.caller,
            "shown" if finished.shown else "beside",
            experiment.order.most_requests,
            experiment.order.most_units,
        )
        self._pending.append(about)
        # Differences are to the first arm, whichever of the two came first.
        control, others = experiment.control.name, finished.answers
        others[arm] = finished
        for other in [name for name in others if name != control] if arm == control else [arm] if control in others else []:
            one, two = others[other].values, others[control].values
            values = {metric: one[metric] - two[metric] for metric in one.keys() & two.keys()}
            self._pending.append(replace(about, arm=other, values=values, counts=(), role="difference"))

    async def _flush_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write down what was observed so far."""
        async with self._flushing:
            batch, self._pending = self._pending, []
            if not batch:
                return
            try:
                await asyncio.to_thread(self._observations.record, batch)
            except Exception:  # a full disk must not stop answers
                _lost.labels("not written").inc(len(batch))
                logger.exception("lethe: %d observations could not be written", len(batch))

    async def settle(self) -> None:
        """Wait until everything that was answered is judged, and write it down."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._unjudged.join(), 10)
        await self.flush()
