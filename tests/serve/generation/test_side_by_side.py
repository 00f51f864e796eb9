"""Side by side: how answers differ, and orders that cannot be carried out."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.errors import InvalidPolicy
from guards.policy import BUILT_IN
from serve.generation.ask import InternalRoad
from serve.generation.side_by_side import CompareOrder, Divergence, Incomparable, SideBySide, divergence
from serve.registry.snapshot import LOOPBACK, Snapshot
from serve.request import admitted


async def _never(_: dict) -> None:
    raise AssertionError("nothing is to be asked")


tokens = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@given(tokens, tokens)
def test_a_divergence_is_where_the_first_tokens_differ(one: list[str], other: list[str]) -> None:
    found = divergence(one, other)
    if one == other:
        assert found == Divergence(None, 1.0)
    else:
        assert found.at is not None and one[: found.at] == other[: found.at]
        assert one[found.at : found.at + 1] != other[found.at : found.at + 1]
        assert 0 <= found.same < 1


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ({}, Incomparable),
        ({"question": "Why?", "messages": [{"role": "user", "content": "x"}]}, Incomparable),
        ({"question": "Why?", "arms": ["none", "none"]}, Incomparable),
        ({"question": "Why?", "arms": ["none", "unknown"]}, InvalidPolicy),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_refused_before_anything_is_asked(order: dict, error: type[Exception]) -> None:
    snapshot = Snapshot(1, {}, dict(BUILT_IN), ())
    with pytest.raises(error):
        SideBySide(_never, "model", lambda: snapshot, lambda *_: None).check(CompareOrder.model_validate(order))


def test_what_an_arm_has_generated_is_charged_also_when_its_reader_leaves() -> None:
    """A server tells a handler of a client that has gone by cancelling it, again and again until it has ended."""
    spent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = admitted.get()
        assert request is not None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                event = {"choices": [{"delta": {"content": "x"}}]}
                await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
                request.observation.tokens += 1
                await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0.05)  # as vLLM takes a moment to abort
            request.observation.tokens += 100

    async def main() -> None:
        snapshot = Snapshot(1, {}, dict(BUILT_IN), ())
        side_by_side = SideBySide(InternalRoad(app, None), "model", lambda: snapshot, lambda _, tokens: spent.append(tokens))

        async def read() -> None:
            async with aclosing(side_by_side.events(CompareOrder(question="Why?"), LOOPBACK)) as events:
                async for _ in events:
                    pass

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await asyncio.sleep(0.2)
            group.cancel_scope.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.generation.ask.END_WITHIN_S", 0.1)  # this app does not listen
        asyncio.run(main())
    assert len(spent) == 2 and all(tokens > 100 for tokens in spent)
