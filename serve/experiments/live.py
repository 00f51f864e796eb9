"""Experiments on live traffic: which arm answers a request, what is observed of it, and what other arms would have said.

A request that names no policy may take part; its arm's policy then answers it, through the same choke point as every other. In
shadow and paired mode the other arms answer a copy of it, which nobody is shown (`serve.experiments.shadow`). Answers are judged
(do they tell what a set in force holds?) after they were given, in the same way for every arm, and are then forgotten.

Covered: all five generating endpoints, streamed or not. Not covered: answers in the background; feedback that comes after
`KEPT_REQUESTS` more requests; callers who look for an arm by changing what they say they are (unit "key" is the one that they
cannot choose).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import Counter, Histogram

from guards.errors import GuardError
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.stream import clauses_of
from guards.suppression.artifact import CompiledPhrases
from serve.control.similarity import Similarity
from serve.experiment import ARM_HEADER, UNIT_HEADER, InvalidExperiment, UnitKind
from serve.experiments.measurements import DROPPED, Measurement, Measurements
from serve.experiments.shadow import Job, Shadow
from serve.generation.ask import InternalRoad
from serve.registry.plans import calibrated_stream_threshold
from serve.registry.snapshot import Caller, Snapshot
from serve.request import Entry, RequestContext
from serve.sqlite import StorageFault

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
MOST_UNJUDGED = 256
MOST_PENDING = 20_000
"""Measurements that wait for a disk that is full."""
_answered = Counter("lethe_experiment_requests_total", "Answers that experiments observed.", ["experiment", "arm"])
_lost = Counter("lethe_experiment_lost_total", "Measurements that were not recorded.", ["why"])
_first_token = Histogram(
    "lethe_first_token_seconds", "Time to the first token, as sent by the engine or shown by a guard.", ["policy"]
)
_seconds = Histogram("lethe_request_seconds", "Time of a whole answer.", ["policy"])


@dataclass
class Answer:
    """What one arm said to one prompt, until it is judged."""

    entry: Entry
    request_id: str
    siblings: dict[str, Answer]  # arm -> its judged answer to the same prompt; shared by all of them
    values: dict[str, float]  # those that pairs are compared by; ``told`` is added
    text: str | None  # None if it cannot be read


def _paired_values(request: RequestContext) -> dict[str, float]:
    """What says the same of an answer whether a client was shown it or not."""
    return {"refused": float(request.blocked), "tokens": math.log(max(request.observation.tokens, 1))}


def _guard_events(request: RequestContext) -> list[str]:
    return [f"guard: {event}" for event in dict.fromkeys(request.guard_events)]


def _log_ms(seconds: float) -> float:
    """A guard may show a whole answer at once: no time between tokens has no logarithm."""
    return math.log(max(1_000 * seconds, 0.1))


def _measurement(entry: Entry, **fields: Any) -> Measurement:
    experiment = entry.experiment
    fields |= {"most_requests": experiment.order.most_requests, "most_units": experiment.order.most_units}
    return Measurement(experiment.id, experiment.anonymous(entry.unit), entry.arm.name, experiment.epoch, **fields)


def unit_of(
    kind: UnitKind, fields: Mapping[str, Any], headers: Mapping[bytes, bytes], caller: Caller, header: bytes = UNIT_HEADER
) -> str | None:
    """Whose request it is, in an experiment's terms; None if it does not say.

    A conversation is known by what its user said first. System prompts are not looked at: agents write dates, hashes and bills into
    theirs that change with every request.
    """
    if kind == "key":
        return caller.name
    if kind == "header":
        value = headers.get(header.lower(), b"").decode("latin-1").strip()
        return f"{caller.name}\0{value}" if value else None
    if kind == "user":
        metadata = fields.get("metadata")
        named = (
            fields.get("user"),
            fields.get("safety_identifier"),
            metadata.get("user_id") if isinstance(metadata, dict) else None,
        )
        value = next((_without_session(each) for each in named if isinstance(each, str) and each), "")
        return f"{caller.name}\0{value}" if value else None
    if fields.get("previous_response_id") or fields.get("conversation"):
        return None  # a later turn, without the first
    turns = next((fields[name] for name in ("messages", "input", "prompt") if fields.get(name)), None)
    if isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns):
        said = (turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
        turns = next(said, None)
    return None if turns is None else f"{caller.name}\0{_said(turns)}"


def _said(content: Any) -> str:
    """What a turn says, whichever way it is put: as one text, as parts, with marks for a cache that come and go."""
    if isinstance(content, str):
        return " ".join(content.split())
    if not isinstance(content, list):
        return json.dumps(content, sort_keys=True)
    texts = []
    for part in content:
        if isinstance(part, dict):
            text = part.get("text")
            kept = {key: value for key, value in part.items() if key != "cache_control"}
            texts.append(text if isinstance(text, str) else json.dumps(kept, sort_keys=True))
        else:
            texts.append(part if isinstance(part, str) else json.dumps(part))
    return " ".join(" ".join(texts).split())


def _without_session(user: str) -> str:
    """A user's id without the session that agents put behind it, or into it where it is JSON."""
    with suppress(ValueError, RecursionError):
        fields = json.loads(user)
        if isinstance(fields, dict):
            return json.dumps({key: value for key, value in fields.items() if "session" not in key.lower()}, sort_keys=True)
    return _SESSION.sub("", user)


