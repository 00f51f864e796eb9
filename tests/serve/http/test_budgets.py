"""Keys that end, and what each may use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve import clock
from serve.http.budgets import Budgets, OverBudget
from serve.registry.snapshot import SCOPES, Caller, Limits
from serve.registry.store import Registry
from serve.registry.usage import Usage

START = datetime(2026, 11, 26, 23, 0, tzinfo=UTC)


class Clock:
    """Both clocks, set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def day(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


def caller(**limits: int) -> Caller:
    return Caller("key-1", SCOPES["chat"], Limits(**limits))


def test_a_key_makes_as_many_requests_a_minute_as_it_may(tmp_path: Path) -> None:
    time = Clock()
    budgets, limited = Budgets(Usage(tmp_path / "usage.db"), time.monotonic, time.day), caller(requests_per_minute=6)
    for _ in range(6):
        budgets.admit(limited)
    with pytest.raises(OverBudget, match="6 requests a minute") as over:
        budgets.admit(limited)
    assert over.value.retry_after_s == 10
    time.seconds += 10
    budgets.admit(limited)
    with pytest.raises(OverBudget):
        budgets.admit(limited)
    budgets.admit(Caller("key-2", SCOPES["chat"]))  # others are not concerned


def test_a_day_s_tokens_are_given_anew_at_midnight(tmp_path: Path) -> None:
    time = Clock()
    budgets, limited = Budgets(Usage(tmp_path / "usage.db"), time.monotonic, time.day), caller(tokens_per_day=100)
    budgets.admit(limited)
    budgets.spent(limited, 100)
    with pytest.raises(OverBudget, match="100 of its 100 tokens of today") as over:
        budgets.admit(limited)
    assert over.value.retry_after_s == 3_600
    time.seconds += 3_600
    budgets.admit(limited)


def test_what_was_used_outlives_the_server_and_a_disk_that_is_full(tmp_path: Path) -> None:
    usage, time = Usage(tmp_path / "usage.db"), Clock()

    async def use(then: Callable[[Budgets], None]) -> None:
        budgets = Budgets(usage, time.monotonic, time.day)
        await budgets.start()
        then(budgets)
        await budgets.stop()

    asyncio.run(use(lambda budgets: budgets.spent(caller(tokens_per_day=100), 60)))
    asyncio.run(use(lambda budgets: budgets.spent(caller(tokens_per_day=100), 40)))

    def refused(budgets: Budgets) -> None:
        with pytest.raises(OverBudget):
            budgets.admit(caller(tokens_per_day=100))

    asyncio.run(use(refused))
    assert usage.of_day("2026-11-26")["key-1"].tokens == 100

    async def with_a_full_disk() -> None:
        budgets = Budgets(usage, time.monotonic, time.day)
        await budgets.start()
        budgets.spent(caller(), 5)

        def full(connection: Any, _: object) -> None:
            connection.execute("PRAGMA query_only=ON")

        sa.event.listen(usage._engine, "connect", full)
        await budgets._flush()
        sa.event.remove(usage._engine, "connect", full)
        budgets.spent(caller(), 7)
        await budgets.stop()

    asyncio.run(with_a_full_disk())
    assert usage.of_day("2026-11-26")["key-1"].tokens == 112


def test_limits_are_stored_with_the_key_and_audited(tmp_path: Path) -> None:
    registry, limits = Registry(tmp_path / "lethe.db"), Limits("2030-01-01T00:00:00+00:00", 60, 1_000, False)
    key, secret = registry.create_key("chat", "a", actor="t", limits=limits)
    found = registry.snapshot().caller(secret, open_without_keys=True)
    assert found is not None and (found.name, found.limits, found.expired) == (key, limits, False)
    assert registry.stored_keys()[0].limits == limits
    assert registry.audit()[0].detail["tokens_per_day"] == 1_000
    registry.close()


def test_a_key_that_has_expired_stays_so_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Caller("key-1", SCOPES["chat"], Limits(expires_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat()))
    assert not key.expired

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=2)

    monkeypatch.setattr(clock, "_latest", clock._latest)  # put back after the test
    with monkeypatch.context() as patch:
        patch.setattr(clock, "datetime", Later)
        assert key.expired
    assert key.expired, "the clock is back where it was"
