"""Confidence sequences: they hold however often one looks, agree with an independent implementation, and find what is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from serve.experiments.statistics import (
    FEWEST_UNITS,
    SRM_ALPHA,
    SRM_CONCENTRATION,
    Interval,
    Sums,
    difference,
    log_evidence_of_mismatch,
    mean_and_variance,
    paired_difference,
    radius,
)
from tests.bench.sequential import false_alarms, srm_false_alarms

EXPERIMENTS = 10_000
ALPHA = 0.05


def sums_of(units: list[list[float]]) -> Sums:
    n, s = np.array([len(unit) for unit in units], float), np.array([sum(unit) for unit in units])
    return Sums(len(units), n.sum(), s.sum(), (n * n).sum(), (s * s).sum(), (n * s).sum())


@pytest.mark.parametrize("kind", ["share", "rare share", "mean", "heavy mean", "paired share"])
def test_ten_thousand_experiments_without_an_effect_alarm_no_more_often_than_promised_however_often_looked_at(kind: str) -> None:
    """Requests of a unit are correlated, and units come while one looks. A rate of alpha itself passes but once in 700 times."""
    rate = false_alarms(kind, experiments=EXPERIMENTS, alpha=ALPHA, seed=1)
    assert rate <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / EXPERIMENTS), rate
    assert rate > 0, "a test that never alarms would pass as well"


def test_numbers_of_units_that_fit_the_weights_are_seldom_suspected() -> None:
    assert srm_false_alarms(experiments=EXPERIMENTS, seed=2) <= SRM_ALPHA + 3 * math.sqrt(SRM_ALPHA / EXPERIMENTS)


def test_numbers_of_units_that_do_not_fit_are_found() -> None:
    bar = math.log(1 / SRM_ALPHA)
    assert log_evidence_of_mismatch({"a": 5_000, "b": 5_000}, {"a": 1, "b": 1}) < 0
    assert log_evidence_of_mismatch({"a": 5_300, "b": 4_700}, {"a": 1, "b": 1}) > bar
    assert log_evidence_of_mismatch({"a": 5_300, "b": 4_700}, {"a": 53, "b": 47}) < bar
    assert log_evidence_of_mismatch({"a": 10, "b": 1}, {"a": 1, "b": 0}) == math.inf
    assert log_evidence_of_mismatch({}, {"a": 1, "b": 1}) == 0


def test_the_evidence_is_the_dirichlet_multinomials_against_the_multinomials() -> None:
    counts, shares = np.array([130, 220, 50]), np.array([0.3, 0.6, 0.1])
    names = ("a", "b", "c")
    found = log_evidence_of_mismatch(dict(zip(names, counts.tolist(), strict=True)), dict(zip(names, shares.tolist(), strict=True)))
    mixed = scipy.stats.dirichlet_multinomial.logpmf(counts, SRM_CONCENTRATION * shares, counts.sum())
    assert found == pytest.approx(mixed - scipy.stats.multinomial.logpmf(counts, counts.sum(), shares), abs=1e-6)


@pytest.mark.parametrize(("units", "variance"), [(200, 0.25), (1_000, 0.04), (50_000, 3.0)])
def test_intervals_are_those_of_an_independent_implementation(units: int, variance: float) -> None:
    """GrowthBook's gbstats, which tunes for a sample size instead of a difference: the two translate."""
    published = pytest.importorskip("gbstats.frequentist.tests", reason="gbstats is not installed (see deploy/lock/dev.txt)")
    statistics = pytest.importorskip("gbstats.models.statistics")
    samples = [
        statistics.SampleMeanStatistic(n=units, sum=units * mean, sum_squares=units * (variance + mean**2)) for mean in (0.4, 0.5)
    ]
    config = published.SequentialConfig(alpha=ALPHA, difference_type="absolute", sequential_tuning_parameter=5_000)
    theirs = published.SequentialTwoSidedTTest(*samples, config)
    low, high = theirs.confidence_interval
    scale = theirs.variance * 2 * units  # their time is the sample size, ours is information
    ours = radius(theirs.variance, alpha=ALPHA, tau=theirs.rho * math.sqrt(scale))
    assert (high - low) / 2 == pytest.approx(float(ours), rel=1e-9)