_SESSION = re.compile(r"_session_[0-9A-Za-z-]+$")
RETRIED = b"x-stainless-retry-count"
"""How often a client's library has sent a request before, as OpenAI's and Anthropic's libraries say."""
_HEALTH_CHECKS = ("test from litellm",)
"""What proxies say to find out whether a model answers."""


def uncounted(fields: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> str:
    """Why a request says nothing about its arm; empty if it does.

    A retry belongs to a request that was counted before, as failed or left. A health check asks for one token of one short text:
    nobody waits for the answer.
    """
    if headers.get(RETRIED, b"0").strip() not in (b"", b"0"):
        return "retries"
    turns = next((fields[name] for name in ("messages", "input", "prompt") if fields.get(name)), None)
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
        turns = turns[0].get("content")
    said = _said(turns) if isinstance(turns, str | list) else ""
    most = next((fields[name] for name in ("max_tokens", "max_completion_tokens", "max_output_tokens") if name in fields), None)
    asks_for_a_number = fields.get("logprobs") not in (None, False)  # a classifier, which needs no more than one token
    if said.lower() in _HEALTH_CHECKS or (most == 1 and len(said) <= MOST_OF_A_CHECK and not asks_for_a_number):
        return "health checks"
    return ""


MOST_OF_A_CHECK = 64
"""Characters of what a health check says."""


class LiveExperiments:
    """One per API process.

    Args:
        snapshot: what is in force now.
        phrases: loads compiled phrases by fingerprint.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        measurements: Measurements,
        phrases: Callable[[str], CompiledPhrases],
        similarity: Similarity,
        shadow: Shadow,
    ) -> None:
        self._snapshot = snapshot
        self._measurements = measurements
        self._phrases = phrases
        self._similarity = similarity
        self.shadow = shadow
        self._unjudged: asyncio.Queue[Answer] = asyncio.Queue(MOST_UNJUDGED)
        self._pending: list[Measurement] = []
        self._fault = ""  # why they cannot be written, while they cannot
        self._flushing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._road: InternalRoad | None = None

    def start(self, road: InternalRoad) -> None:
        """Begin to observe. Shadow answers are asked for by ``road``."""
        self._road = road
        self.shadow.start(self._answer_in_shadow)
        self._tasks = [asyncio.create_task(self._judge()), asyncio.create_task(self._flush_now_and_then())]

    async def stop(self) -> None:
        await self.shadow.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._unjudged.empty():
            self._judged(self._unjudged.get_nowait(), None)
        await self.flush()

    # A request comes, and goes

    def enter(self, snapshot: Snapshot, fields: Mapping[str, Any], headers: Mapping[bytes, bytes], caller: Caller) -> Entry | None:
        """The experiment that a request takes part in, and its arm; None if in none.

        Raises:
            InvalidExperiment: an arm is forced that no running experiment has.
        """
        if fields.get("background"):
            return None  # it is answered later, when nobody watches
        if not caller.limits.in_experiments and not headers.get(ARM_HEADER):
            return None
        forced = headers.get(ARM_HEADER, b"").decode("latin-1")
        for experiment in snapshot.experiments:
            if forced:
                name, _, arm = forced.rpartition("/")
                if name in ("", experiment.name) and any(each.name == arm for each in experiment.order.arms):
                    return Entry(experiment, "", experiment.arm(arm), forced=True)
                continue
            unit = unit_of(experiment.order.unit, fields, headers, caller, experiment.order.header.encode())
            if unit is not None and experiment.takes(unit):
                return Entry(experiment, unit, experiment.assigned(unit), uncounted=uncounted(fields, headers))
        if forced:
            raise InvalidExperiment(
                f"no running experiment has an arm {forced!r}; name it as EXPERIMENT/ARM, see GET /lethe/v1/experiments"
            )
        return None

    def completed(self, request: RequestContext, status: int | None, request_id: str, path: str, body: bytes) -> None:
        """A request was answered, or its client went away (``status`` None).

        Args:
            body: as it was sent on; other arms may answer it, too.
        """
        seen, entry = request.observation, request.entry
        failed = seen.failed or (status is not None and status >= 400)
        whole = status is not None and not failed
        if whole:
            _seconds.labels(request.policy.name).observe(seen.total_s)
            if seen.first_token_s is not None:
                _first_token.labels(request.policy.name).observe(seen.first_token_s)
        if entry is None:
            return
        if entry.forced or entry.uncounted:
            self._pending.append(_measurement(entry, role="count", counts=["arm forced" if entry.forced else entry.uncounted]))
            return
        values = {"left": float(status is None)}
        if status is not None:
            values["error"] = float(failed)
        if whole:
            values |= _paired_values(request)
            values["total_ms"] = _log_ms(seen.total_s)
            if seen.first_token_s is not None:
                values["first_token_ms"] = _log_ms(seen.first_token_s)
                if seen.tokens > 1:
                    values["token_ms"] = _log_ms((seen.total_s - seen.first_token_s) / (seen.tokens - 1))
        caller = request.caller.name
        # At once, so that feedback finds it; what takes longer to find out is added.
        self._pending.append(_measurement(entry, request=request_id, caller=caller, values=values, counts=_guard_events(request)))
        _answered.labels(entry.experiment.name, entry.arm.name).inc()
        if not whole:
            return
        answer = self._to_judge(request, entry, request_id, {})
        if not entry.experiment.sampled(request_id):
            return
        for arm in entry.experiment.order.arms:
            if arm.name == entry.arm.name:
                continue
            if not self.shadow.offer(Job(answer, arm, path, body, request.caller, request.has_tools)):
                self._pending.append(_measurement(replace(entry, arm=arm), role="count", counts=[DROPPED]))

    async def _answer_in_shadow(self, job: Job) -> None:
        """Answer a copy under another arm, and compare. Raises whatever the answering raised."""
        snapshot, entry = self._snapshot(), replace(job.shown.entry, arm=job.arm)
        running = {each.id: each.epoch for each in snapshot.experiments}
        if running.get(entry.experiment.id) != entry.experiment.epoch:
            return  # it was stopped, or counts anew
        policy = job.arm.policy
        plan, text = snapshot.plan(policy), snapshot.text_plans[policy]
        request = RequestContext(job.caller, snapshot.policies[policy], plan, text, job.has_tools, entry=entry, in_shadow=True)
        assert self._road is not None, "started"
        try:
            status = await self._road.status(job.path, job.body, request)
        finally:
            job.spent_tokens = request.observation.prompt_tokens + request.observation.tokens
        if status >= 400 or request.observation.failed:
            self._pending.append(_measurement(entry, role="count", counts=["failed in shadow"]))
            return
        _answered.labels(entry.experiment.name, entry.arm.name).inc()
        request_id, values = job.shown.request_id, _paired_values(request)
        self._pending.append(_measurement(entry, request=request_id, role="later", values=values, counts=_guard_events(request)))
        self._to_judge(request, entry, request_id, job.shown.siblings)

    # Judging and writing

    def _to_judge(self, request: RequestContext, entry: Entry, request_id: str, siblings: dict[str, Answer]) -> Answer:
        seen = request.observation
        answer = Answer(entry, request_id, siblings, _paired_values(request), seen.text if seen.readable else None)
        try:
            self._unjudged.put_nowait(answer)
        except asyncio.QueueFull:
            _lost.labels("not judged").inc()
            self._judged(answer, None)
        return answer

    async def _judge(self) -> None:
        """Answers one after the other. A gate that waits for the encoder waits for one clause of these at most."""
        while True:
            answer = await self._unjudged.get()
            try:
                told = None if answer.text is None else await self._tells(answer.text)
            except GuardError:
                told = None
            except Exception:  # observing must not end because one answer could not be judged
                logger.exception("lethe: an answer could not be judged")
                told = None
            self._judged(answer, told)
            self._unjudged.task_done()

    async def _tells(self, text: str) -> bool:
        """Whether a text tells something of a set in force: its phrases, or what a stream filter would stop.

        Raises:
            GuardError: one of the two cannot be asked, so that neither a yes nor a no would mean anything.
        """
        snapshot = self._snapshot()
        embedded = [made for made in snapshot.sets.values() if "similarity" in made.artifacts]
        thresholds = {made.artifacts["similarity"]: calibrated_stream_threshold(made) for made in embedded}
        if thresholds:
            if self._similarity.failure is not None:
                raise EncoderUnavailable(self._similarity.failure)
            await self._similarity.load(also=list(thresholds))
        for fingerprint in {made.artifacts["phrases"] for made in snapshot.sets.values() if "phrases" in made.artifacts}:
            compiled = await asyncio.to_thread(self._phrases, fingerprint)
            if await asyncio.to_thread(compiled.find, text):
                return True
        for clause in clauses_of(text) if thresholds else ():
            if await self._similarity.judge_passage(clause, thresholds):
                return True
        return False

    def _judged(self, answer: Answer, told: bool | None) -> None:
        entry, request = answer.entry, answer.request_id
        if told is None:
            self._pending.append(_measurement(entry, role="count", counts=["not judged"]))
        else:
            answer.values["told"] = float(told)
            self._pending.append(_measurement(entry, request=request, role="later", values={"told": float(told)}))
        # Differences are to the first arm, whichever of the two came first.
        control, arm, answers = entry.experiment.control.name, entry.arm.name, answer.siblings
        answers[arm] = answer
        for other in [name for name in answers if name != control] if arm == control else [arm] if control in answers else []:
            one, two = answers[other].values, answers[control].values
            values = {metric: one[metric] - two[metric] for metric in one.keys() & two.keys()}
            self._pending.append(_measurement(answers[other].entry, request=request, role="difference", values=values))

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
                await asyncio.to_thread(self._measurements.record, batch)
                self._fault = ""
            except StorageFault as error:  # a full disk must not stop answers; when there is room again, they are written
                kept = [*batch, *self._pending]
                self._pending = kept[-MOST_PENDING:]
                _lost.labels("not written").inc(len(kept) - len(self._pending))
                if str(error) != self._fault:  # once, not every second
                    logger.error("lethe: measurements of experiments cannot be written, and wait in memory: %s", error)
                self._fault = str(error)
            except Exception:
                _lost.labels("not written").inc(len(batch))
                logger.exception("lethe: %d measurements could not be written", len(batch))

    async def settle(self) -> None:
        """Wait a moment for what was answered to be judged, and write it down."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._unjudged.join(), 2)
        await self.flush()
