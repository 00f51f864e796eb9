"""Statistics that survive peeking: confidence sequences and a sample-ratio check that hold at every look at once.

A figure is a ratio of sums over units (requests of one unit are not independent of one another), its variance is clustered by unit,
and its interval is the normal-mixture confidence sequence in information time I = 1 / variance:

    radius = sqrt( 2 (I + rho) / I^2 * log( sqrt((I + rho) / rho) / alpha ) ),   rho = 1 / tau^2

where tau is the size of difference that one hopes to see. Units whose earlier requests foretell their later ones do no harm: the
correlation of two looks is then at least that of Brownian motion at the same information times, and by Slepian's inequality its
supremum is no larger.

Covered: two-sided comparisons, any stopping rule, correlated requests, several metrics and arms (Bonferroni: an interval is also an
answer). Asymptotic in the number of units: below `FEWEST_UNITS` in an arm nothing is concluded. Not covered: effects that change
over time, units that influence one another.

All functions take numbers, or arrays of them for many experiments at once.

Sources: Robbins (Ann. Math. Stat. 1970); Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (arXiv:2103.06476, Annals 2024); Lindon and
Malek (arXiv:2011.03567) for the counts; Slepian (Bell Syst. Tech. J. 1962).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

FEWEST_UNITS = 100
"""Units in each arm (or pairs) before anything is concluded."""
FEW_EVENTS = 10
"""Units with an event, or without one, below which a share's variance is not believed as it was seen."""
SRM_ALPHA = 0.001
SRM_CONCENTRATION = 1_000.0
"""How closely the Dirichlet prior of the sample-ratio check sits around the weights: small deviations are looked for first."""
Floats = NDArray[np.float64]
Number = float | Floats


@dataclass(frozen=True, slots=True)
class Sums:
    """One metric of one arm, over units i with n_i values that add up to s_i."""

    units: Any = 0
    n: Any = 0.0  # sum of n_i
    total: Any = 0.0  # sum of s_i
    n2: Any = 0.0  # sum of n_i^2
    total2: Any = 0.0  # sum of s_i^2
    cross: Any = 0.0  # sum of n_i s_i


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, and where it lies with the promised confidence at every look."""

    estimate: Any
    low: Any
    high: Any

    @property
    def decided(self) -> Any:
        """Whether 0 is ruled out."""
        return (self.low > 0) | (self.high < 0)


def mean_and_variance(sums: Sums, *, share: bool, tau: float) -> tuple[Any, Any]:
    """The ratio of sums and the variance of it, clustered by unit (the delta method).

    Args:
        share: the values are 0 or 1. Where nearly no unit has an event (or is without one), the variance is at least that of a
            share of units with two more of each kind: what was not seen yet is not ruled out.
        tau: see the module; no variance is believed that is smaller than a hundredth of what one hopes to see in one unit.

    Returns:
        (nan, inf) where nothing can be said: fewer than two units.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        units, n = np.asarray(sums.units, np.float64), np.asarray(sums.n, np.float64)
        mean = sums.total / n
        residual = np.maximum(0.0, sums.total2 - 2 * mean * sums.cross + mean * mean * sums.n2)
        variance = np.maximum(units / (units - 1) * residual / n**2, (tau / 10) ** 2 / units)
        if share:
            # How many units the events are spread over, and the requests without one: Kish's effective number.
            without, without2 = n - sums.total, sums.n2 - 2 * sums.cross + sums.total2
            spread = np.minimum(np.nan_to_num(np.square(sums.total) / sums.total2), np.nan_to_num(without**2 / without2))
            smoothed = (mean * units + 2) / (units + 4)
            variance = np.where(spread < FEW_EVENTS, np.maximum(variance, smoothed * (1 - smoothed) / (units + 4)), variance)
        undefined = (units < 2) | (n <= 0)
        return np.where(undefined, np.nan, mean), np.where(undefined, np.inf, variance)


def radius(variance: Number, *, alpha: float, tau: float) -> Floats:
    """Half the width of the confidence sequence. Infinite where the variance is infinite, 0 where it is 0."""
    variance = np.asarray(variance, np.float64)
    rho = 1 / tau**2
    with np.errstate(divide="ignore", invalid="ignore"):
        information = 1 / variance
        squared = 2 * variance * (1 + rho * variance) * (0.5 * np.log1p(information / rho) - math.log(alpha))
    return np.where(variance == 0, 0.0, np.where(np.isfinite(variance), np.sqrt(squared), math.inf))


def difference(arm: Sums, control: Sums, *, alpha: float, tau: float, share: bool) -> Interval:
    """How much more the arm's mean is than the control's, for independent units."""
    one, its = mean_and_variance(arm, share=share, tau=tau)
    other, others = mean_and_variance(control, share=share, tau=tau)
    enough = np.minimum(arm.units, control.units) >= FEWEST_UNITS
    return _interval(one - other, np.where(enough, its + others, np.inf), alpha, tau)


def paired_difference(pairs: Sums, *, alpha: float, tau: float, share: bool) -> Interval:
    """The mean of differences between two answers to the same prompt: of shares, each is -1, 0 or 1."""
    mean, variance = mean_and_variance(pairs, share=False, tau=tau)
    if share:  # as if two more units were to differ
        variance = np.maximum(variance, 2 / (np.asarray(pairs.units, np.float64) + 4) ** 2)
    return _interval(mean, np.where(np.asarray(pairs.units) >= FEWEST_UNITS, variance, np.inf), alpha, tau)


def _interval(estimate: Any, variance: Any, alpha: float, tau: float) -> Interval:
    half = radius(variance, alpha=alpha, tau=tau)
    return Interval(estimate, estimate - half, estimate + half)


def log_evidence_of_mismatch(counts: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """How strongly the numbers of units speak against the weights: a log e-value, valid at every look; log(1/alpha) is too much.

    Args:
        counts: arm -> units; weights: arm -> weight.

    Returns:
        inf if an arm of weight 0 has units.
    """
    if any(np.any(count) and not weights.get(arm) for arm, count in counts.items()):
        return math.inf
    whole = sum(weights.values())
    total = sum(np.asarray(count, np.float64) for count in counts.values())
    evidence = gammaln(SRM_CONCENTRATION) - gammaln(SRM_CONCENTRATION + total)
    for arm, weight in weights.items():
        if weight > 0:
            count, prior = counts.get(arm, 0), SRM_CONCENTRATION * weight / whole
            evidence = evidence + gammaln(prior + count) - gammaln(prior) - count * math.log(weight / whole)
    return evidence
