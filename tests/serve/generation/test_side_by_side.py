"""Side by side: how answers differ, and orders that cannot be carried out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.errors import InvalidPolicy
from guards.policy import BUILT_IN
from serve.generation.side_by_side import CompareOrder, Divergence, Incomparable, SideBySide, divergence
from serve.registry.snapshot import Snapshot


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
