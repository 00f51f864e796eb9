"""The sample of ordinary text: counts are those of a plain search, and names pass where words do not."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.ordinary import SAMPLE, ordinary_counts, sample_words, starts_word, why_never_meant

HEADINGS = re.compile(r"^== .+ ==$", flags=re.MULTILINE)
TEXT = " # ".join(HEADINGS.split(SAMPLE.read_text("utf-8"))[:-1])
SQUEEZED = re.sub(r"\s+", " ", TEXT)
WORDS = SQUEEZED.split()


def test_the_sample_has_english_of_some_length_and_sixteen_other_languages() -> None:
    assert len(HEADINGS.findall(SAMPLE.read_text("utf-8"))) == 1 + 16 + 1
    assert sample_words() > 5_000


@given(st.integers(0, len(WORDS) - 4), st.integers(1, 3), st.booleans(), st.booleans())
def test_counts_are_those_of_a_plain_search(start: int, length: int, case_sensitive: bool, word_boundary: bool) -> None:
    phrase = " ".join(WORDS[start : start + length])
    text, wanted = (SQUEEZED, phrase) if case_sensitive else (SQUEEZED.casefold(), phrase.casefold())
    places = [match.start() for match in re.finditer(f"(?={re.escape(wanted)})", text)]
    expected = sum(not word_boundary or starts_word(text, place) for place in places)
    if "#" not in phrase:  # which separates the parts here
        assert ordinary_counts([phrase], case_sensitive, word_boundary)[0].total == expected


@pytest.mark.parametrize(
    "phrase", ["the", "The", "and", " of ", "ing", "une", "NICHT", "jest", "не", "και", "です", "的", "이", "của"]
)
def test_frequent_words_of_any_language_are_too_common(phrase: str) -> None:
    assert ordinary_counts([phrase])[0].too_common or why_never_meant(phrase)


@pytest.mark.parametrize("phrase", ["Kowalczyk", "Hogwarts", "Granger", "+49 30 9018 2000", "中村", "Ольга", "bread", "pancake"])
def test_names_and_rare_words_are_not(phrase: str) -> None:
    assert not ordinary_counts([phrase])[0].too_common


def test_white_space_and_letter_case_do_not_count_unless_asked() -> None:
    plain, odd, exact = (
        ordinary_counts(["lemon juice"]),
        ordinary_counts(["LEMON\u00a0 juice"]),
        ordinary_counts(["LEMON juice"], True),
    )
    assert plain == odd and plain[0].total == 1 and exact[0].total == 0
    assert ordinary_counts(["x" * 500, ""]) == ordinary_counts(["y" * 500, ""])


def test_with_word_boundary_only_starts_of_words_count() -> None:
    assert ordinary_counts(["ana"])[0].total > ordinary_counts(["ana"], word_boundary=True)[0].total == 0
    assert ordinary_counts(["公园"], word_boundary=True) == ordinary_counts(["公园"])


NEVER_MEANT = """- . -- e Po é ж あ 김 7 n/a N/A #N/A Test <|im_end|> </s> [INST] <<SYS>> <｜end▁of▁sentence｜>"""


@pytest.mark.parametrize("value", [*NEVER_MEANT.split(), "- -", "first  name"])
def test_letters_signs_empty_cells_and_special_tokens_are_never_meant(value: str) -> None:
    assert why_never_meant(value)
    assert why_never_meant(f"\u200b{value} ")


@pytest.mark.parametrize("value", ["金", "Ana", "U2s", "❤", "<b>", "C++", "Testa", "N/A Films", "X Æ"])
def test_short_names_are_not(value: str) -> None:
    assert why_never_meant(value) is None


def test_many_phrases_are_counted_in_seconds() -> None:
    phrases = [f"phrase number {i}" for i in range(100_000)]
    started = time.perf_counter()
    assert not any(each.total for each in ordinary_counts(phrases))
    assert time.perf_counter() - started < 20
