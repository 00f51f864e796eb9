"""How much of a true answer is said: ROUGE-L recall.

Covered: word order and wording. Not covered: meaning. An answer that says the fact in other words scores low, and one that repeats
the question's phrases scores above zero without knowing anything, which is why figures are read against a reference that never
knew.
"""

from __future__ import annotations

import re

import numpy as np


def rouge_l_recall(truth: str, said: str) -> float:
    """Words of ``truth`` that ``said`` contains in the same order, as a fraction, in [0, 1]; without stemming.

    Raises:
        ValueError: ``truth`` has no words.

    Source: Lin 2004, longest common subsequence; words as in Google's ``rouge_score`` (lower case, a-z and 0-9), but every other
    script's letters count too.
    """
    wanted, words = words_of(truth), words_of(said)
    if not wanted:
        raise ValueError(f"the true answer {truth!r} has no words")
    longest = np.zeros(len(wanted) + 1, dtype=np.int64)
    for word in words:
        before = longest.copy()
        matched = np.array([word == each for each in wanted])
        longest[1:] = np.maximum.accumulate(np.where(matched, before[:-1] + 1, before[1:]))
    return float(longest[-1]) / len(wanted)


def words_of(text: str) -> list[str]:
    """In lower case."""
    return re.findall(r"[^\W_]+", text.lower())
