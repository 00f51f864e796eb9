"""How often the gate is wrong, with a guarantee: split conformal calibration.

For n held-out questions about the set, exchangeable with those to come, a threshold at the k-th smallest of their scores with
k = floor(eps (n + 1)) misses the next one with probability at most k / (n + 1) <= eps. For m prompts about other things, a
threshold above the k-th largest score with k = floor(delta (m + 1)) raises a false alarm with probability at most delta. (Vovk et
al. 2005; Angelopoulos and Bates 2023.) Any threshold between the two keeps both promises; the one in the middle is taken. Where
there is none, the bound on misses takes precedence: it is kept, and the rate of false alarms that remains is reported. Questions
that the set's names find count as found at any threshold: only those that do not name the subject need the meaning.

Covered: the average over single texts like the held-out ones; a conversation of many turns has as many chances of a false alarm.
Not covered: one particular question, and people who search for a wording that passes; the table of attacks in tests/bench/gate
measures some of those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from guards.bounds import upper_bound
from guards.errors import GuardError
from guards.similarity.declaration import DEFAULT_GATE_THRESHOLD

LOWEST_STREAM = 0.6
"""Below this, two sentences have little more in common than their topic."""


HIGHEST_STREAM = 0.95
"""Above this, a clause of the set itself in slightly other words would pass."""


class TooFewExamples(GuardError):
    """So few examples cannot support the promise that was asked for."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A threshold and what can be promised of it."""

    threshold: float  # a cosine; at least this is a hit
    epsilon: float  # P(miss) is at most this
    delta: float  # P(false alarm) is at most this; if not ``kept``, with a confidence of 95 %
    positives: int
    negatives: int
    kept: bool  # both promises were kept as asked for


def fit_threshold(positives: Sequence[float], negatives: Sequence[float], *, epsilon: float, delta: float) -> Fitted:
    """Choose a threshold.

    Args:
        positives: scores of held-out questions about the set; negatives: of prompts about other things. Infinite where a name
            matched, which no threshold changes.
        epsilon, delta: the promises asked for, in (0, 1).

    Raises:
        TooFewExamples: says how many more it takes.
    """
    n, m = len(positives), len(negatives)
    for name, rate, count, what in (
        ("epsilon", epsilon, n, "held-out paraphrases"),
        ("delta", delta, m, "prompts about other things"),
    ):
        if not 0 < rate < 1:
            raise TooFewExamples(f"{name} is {rate:g}; it must lie between 0 and 1")
        if rate * (count + 1) < 1:
            needed = math.ceil(1 / rate - 1 - 1e-9)
            raise TooFewExamples(
                f"{name} = {rate:g} cannot be stated from {count} {what}: {needed} are needed, {needed - count} more; "
                f"{count} support {name} >= {1 / (count + 1):.3g}"
            )
    missed = math.floor(epsilon * (n + 1) + 1e-9)
    highest = sorted(positives)[missed - 1]  # at most this
    alarmed = math.floor(delta * (m + 1) + 1e-9)
    lowest = math.nextafter(sorted(negatives, reverse=True)[alarmed - 1], math.inf)  # at least this
    kept = lowest <= highest and math.isfinite(lowest)
    if math.isinf(highest):  # names find so many that no question says where meaning alone must begin
        threshold = max(lowest, DEFAULT_GATE_THRESHOLD) if kept else DEFAULT_GATE_THRESHOLD
    else:
        threshold = (max(lowest, -1.0) + highest) / 2 if kept else highest
    over = sum(score >= threshold for score in negatives)
    stated = delta if kept else upper_bound(over, m)
    return Fitted(threshold, missed / (n + 1), stated, n, m, kept)


@dataclass(frozen=True, slots=True)
class FittedStream:
    """The threshold of the stream filter."""

    stream_threshold: float
    stream_delta: float | None  # P(an answer about other things is stopped) is at most this; None: nothing can be promised
    stream_negatives: int


def fit_stream_threshold(negatives: Sequence[float], *, delta: float, default: float) -> FittedStream:
    """The lowest threshold that stops at most a share ``delta`` of answers about other things, but not below `LOWEST_STREAM`.

    Args:
        negatives: for each such answer, the score of its nearest passage.
        default: taken, and nothing promised, where the answers are too few for ``delta``.
    """
    m = len(negatives)
    alarmed = math.floor(delta * (m + 1) + 1e-9)
    if alarmed < 1:
        return FittedStream(default, None, m)
    lowest = math.nextafter(sorted(negatives, reverse=True)[alarmed - 1], math.inf)
    if lowest > HIGHEST_STREAM:  # answers about other things say the same: the filter must go on seeing the set's own
        return FittedStream(HIGHEST_STREAM, upper_bound(sum(score >= HIGHEST_STREAM for score in negatives), m), m)
    return FittedStream(max(lowest, LOWEST_STREAM), alarmed / (m + 1), m)


def error_curves(positives: Sequence[float], negatives: Sequence[float], points: int = 21) -> list[tuple[float, float, float]]:
    """(threshold, share missed, share of false alarms) from the lowest to the highest score that matters."""
    finite = [score for score in (*positives, *negatives) if math.isfinite(score)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    rows = []
    for i in range(points):
        at = low + (high - low) * i / (points - 1)
        rows.append((at, sum(p < at for p in positives) / len(positives), sum(s >= at for s in negatives) / len(negatives)))
    return rows
