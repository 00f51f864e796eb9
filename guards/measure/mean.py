"""A mean with its bootstrap interval.

Covered: values of one question that hang together, as several wordings do: questions are drawn, not values. Not covered: what other
questions would give that are unlike these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1_000


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over answers, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> Mean:
        """Of values in groups, one for each question: wordings of one question are not independent, so questions are drawn."""
        sums = np.array([(sum(group), len(group)) for group in groups if group])
        if not len(sums):
            return cls(0.0, 0.0, 1.0)
        drawn = np.random.default_rng(0).choice(sums, size=(RESAMPLES, len(sums))).sum(axis=1)
        low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        total, count = sums.sum(axis=0)
        return cls(float(total / count), float(low), float(high))
