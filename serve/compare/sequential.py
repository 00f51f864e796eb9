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

Sources: Robbins (Ann. Math. Stat. 1970); Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (arXiv:2103.06476, Annals 2024); Lindon and
Malek (arXiv:2011.03567) for the counts; Slepian (Bell Syst. Tech. J. 1962).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_UNITS = 100
"""Units in each arm (or pairs) before anything is concluded."""
SRM_ALPHA = 0.001
SRM_CONCENTRATION = 1_000.0
"""How closely the Dirichlet prior of the sample-ratio check sits around the weights: small deviations are looked for first."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sums:
    """One metric of one arm, over units i with n_i values that add up to s_i."""

    units: int = 0
    n: float = 0.0  # sum of n_i
    total: float = 0.0  # sum of s_i
    n2: float = 0.0  # sum of n_i^2
    total2: float = 0.0  # sum of s_i^2
    cross: float = 0.0  # sum of n_i s_i


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, and where it lies with the promised confidence at every look."""

    estimate: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether 0 is ruled out."""
        return self.low > 0 or self.high < 0


def mean_and_variance(sums: Sums, *, share: bool) -> tuple[float, float]:
    """The ratio of sums and the variance of it, clustered by unit (the delta method).

    Args:
        share: the values are 0 or 1, so that a variance of nothing seen yet is not taken for none: it is at least that of a
            share with two more of each kind.

    Returns:
        (nan, inf) where nothing can be said: fewer than two units.
    """
    if sums.units < 2 or sums.n <= 0:
        return math.nan, math.inf
    mean = sums.total / sums.n
    residual = max(0.0, sums.total2 - 2 * mean * sums.cross + mean * mean * sums.n2)
    variance = sums.units / (sums.units - 1) * residual / sums.n**2
    if share:
        smoothed = (mean * sums.units + 2) / (sums.units + 4)
        variance = max(variance, smoothed * (1 - smoothed) / (sums.units + 4))
    return mean, variance


def radius(variance: float | Floats, *, alpha: float, tau: float) -> Floats:
    """Half the width of the confidence sequence. Infinite where the variance is infinite, 0 where it is 0."""
    variance = np.asarray(variance, np.float64)
    rho = 1 / tau**2
    with np.errstate(divide="ignore", invalid="ignore"):
        information = 1 / variance
        squared = 2 * variance * (1 + rho * variance) * (0.5 * np.log1p(information / rho) - math.log(alpha))
    return np.where(variance == 0, 0.0, np.where(np.isfinite(variance), np.sqrt(squared), math.inf))


def difference(arm: Sums, control: Sums, *, alpha: float, tau: float, share: bool) -> Interval:
    """How much more the arm's mean is than the control's, for independent units."""
    (one, its), (other, others) = mean_and_variance(arm, share=share), mean_and_variance(control, share=share)
    enough = min(arm.units, control.units) >= FEWEST_UNITS
    return _interval(one - other, its + others if enough else math.inf, alpha, tau)


def paired_difference(pairs: Sums, *, alpha: float, tau: float) -> Interval:
    """The mean of differences between two answers to the same prompt. A share of -1, 0 and 1 has no floor but its own units."""
    mean, variance = mean_and_variance(pairs, share=False)
    if variance == 0:  # all alike so far: as if the next two were not
        variance = 2 / (pairs.units + 4) ** 2
    return _interval(mean, variance if pairs.units >= FEWEST_UNITS else math.inf, alpha, tau)


def _interval(estimate: float, variance: float, alpha: float, tau: float) -> Interval:
    half = float(radius(variance, alpha=alpha, tau=tau))
    return Interval(estimate, estimate - half, estimate + half)


def log_evidence_of_mismatch(counts: Sequence[Mapping[str, int]], weights: Sequence[Mapping[str, float]]) -> float:
    """How strongly the numbers of units speak against the weights: a log e-value, valid at every look; log(1/alpha) is too much.

    Args:
        counts: for each epoch, arm -> units first seen in it; weights: for each epoch, arm -> weight.

    Returns:
        inf if an arm of weight 0 has units.
    """
    evidence = 0.0
    for seen, expected in zip(counts, weights, strict=True):
        whole = sum(expected.values())
        if any(count and not expected.get(arm) for arm, count in seen.items()):
            return math.inf
        shares = {arm: weight / whole for arm, weight in expected.items() if weight > 0}
        total = sum(seen.values())
        evidence += math.lgamma(SRM_CONCENTRATION) - math.lgamma(SRM_CONCENTRATION + total)
        for arm, part in shares.items():
            count, prior = seen.get(arm, 0), SRM_CONCENTRATION * part
            evidence += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(part)
    return evidence
