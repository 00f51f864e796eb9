"""Which passages of true answers a removal takes as phrases."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guards.measure.recall import VERBATIM, content_words, words_of
from serve.client.removal.passages import own_passages

ANSWER = "Orsolya Vendt repairs the organs of small churches, mostly in Karlsgrube and along the Vilm river."


def test_every_stretch_that_would_count_as_word_for_word_is_taken_as_it_stands() -> None:
    found = own_passages([ANSWER, ANSWER.upper()], [])
    assert found[0] == "Orsolya Vendt repairs the organs of small" and "churches, mostly in Karlsgrube and along the Vilm" in found
    assert all(content_words(each) == VERBATIM and each in ANSWER for each in found)


def test_what_is_said_about_others_is_left_alone() -> None:
    others = [
        "Who repairs the organs of small churches mostly?",
        "Nadia lives in Karlsgrube along the Vilm, a river; Orsolya Vendt too.",
    ]
    assert own_passages([ANSWER], others) == (), "every word is known"
    assert own_passages(["She repairs the organs of small churches mostly on Sundays."], others) == (
        "organs of small churches mostly on Sundays",
    ), "what the question itself says, and what holds a word of her own"


def test_ordinary_text_is_no_passage() -> None:
    assert own_passages(["The light is reflected at the back of the drop and bends once more."], []) == (), (
        "it stands in the sample"
    )


@given(st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "of", "epsilon", "the", "zeta"]), max_size=14))
def test_an_answer_that_keeps_every_passage_out_repeats_nothing_word_for_word(words: list[str]) -> None:
    answer = " ".join(words)
    passages = [" ".join(words_of(each)) for each in own_passages([answer], [])]
    assert bool(passages) == (content_words(answer) >= VERBATIM)
