"""Shadow answers: what other arms would say to live prompts, worked out in the gaps between clients.

Clients come first, in three ways: shadow work begins only after a while with few enough clients' requests under way, is taken off
the engine as soon as one more comes (which then waits for the engine's current step), and has a lower priority inside the
engine. The queue is bounded; what does not fit is dropped and counted; nobody waits for it. A job that has begun is never dropped,
however often it must start again: otherwise long answers would be lost more often than short ones, which would bias the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from serve.experiment import ExperimentArm
from serve.registry.snapshot import Caller

if TYPE_CHECKING:
    from serve.experiments.live import Answer

logger = logging.getLogger(__name__)

_outcomes = Counter("lethe_shadow_requests_total", "Shadow answers by what became of them.", ["outcome"])
_waiting_gauge = Gauge("lethe_shadow_waiting", "Shadow answers that wait.")


@dataclass
class Job:
    """A prompt that another arm is to answer."""

    shown: Answer
    arm: ExperimentArm
    path: str
    body: bytes
    caller: Caller
    has_tools: bool
    spent_tokens: int = 0  # in the attempt that is under way: read and generated


class Shadow:
    """One per API process.

    Args:
        waiting: jobs that may wait.
        beside: clients' requests beside which shadow work goes on.
        quiet_s: for how long there must have been no more of them before it begins.
        at_once: shadow answers at a time.
        tokens_per_minute: the most that they may read and generate.
    """

    def __init__(self, *, waiting: int, beside: int, quiet_s: float, at_once: int, tokens_per_minute: int) -> None:
        self._most_waiting = waiting
        self._beside = beside
        self._quiet_s = quiet_s
        self._quiet_since = -math.inf
        self._at_once = at_once
        self._per_second = tokens_per_minute / 60
        self._burst = float(tokens_per_minute)
        self._tokens, self._counted_at = self._burst, time.monotonic()
        self._waiting: deque[Job] = deque()
        self._running: dict[asyncio.Task[None], Job] = {}
        self._clients = 0
        self._changed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._answer: Callable[[Job], Awaitable[None]] | None = None
        _waiting_gauge.set_function(lambda: len(self._waiting))

    def start(self, answer: Callable[[Job], Awaitable[None]]) -> None:
        """Begin to work. ``answer`` keeps count in ``job.spent_tokens``; when it is cancelled, its answer ends before it does."""
        self._answer = answer
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        tasks = [*self._running, *([self._worker] if self._worker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._waiting.clear()

    def offer(self, job: Job) -> bool:
        """Take a job; False if too many wait, and it is dropped."""
        if len(self._waiting) >= self._most_waiting:
            _outcomes.labels("dropped").inc()
            return False
        self._waiting.append(job)
        self._changed.set()
        return True

    def client_comes(self) -> None:
        """Make way: if that is one too many, what runs goes back to the front of the queue."""
        self._clients += 1
        if self._clients > self._beside:
            for task in self._running:
                if not task.cancelling():  # it may be about to end its answer
                    task.cancel()

    def client_goes(self) -> None:
        self._clients -= 1
        if self._clients == self._beside:
            self._quiet_since = time.monotonic()
        self._changed.set()

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._waiting or self._running)

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            while (pause_s := self._pause_s()) == 0:
                job = self._waiting.popleft()
                job.spent_tokens = 0
                task: asyncio.Task[None] = asyncio.create_task(self._run(job))
                self._running[task] = job
                task.add_done_callback(self._done)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause_s)

    def _pause_s(self) -> float | None:
        """How long the next job must wait, so far as can be told; None: until something changes."""
        if not self._waiting or self._clients > self._beside or len(self._running) >= self._at_once:
            return None
        quiet_in_s = self._quiet_since + self._quiet_s - time.monotonic()
        return quiet_in_s if quiet_in_s > 0 else 0 if self._affordable() else 1.0

    async def _run(self, job: Job) -> None:
        assert self._answer is not None, "started"
        await self._answer(job)

    def _affordable(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        return self._tokens > 0

    def _done(self, task: asyncio.Task[None]) -> None:
        job = self._running.pop(task)
        self._tokens -= job.spent_tokens
        if task.cancelled():
            self._waiting.appendleft(job)
            _outcomes.labels("displaced").inc()
        elif (error := task.exception()) is not None:
            _outcomes.labels("failed").inc()
            logger.error("lethe: a shadow answer failed: %s: %s", type(error).__name__, error)
        else:
            _outcomes.labels("answered" if job.spent_tokens else "not answered").inc()
        self._changed.set()
