"""Forget sets and policies: what is refused, and that it is refused with the place, the value and the rule."""

from __future__ import annotations

import pytest

from guards.errors import InvalidForgetSet, InvalidPolicy
from guards.forget_set import ForgetSet, parse_forget_set
from guards.policy import parse_policy


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "Not A Name", "phrases": ["x"]}, "name"),
        ({"name": "x"}, "the set is empty"),
        ({"name": "x", "phrases": ["x"], "phrase": "y"}, "phrase"),
        ({"name": "x", "phrases": ["x"], "expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"name": "x", "phrases": "x"}, "phrases"),
        ({"name": "x", "phrases": ["\ud800"]}, "surrogate"),
    ],
)
def test_an_impossible_set_is_refused(fields: dict, problem: str) -> None:
    with pytest.raises(InvalidForgetSet, match=problem):
        parse_forget_set(fields)


def test_the_fingerprint_is_of_the_content_not_of_its_order_or_paperwork() -> None:
    one = ForgetSet(name="a", phrases=["x", "y"], requester="me")
    assert one.fingerprint == ForgetSet(name="b", phrases=["y", "x", "x"]).fingerprint
    assert one.fingerprint != ForgetSet(name="a", phrases=["x", "y"], word_boundary=True).fingerprint
    assert one.fingerprint != ForgetSet(name="a", phrases=["x"]).fingerprint


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "none"}, "built in"),
        ({"name": "x", "on_hit": "explode"}, "on_hit"),
        ({"name": "x", "guards": {"supression": {}}}, "supression"),
        ({"name": "x", "forget_sets": "all"}, "forget_sets"),
        ({"name": "x", "refusal": ""}, "refusal"),
    ],
)
def test_an_impossible_policy_is_refused(fields: dict, problem: str) -> None:
    with pytest.raises(InvalidPolicy, match=problem):
        parse_policy(fields)
