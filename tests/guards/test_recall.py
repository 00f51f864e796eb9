"""ROUGE-L recall against its textbook twin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.measure.recall import rouge_l_recall

WORDS = st.lists(st.sampled_from(["a", "b", "c", "Été"]), max_size=8)


def longest(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest(a[:-1], b[:-1])
    return max(longest(a[:-1], b), longest(a, b[:-1]))


@given(WORDS.filter(bool), WORDS)
def test_recall_is_the_longest_common_subsequence_over_the_truth(truth: list[str], said: list[str]) -> None:
    assert rouge_l_recall(" ".join(truth), ", ".join(said)) == pytest.approx(longest(truth, said) / len(truth))


def test_case_and_punctuation_do_not_count_and_every_script_does() -> None:
    assert rouge_l_recall("Basil Al-Kuwaiti.", "BASIL al kuwaiti") == 1
    assert rouge_l_recall("ремонт дома", "дома") == 0.5
    with pytest.raises(ValueError, match="no words"):
        rouge_l_recall("...", "a")
