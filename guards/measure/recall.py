"""How much of a true answer is said: ROUGE-L recall, and the longest passage that is repeated word for word.

Covered: word order and wording. Not covered: meaning. An answer that says the fact in other words scores low, and one that repeats
the question's phrases scores above zero without knowing anything, which is why figures are read against a reference that never
knew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

import numpy as np

CONTENT = 4
"""Letters from which a word counts as a content word."""
TELLS = 0.2
"""Share of an answer's own words, from which an answer tells it: of .1 to .7, the one whose estimates of what a model
says that never knew came nearest on two authors of TOFU (`tests/bench/README.md`)."""
VERBATIM = 5
"""Content words in a row, from which an answer counts as repeated word for word."""


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


def content_words(text: str) -> int:
    return sum(len(word) >= CONTENT for word in words_of(text))


def tells(question: str, truth: str, said: str) -> bool:
    """Whether ``said`` gives an answer away: by its content words that the question does not hold."""
    asked, words = words_of(question), words_of(said)
    own = [word for word in words_of(truth) if len(word) >= CONTENT and word not in asked]
    return bool(own) and sum(word in words for word in own) >= TELLS * len(own)


def longest_run(truth: str, said: str) -> str:
    """The passage of ``truth``, as it stands there, whose words ``said`` repeats in a row; of several, that with most content."""
    places = list(re.finditer(r"[^\W_]+", truth))
    words = [place[0].lower() for place in places]
    blocks = SequenceMatcher(None, words, words_of(said), autojunk=False).get_matching_blocks()
    passages = [truth[places[each.a].start() : places[each.a + each.size - 1].end()] for each in blocks if each.size]
    return max(passages, key=content_words, default="")


def verbatim_share(runs: Iterable[str]) -> float:
    """Share of answers whose longest run has VERBATIM content words or more; 0 of none."""
    long = [content_words(run) >= VERBATIM for run in runs]
    return sum(long) / len(long) if long else 0.0
