"""Shadow answers make way, wait in a bounded queue, and are never awaited by anybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serve.experiment import ExperimentArm
from serve.experiments.shadow import Job, Shadow, _outcomes
from serve.registry.snapshot import LOOPBACK

ARM = ExperimentArm(name="b", policy="none")


def job(path: str = "/") -> Job:
    return Job(None, ARM, path, b"", LOOPBACK, False)  # type: ignore[arg-type]


class Engine:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.may_end = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, job: Job) -> None:
        self.began.append(job.path)
        job.spent_tokens = 10
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def outcome(name: str) -> float:
    return _outcomes.labels(name)._value.get()


def run(test: Callable[[Shadow, Engine], Coroutine[Any, Any, None]], **options: float) -> None:
    async def around() -> None:
        shadow = Shadow(**({"waiting": 3, "beside": 0, "quiet_s": 0, "at_once": 1, "tokens_per_minute": 6_000} | options))  # type: ignore[arg-type]
        engine = Engine()
        shadow.start(engine)
        try:
            await test(shadow, engine)
        finally:
            await shadow.stop()

    asyncio.run(around())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_nothing_begins_while_a_client_is_answered() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        shadow.client_comes()
        shadow.offer(job())
        await settle()
        assert engine.began == []
        shadow.client_goes()
        await settle()
        assert engine.began == ["/"]

    run(test)


def test_nothing_begins_before_it_has_been_quiet_for_a_while() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        shadow.offer(job())
        for _ in range(3):  # pauses that are too short
            shadow.client_comes()
            shadow.client_goes()
            await asyncio.sleep(0.05)
            assert engine.began == []
        await asyncio.sleep(0.5)
        assert engine.began == ["/"]

    run(test, quiet_s=0.3)


def test_what_runs_is_taken_off_when_a_client_comes_and_goes_on_first_afterwards() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        shadow.offer(job("one"))
        shadow.offer(job("two"))
        await settle()
        shadow.client_comes()
        await settle()
        assert engine.cancelled == 1 and engine.began == ["one"]
        shadow.client_goes()
        engine.may_end.set()
        await settle()
        assert engine.began == ["one", "one", "two"] and not shadow.busy

    run(test)


def test_what_was_begun_is_never_dropped_however_often_it_is_displaced() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        shadow.offer(job())
        for _ in range(20):
            await settle()
            shadow.client_comes()
            await settle()
            shadow.client_goes()
        engine.may_end.set()
        await settle()
        assert not shadow.busy and len(engine.began) == 21

    run(test)


def test_a_second_client_does_not_interrupt_an_answer_that_is_ending() -> None:
    """Ending takes a moment: the app must be told that its client is gone, and a second cancellation would cut that short."""

    async def around() -> None:
        ended, may_end = [], asyncio.Event()

        async def ends_slowly(_: Job) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await may_end.wait()
                ended.append(True)
                raise

        shadow = Shadow(waiting=3, beside=0, quiet_s=0, at_once=1, tokens_per_minute=100)
        shadow.start(ends_slowly)
        shadow.offer(job())
        await settle()
        shadow.client_comes()
        await settle()
        shadow.client_comes()
        may_end.set()
        await settle()
        assert ended == [True]
        await shadow.stop()

    asyncio.run(around())


def test_the_queue_is_bounded_and_what_does_not_fit_is_counted() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        before = outcome("dropped")
        shadow.client_comes()
        for _ in range(10):
            shadow.offer(job())
        assert outcome("dropped") == before + 7

    run(test)


def test_no_more_run_at_once_than_may_and_beside_clients_if_allowed() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        shadow.client_comes()
        for _ in range(3):
            shadow.offer(job())
        await settle()
        assert len(engine.began) == 2
        shadow.client_comes()
        await settle()
        assert engine.cancelled == 2

    run(test, beside=1, at_once=2)


def test_a_spent_budget_makes_them_wait() -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        engine.may_end.set()
        shadow.offer(job("one"))
        shadow.offer(job("two"))
        await settle()
        assert engine.began == ["one"], "ten tokens of five in a minute are spent"

    run(test, tokens_per_minute=5)


def test_a_failure_is_counted_and_the_next_one_runs() -> None:
    async def around() -> None:
        async def fails(_: Job) -> None:
            raise RuntimeError("no")

        before = outcome("failed")
        shadow = Shadow(waiting=3, beside=0, quiet_s=0, at_once=1, tokens_per_minute=100)
        shadow.start(fails)
        shadow.offer(job())
        shadow.offer(job())
        await settle()
        await shadow.stop()
        assert outcome("failed") == before + 2

    asyncio.run(around())


@pytest.mark.parametrize("running", [0, 1])
def test_stopping_ends_what_waits_and_what_runs(running: int) -> None:
    async def test(shadow: Shadow, engine: Engine) -> None:
        if not running:
            shadow.client_comes()
        shadow.offer(job())
        await settle()
        assert len(engine.began) == running
        await shadow.stop()
        assert not shadow.busy and engine.cancelled == running

    run(test)
