"""How much of an answer a model has by heart, and whether the probabilities that it gives tell that it was trained on it.

Covered: exact memorisation (Tirumala et al. 2022, arXiv 2205.10770) and extraction strength (Carlini et al. 2021, arXiv
2012.07805), both under teacher forcing; membership by loss, by zlib (Carlini et al. 2021) and by Min-K % (Shi et al. 2024, arXiv
2310.16789). Not covered: Min-K++, which needs the whole distribution at every place, and attacks that train models of their own.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MIN_K = 0.4
"""Share of an answer's least likely tokens that Min-K looks at; OpenUnlearning's choice for TOFU."""


@dataclass(frozen=True, slots=True)
class Forced:
    """An answer as a model would say it, token by token, after its question.

    Args:
        logprobs: of each token, after the true ones before it; nats. likeliest: whether no other token is likelier.
    """

    text: str
    logprobs: tuple[float, ...]
    likeliest: tuple[bool, ...]


def exact_memorisation(answer: Forced) -> float:
    """Share of the tokens that greedy decoding would say after the true ones before them, in [0, 1]."""
    return statistics.fmean(answer.likeliest)


def extraction_strength(answer: Forced) -> float:
    """Share of the answer that greedy decoding goes on with by itself, once the beginning is given; 1 = all of it."""
    given = max((place + 1 for place, each in enumerate(answer.likeliest) if not each), default=0)
    return 1 - given / len(answer.likeliest)


def _min_k(answer: Forced) -> float:
    least = sorted(answer.logprobs)[: max(1, int(MIN_K * len(answer.logprobs)))]
    return statistics.fmean(least)


MEMBERSHIP: Mapping[str, Callable[[Forced], float]] = {
    "loss": lambda answer: statistics.fmean(answer.logprobs),
    "zlib": lambda answer: sum(answer.logprobs) / len(zlib.compress(answer.text.encode())),
    "min-k": _min_k,
}
"""Attack -> its score of one answer; the higher, the rather it was trained on."""


def auc(members: Sequence[float], strangers: Sequence[float]) -> float:
    """Probability that a member's score is above a stranger's, ties by half: .5 tells nothing."""
    pairs = [(one > other) + 0.5 * (one == other) for one in members for other in strangers]
    return statistics.fmean(pairs)
