"""Bounds on rates that were counted."""

from __future__ import annotations

import math


def upper_bound(hits: int, trials: int, confidence: float = 0.95) -> float:
    """The rate above which ``hits`` or fewer have a probability below 1 - ``confidence``: Clopper and Pearson's exact one-sided
    bound (Biometrika 1934).

    Args:
        hits: of ``trials``; 0 <= hits <= trials.
    """
    if hits >= trials:
        return 1.0

    def at_most_hits(rate: float) -> float:
        if rate >= 1.0:
            return 0.0
        ways = (math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in range(hits + 1))
        logs = (way + i * math.log(rate) + (trials - i) * math.log1p(-rate) for i, way in enumerate(ways))
        return math.fsum(map(math.exp, logs))

    low, high = hits / trials, 1.0  # log(0) is never taken: middles lie above
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most_hits(middle) > 1 - confidence else (low, middle)
    return high
