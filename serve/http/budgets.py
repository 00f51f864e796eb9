"""Budgets: how many requests a minute and how many tokens a day each key may use. What is beyond is a 429 that says until when.

Tokens are those of prompts and of what was shown, counted when an answer ends: what is under way when a budget is used up is still
answered, so that it may be passed by as much as runs at once. Counts outlive the server; a crash forgets the last seconds.

Not covered: tokens that a filter threw away, and those of an answer in one piece whose client left before it came.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta

from cachetools import LRUCache
from prometheus_client import Counter

from serve.clock import never_back
from serve.registry.snapshot import Caller
from serve.registry.usage import Usage, Used

logger = logging.getLogger(__name__)

FLUSH_S = 2.0
_MOST_BUCKETS = 10_000
_tokens = Counter("lethe_key_tokens_total", "Tokens of prompts and answers.", ["key"])
_exceeded = Counter("lethe_key_limited_total", "Requests that were beyond their key's budget.", ["key", "budget"])


class OverBudget(Exception):
    """A request beyond its key's budget."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.message, self.retry_after_s = message, retry_after_s


class Budgets:
    """One per API process.

    Args:
        usage: where it is written down.
        seconds: a clock that does not jump; today: the time of day. For tests.
    """

    def __init__(
        self, usage: Usage, seconds: Callable[[], float] = time.monotonic, today: Callable[[], datetime] = never_back
    ) -> None:
        self._usage = usage
        self._seconds = seconds
        self._now = today
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(_MOST_BUCKETS)  # key -> requests that it may make, as of when
        self._day = ""
        self._used: dict[str, Used] = {}  # today, written down or not
        self._unwritten: dict[tuple[str, str], Used] = {}  # (day, key)
        self._fault = ""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what was used today and begin to write. Raises StorageFault."""
        self._day = self._now().date().isoformat()
        self._used = await asyncio.to_thread(self._usage.of_day, self._day)
        self._task = asyncio.create_task(self._flush_now_and_then())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._flush()

    def admit(self, caller: Caller) -> None:
        """Count a request. Raises OverBudget."""
        self._turn_day()
        limits, key = caller.limits, caller.name
        if limits.tokens_per_day is not None and (used := self._used.get(key, Used()).tokens) >= limits.tokens_per_day:
            _exceeded.labels(key, "tokens").inc()
            now = self._now()
            midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), now.tzinfo)
            raise OverBudget(
                f"{key} has used {used:,} of its {limits.tokens_per_day:,} tokens of today; they are given anew at 00:00 UTC",
                math.ceil((midnight - now).total_seconds()),
            )
        if limits.requests_per_minute is not None:
            most, now_s = float(limits.requests_per_minute), self._seconds()
            left, at = self._buckets.get(key, (most, now_s))
            left = min(most, left + (now_s - at) * most / 60)
            if left < 1:
                self._buckets[key] = left, now_s
                _exceeded.labels(key, "requests").inc()
                wait = math.ceil((1 - left) * 60 / most)
                raise OverBudget(f"{key} may make {limits.requests_per_minute:,} requests a minute; try again in {wait} s", wait)
            self._buckets[key] = left - 1, now_s
        self._add(key, 1, 0)

    def spent(self, caller: Caller, tokens: int) -> None:
        """Count the tokens of an answer."""
        self._turn_day()
        self._add(caller.name, 0, tokens)
        _tokens.labels(caller.name).inc(tokens)

    def _add(self, key: str, requests: int, tokens: int) -> None:
        last = self._now().isoformat(timespec="seconds")
        self._used[key] = self._used.get(key, Used()).and_more(requests, tokens, last)
        place = self._day, key
        self._unwritten[place] = self._unwritten.get(place, Used()).and_more(requests, tokens, last)

    def _turn_day(self) -> None:
        day = self._now().date().isoformat()
        if day != self._day:
            self._day, self._used = day, {}

    async def _flush(self) -> None:
        batch, self._unwritten = self._unwritten, {}
        if not batch:
            return
        try:
            await asyncio.to_thread(self._usage.add, batch)
            self._fault = ""
        except Exception as error:  # noqa: BLE001 - counting goes on, whatever is wrong with the file
            for place, each in batch.items():  # it is written with what comes next
                more = self._unwritten.get(place, Used())
                self._unwritten[place] = each.and_more(more.requests, more.tokens, more.last or each.last)
            if str(error) != self._fault:  # once, not every other second
                logger.error("lethe: what keys used cannot be written down, and is kept in memory: %s", error)
            self._fault = str(error)

    async def _flush_now_and_then(self) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(FLUSH_S)
                await self._flush()