def test_a_mean_and_its_variance_are_those_of_the_textbook() -> None:
    rng = np.random.default_rng(3)
    single = [[value] for value in rng.normal(size=500)]
    mean, variance = mean_and_variance(sums_of(single), share=False, tau=0.1)
    assert mean == pytest.approx(np.mean(single)) and variance == pytest.approx(np.var(single, ddof=1) / 500)
    doubled = [[value, value] for (value,) in single]  # the same thing said twice is no more evidence
    for one, other in zip(mean_and_variance(sums_of(doubled), share=False, tau=0.1), (mean, variance), strict=True):
        assert one == pytest.approx(float(other))


def test_nothing_is_concluded_from_few_units_or_from_none() -> None:
    few, many = sums_of([[1.0]] * (FEWEST_UNITS - 1)), sums_of([[0.0]] * 10_000)
    assert not difference(few, many, alpha=0.05, tau=0.05, share=True).decided
    assert math.isnan(difference(Sums(), Sums(), alpha=0.05, tau=0.05, share=True).estimate)
    assert not difference(Sums(), Sums(), alpha=0.05, tau=0.05, share=True).decided
    assert not paired_difference(Sums(), alpha=0.05, tau=0.05, share=True).decided


def test_nothing_seen_is_not_taken_for_certainty() -> None:
    none = sums_of([[0.0]] * 200)
    assert difference(none, none, alpha=0.05, tau=0.05, share=True).high > 0.02
    assert paired_difference(none, alpha=0.05, tau=0.05, share=True).high > 0.01


def test_many_requests_of_a_unit_are_evidence_once_events_are_spread_over_units() -> None:
    """A share that is seen often and everywhere is known better than one value for each unit would tell."""
    rng = np.random.default_rng(5)
    often = sums_of([[float(x)] * 1 for x in rng.random(500) < 0.3])
    many = sums_of([(rng.random(100) < 0.3).astype(float).tolist() for _ in range(500)])
    few, spread = (mean_and_variance(sums, share=True, tau=0.05)[1] for sums in (often, many))
    assert spread < few / 50
    one = sums_of([[0.0] * 100] * 499 + [[1.0] * 100])  # all events are one unit's
    assert mean_and_variance(one, share=True, tau=0.05)[1] > 2 / 504**2


def test_rounding_decides_nothing_where_all_answers_are_equally_long() -> None:
    value = math.log(24)
    for units in range(100, 400, 7):
        one = Sums(units, units, sum([value] * units), units, sum([value**2] * units), sum([value] * units))
        other = sums_of([[value]] * (units + 3))
        assert not difference(one, other, alpha=0.05, tau=0.1, share=False).decided
        differences = Sums(units, units, 1e-13, units, 1e-28, 1e-14)
        assert not paired_difference(differences, alpha=0.05, tau=0.1, share=False).decided


def test_what_is_there_is_found_and_signed() -> None:
    rng = np.random.default_rng(4)
    more, less = (sums_of([[float(x)] for x in rng.random(5_000) < p]) for p in (0.6, 0.4))
    assert difference(more, less, alpha=0.05, tau=0.05, share=True).low > 0.1
    assert difference(less, more, alpha=0.05, tau=0.05, share=True).high < -0.1
    paired = sums_of([[float(x)] for x in rng.normal(0.1, 0.3, 2_000)])
    assert paired_difference(paired, alpha=0.05, tau=0.1, share=False).low > 0


def test_an_interval_that_holds_zero_decides_nothing() -> None:
    assert not Interval(0.1, -0.1, 0.3).decided and Interval(0.1, 0.05, 0.3).decided
