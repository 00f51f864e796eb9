"""The promises of a calibrated gate, by simulation; and what it refuses to promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.bounds import upper_bound
from guards.similarity.calibrate import (
    HIGHEST_STREAM,
    LOWEST_STREAM,
    TooFewExamples,
    error_curves,
    fit_stream_threshold,
    fit_threshold,
)

scores = st.lists(st.floats(-1, 1), min_size=20, max_size=120)


@pytest.mark.parametrize(("n", "epsilon"), [(40, 0.05), (99, 0.01), (25, 0.2)])
def test_the_share_of_misses_stays_below_what_was_promised(n: int, epsilon: float) -> None:
    """4,000 calibrations, one new question each: the mean of Bernoulli(<= eps), so 4 standard errors above eps is 3e-5 unlikely."""
    generator = np.random.default_rng(n)
    missed, alarmed, trials = 0, 0, 4_000
    for _ in range(trials):
        positives, negatives = generator.normal(0.85, 0.05, n + 1), generator.normal(0.4, 0.12, 130)
        fitted = fit_threshold(positives[1:].tolist(), negatives[1:].tolist(), epsilon=epsilon, delta=0.01)
        missed += positives[0] < fitted.threshold
        alarmed += negatives[0] >= fitted.threshold
    slack = 4 * math.sqrt(epsilon * (1 - epsilon) / trials)
    assert missed / trials <= epsilon + slack
    assert alarmed / trials <= 0.01 + 4 * math.sqrt(0.01 / trials)


def test_where_the_two_overlap_misses_are_promised_and_the_false_alarms_that_remain_are_said() -> None:
    generator = np.random.default_rng(0)
    missed = alarmed = 0.0
    for _ in range(1_000):
        positives, negatives = generator.normal(0.5, 0.2, 41), generator.normal(0.4, 0.2, 131)
        fitted = fit_threshold(positives[1:].tolist(), negatives[1:].tolist(), epsilon=0.05, delta=0.01)
        assert not fitted.kept and fitted.delta > 0.01
        missed += positives[0] < fitted.threshold
        alarmed += (negatives[0] >= fitted.threshold) - fitted.delta
    assert missed / 1_000 <= 0.05 + 4 * math.sqrt(0.05 / 1_000)
    assert alarmed / 1_000 <= 4 * 0.5 / math.sqrt(1_000)


@given(scores, scores, st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_a_fitted_threshold_keeps_both_shares_on_its_own_examples(
    positives: list[float], negatives: list[float], epsilon: float, delta: float
) -> None:
    fitted = fit_threshold(positives, negatives, epsilon=epsilon, delta=delta)
    assert sum(score < fitted.threshold for score in positives) < epsilon * (len(positives) + 1)
    if fitted.kept:
        assert sum(score >= fitted.threshold for score in negatives) <= delta * (len(negatives) + 1)
    assert fitted.epsilon <= epsilon + 1e-9


@pytest.mark.parametrize(
    ("positives", "negatives", "message"),
    [
        (10, 200, r"epsilon = 0\.01 cannot be stated from 10 held-out paraphrases: 99 are needed, 89 more"),
        (99, 20, r"delta = 0\.01 cannot be stated from 20 prompts about other things: 99 are needed, 79 more"),
        (0, 200, r"99 are needed, 99 more"),
    ],
)
def test_what_the_examples_cannot_support_is_refused_with_the_number_needed(positives: int, negatives: int, message: str) -> None:
    with pytest.raises(TooFewExamples, match=message):
        fit_threshold([0.9] * positives, [0.1] * negatives, epsilon=0.01, delta=0.01)


def test_exactly_as_many_examples_as_are_needed_are_enough() -> None:
    fitted = fit_threshold([0.8] * 98 + [0.7], [0.1] * 99, epsilon=0.01, delta=0.01)
    assert fitted.epsilon == pytest.approx(0.01) and 0.1 < fitted.threshold <= 0.7


def test_names_in_other_prompts_count_as_false_alarms_that_no_threshold_prevents() -> None:
    fitted = fit_threshold([0.8] * 40, [math.inf] * 5 + [0.1] * 95, epsilon=0.05, delta=0.01)
    assert not fitted.kept and fitted.delta == pytest.approx(upper_bound(5, 100))
    assert math.isfinite(fitted.threshold)


def test_questions_that_a_name_finds_are_not_missed_at_any_threshold() -> None:
    """So they do not pull it down to where prompts about other things are."""
    named, others = [math.inf] * 39, [0.8] + [0.1] * 99
    assert fit_threshold([*named, 0.3], others, epsilon=0.05, delta=0.02).threshold == 0.75, "two misses are allowed"
    near = fit_threshold([*named, 0.3], [0.8, 0.8, 0.79] + [0.1] * 97, epsilon=0.05, delta=0.02)
    assert near.kept and near.threshold == pytest.approx(0.8, abs=1e-6), "above the second false alarm"
    bound = fit_threshold([math.inf] * 35 + [0.5, 0.6, 0.7, 0.8, 0.9], others, epsilon=0.05, delta=0.02)
    assert bound.kept and 0.1 < bound.threshold < 0.6 and bound.epsilon == pytest.approx(2 / 41)
    none = fit_threshold([math.inf] * 40, [math.inf] * 5 + [0.1] * 95, epsilon=0.05, delta=0.01)
    assert not none.kept and none.threshold == 0.75


def test_the_stream_threshold_promises_nothing_from_too_few_answers() -> None:
    few = fit_stream_threshold([0.5] * 20, delta=0.01, default=0.8)
    assert few.stream_threshold == 0.8 and few.stream_delta is None
    enough = fit_stream_threshold([0.5] * 98 + [0.7], delta=0.01, default=0.8)
    assert 0.7 < enough.stream_threshold < 0.71 and enough.stream_delta == pytest.approx(0.01)
    assert fit_stream_threshold([0.1] * 200, delta=0.01, default=0.8).stream_threshold == LOWEST_STREAM


def test_an_answer_about_others_that_says_the_same_does_not_switch_the_filter_off() -> None:
    fitted = fit_stream_threshold([0.3] * 99 + [1.0], delta=0.01, default=0.8)
    assert fitted.stream_threshold == HIGHEST_STREAM and fitted.stream_delta is not None and fitted.stream_delta > 0.01


@pytest.mark.parametrize(
    ("hits", "trials", "bound"), [(0, 20, 0.1391), (0, 100, 0.02951), (3, 40, 0.18259), (5, 5, 1.0), (50, 2_000, 0.03154)]
)
def test_the_bound_on_a_counted_rate_is_clopper_and_pearsons(hits: int, trials: int, bound: float) -> None:
    assert upper_bound(hits, trials) == pytest.approx(bound, abs=1e-4)


def test_curves_go_from_no_misses_to_no_false_alarms() -> None:
    curves = error_curves([0.8, 0.9], [0.1, 0.2, math.inf])
    assert curves[0][1] == 0.0 and curves[0][2] == 1.0
    assert curves[-1][2] == pytest.approx(1 / 3) and curves[-1][1] == pytest.approx(0.5)
