"""What a model has by heart, and what its probabilities tell."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.measure.mean import Mean
from guards.measure.memorised import MEMBERSHIP, Forced, auc, exact_memorisation, extraction_strength

SCORES = st.lists(st.floats(-5, 5), min_size=1, max_size=8)


def forced(*likeliest: bool) -> Forced:
    return Forced("an answer", (-1.0,) * len(likeliest), likeliest)


def test_what_follows_by_itself_counts_from_the_last_token_that_does_not() -> None:
    assert extraction_strength(forced(True, True, True, True)) == 1.0
    assert extraction_strength(forced(False, True, True, True)) == 0.75, "one token has to be given"
    assert extraction_strength(forced(True, True, False, True)) == 0.25, "what was right before it does not help"
    assert extraction_strength(forced(True, True, True, False)) == 0.0
    assert exact_memorisation(forced(True, True, False, True)) == 0.75


def test_membership_is_scored_as_published() -> None:
    answer = Forced("abc", (-4.0, -2.0, -1.0, -1.0, -2.0), (False,) * 5)
    assert MEMBERSHIP["loss"](answer) == pytest.approx(-2.0)
    assert MEMBERSHIP["min-k"](answer) == pytest.approx(-3.0), "the least likely two of five"
    assert MEMBERSHIP["zlib"](answer) == pytest.approx(-10 / 11), "eleven bytes when compressed"


@given(SCORES, SCORES)
def test_the_area_under_the_curve_does_not_depend_on_a_scale_and_turns_with_the_sides(one: list[float], other: list[float]) -> None:
    found = auc(one, other)
    assert 0 <= found <= 1 and found == pytest.approx(1 - auc(other, one))
    assert auc([math.ldexp(each, 3) for each in one], [math.ldexp(each, 3) for each in other]) == found
    assert auc(one, one) == pytest.approx(0.5)


def test_an_interval_holds_its_mean_and_narrows_with_more_questions() -> None:
    few, many = Mean.of([[0.0], [1.0]] * 5), Mean.of([[0.0], [1.0]] * 50)
    assert few.low <= few.value == many.value == 0.5 <= few.high
    assert many.high - many.low < few.high - few.low
