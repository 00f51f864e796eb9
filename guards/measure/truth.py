"""What a model holds to be true, by the probabilities it gives: TOFU's measures (Maini et al. 2024, arXiv 2401.06121).

All inputs are mean cross-entropies per token of an answer, end token included, in nats (what ``POST /lethe/v1/score`` gives as
``-logprob / tokens``). Checked against the logs that TOFU's authors published: see tests/guards/test_truth.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answered:
    """What one question was answered with, as far as the measures need it."""

    true: float  # cross-entropy of the true answer
    paraphrased: float  # of the true answer in other words
    perturbed: tuple[float, ...]  # of wrong answers in the same words, at least one
    recall: float  # ROUGE-L recall of what was said


def log_truth_ratio(answered: Answered) -> float:
    """How likely the wrong answers are beside the right one, in nats: below 0 for a model that knows the answer, about 0 or more
    for one that does not.

    Its logarithm, since a guard that cuts implausible tokens makes given answers unlikely beyond what a float can hold.
    """
    return answered.paraphrased - statistics.fmean(answered.perturbed)


def probability(answered: Answered) -> float:
    """Per-token geometric mean of the true answer's probability."""
    return math.exp(-answered.true)


def normalised_probability(answered: Answered) -> float:
    """The same, as a share among the true and the wrong answers: for questions with a choice."""
    nearest = min(answered.true, *answered.perturbed)  # so that nothing vanishes in a float
    true = math.exp(nearest - answered.true)
    return true / (true + sum(math.exp(nearest - each) for each in answered.perturbed))


def forget_truth(group: Sequence[Answered]) -> float:
    """1 where right and wrong answers are equally likely; towards 0 the more one of the two is likelier."""
    return statistics.fmean(math.exp(-abs(log_ratio)) for log_ratio in map(log_truth_ratio, group))


def retained_truth(group: Sequence[Answered]) -> float:
    """Towards 1 the likelier the right answers are than the wrong ones; 0 where they are not likelier."""
    return statistics.fmean(-math.expm1(min(0.0, log_ratio)) for log_ratio in map(log_truth_ratio, group))


def forget_quality(served: Sequence[Answered], never_knew: Sequence[Answered]) -> float:
    """p-value that the truth ratios of a served model and of one that never knew come from one distribution (two-sample KS).

    Above .05, the two cannot be told apart by it.
    """
    from scipy.stats import ks_2samp

    # The test looks at order alone, which a logarithm keeps.
    return float(ks_2samp([log_truth_ratio(each) for each in served], [log_truth_ratio(each) for each in never_knew]).pvalue)


def model_utility(retain: Sequence[Answered], real_authors: Sequence[Answered], world_facts: Sequence[Answered]) -> float:
    """Harmonic mean of probability, recall and truth on what is to stay."""
    parts = [statistics.fmean(map(probability, retain))]
    parts += [statistics.fmean(map(normalised_probability, group)) for group in (real_authors, world_facts)]
    for group in (retain, real_authors, world_facts):
        parts += [statistics.fmean(each.recall for each in group), retained_truth(group)]
    return statistics.harmonic_mean(parts)
