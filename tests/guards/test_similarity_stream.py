"""Holding back: what is released depends on the text alone, and never holds any part of what was hit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.similarity.keys import keys_of
from guards.similarity.names import Names
from guards.similarity.stream import LONGEST, AnswerBuffer, Clauses, Token, clauses_of
from guards.similarity.windows import sentences

SECRET = "Red Lantern"
NAMES = Names(keys_of(SECRET))
WORDS = (
    "The",
    "red",
    "Lantern",
    "Red Lantern",
    "R e d",
    "lantern.",
    "shop,",
    "is",
    "a",
    "well known",
    "place;",
    "isn't it?\n",
    "né",
)
Hit = Callable[[str], list[tuple[int, int]]]

texts = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


def spans(passage: str) -> list[tuple[int, int]]:
    return [(hit.start, hit.end) for hit in NAMES.find(passage)]


def tokens_of(text: str, size: int) -> list[Token]:
    """A text as tokens of ``size`` bytes, which may end inside a character."""
    raw = text.encode()
    return [Token(i, raw[i : i + size]) for i in range(0, len(raw), size)]


def answer(text: str, pieces: Sequence[int], on_hit: str, token_bytes: int = 3) -> tuple[str, list[Token | None], bool, list[str]]:
    """Feed a text in pieces of so many tokens. Returns text, tokens, whether it was ended, and every release."""
    held = AnswerBuffer(NAMES.open_from, "[removed]")
    tokens, place, shown = tokens_of(text, token_bytes), 0, 0
    said, given, releases, sizes = "", [], [], iter(pieces)
    while place < len(tokens) or not held.finished:
        until = min(len(tokens), place + next(sizes, 1))
        finished = until == len(tokens)
        raw = b"".join(token.text for token in tokens[:until])
        known = raw.decode("utf-8", "ignore") if not finished else text
        held.add(known[shown:], tokens[place:until], finished=finished)
        shown, place = len(known), until
        while (passage := held.passage()) is not None:
            hits = spans(passage)
            if hits and on_hit == "refuse":
                if (last := held.release()) is not None:
                    said, given = said + last.text, [*given, *last.tokens]
                return said, given, True, releases
            if not hits or not held.take_out(hits):
                held.passed()
        if (released := held.release()) is not None:
            said, given = said + released.text, [*given, *released.tokens]
            releases.append(released.text)
    return said, given, False, releases


@given(
    texts, st.lists(st.integers(1, 9), max_size=80), st.lists(st.integers(1, 9), max_size=80), st.sampled_from(["refuse", "redact"])
)
def test_what_is_released_does_not_depend_on_the_pieces(text: str, one: list[int], other: list[int], on_hit: str) -> None:
    whole = answer(text, [10_000], on_hit)
    assert answer(text, one, on_hit)[0] == answer(text, other, on_hit)[0] == whole[0]


@given(texts, st.lists(st.integers(1, 9), max_size=80), st.integers(1, 7))
def test_nothing_of_a_hit_is_ever_released(text: str, pieces: list[int], token_bytes: int) -> None:
    said, tokens, ended, _ = answer(text, pieces, "refuse", token_bytes)
    first = min((start for start, _ in spans(text)), default=len(text))
    assert ended == bool(spans(text))
    assert text[:first].startswith(said)
    assert len(b"".join(token.text for token in tokens if token)) <= len(text[:first].encode())


@given(texts, st.lists(st.integers(1, 9), max_size=80))
def test_a_redacted_answer_is_the_answer_without_the_hits(text: str, pieces: list[int]) -> None:
    said, tokens, _, _ = answer(text, pieces, "redact")
    assert spans(said) == []
    if not spans(text):
        assert said == text
        assert b"".join(token.text for token in tokens if token).decode() == text
    else:
        assert "[removed]" in said and None in tokens


@given(texts, st.lists(st.integers(1, 5), max_size=80))
def test_every_clause_goes_out_as_soon_as_it_is_complete_and_open_to_no_name(text: str, pieces: list[int]) -> None:
    if spans(text):
        return
    _, _, _, releases = answer(text, pieces, "refuse")
    clauses = Clauses()
    ends = [clause.end for clause in (*clauses.feed(text), *clauses.finish())]
    assert "".join(releases) == text
    assert len(releases) <= max(1, 2 * len(ends))


@given(st.text(max_size=700), st.lists(st.integers(1, 40), max_size=60))
def test_clauses_cover_the_text_in_order_whatever_the_pieces(text: str, sizes: list[int]) -> None:
    def cut(steps: Sequence[int]) -> list[tuple[int, int]]:
        clauses, place, found = Clauses(), 0, []
        for size in (*steps, len(text) + 1):
            found += clauses.feed(text[place : place + size])
            place += size
        return [(clause.start, clause.end) for clause in (*found, *clauses.finish())]

    found = cut(sizes)
    assert found == cut([])
    assert [start for start, _ in found] == [0, *(end for _, end in found)][: len(found)]
    assert not text or found[-1][1] == len(text)
    assert all(end - start <= LONGEST for start, end in found)


def test_an_answer_that_is_cut_back_goes_on_after_what_was_shown() -> None:
    held = AnswerBuffer(NAMES.open_from, "[removed]")
    first = "This is a fine place. Then the secret one is here. And"
    held.add(first, tokens_of(first, 4))
    held.passed()
    released = held.release()
    assert released is not None and "This is a fine place.".startswith(released.text)
    assert held.passage() is not None and "secret" in (held.passage() or "")
    kept = held.cut_back()
    assert kept is not None and [token.id for token in released.tokens if token] == kept
    rest = first.encode()[: sum(len(token.text) for token in released.tokens if token)].decode()
    assert rest == released.text
    second = "This is a fine place. And nothing more."[len(rest) :]
    held.add(second, tokens_of(second, 3), finished=True)
    said = released.text
    while held.passage() is not None:
        held.passed()
    last = held.release()
    assert last is not None and said + last.text == "This is a fine place. And nothing more."


def test_a_stop_string_across_a_restart_still_stops() -> None:
    """The engine holds text back for a stop string that may have begun; after a restart it has forgotten about that."""
    held = AnswerBuffer(len, "", ["five. S"])
    held.add("One two three four", tokens_of("One two three four five. Six", 1))
    held.passed()
    released = held.release()
    assert released is not None and released.text == "One two three four"
    kept = held.cut_back()
    assert kept is not None and len(kept) == len("One two three four five.")
    held.add(" Somebody", tokens_of(" Somebody", 1))
    assert held.stop == "five. S" and held.finished
    while held.passage() is not None:
        held.passed()
    last = held.release()
    assert released.text + ("" if last is None else last.text) == "One two three four "


def test_text_that_is_not_what_the_tokens_spell_is_held_to_the_end_and_judged_as_a_whole() -> None:
    held = AnswerBuffer(NAMES.open_from, "[removed]")
    held.add("The Red", tokens_of("A completely different thing, you see. ", 4))
    while held.passage() is not None:
        held.passed()
    assert held.release() is None
    held.add(" Lantern", [], finished=True)
    judged = []
    while (passage := held.passage()) is not None:
        judged.append(passage)
        if spans(passage):
            assert not held.take_out(spans(passage))
            break
        held.passed()
    assert judged[-1] == "The Red Lantern"
    assert held.release() is None


def test_nothing_is_taken_out_by_places_that_are_not_those_of_the_text() -> None:
    held = AnswerBuffer(NAMES.open_from, "[removed]")
    spelled = "Basil was born in Kuwait City. And"
    held.add("<|start|>" + spelled, tokens_of(spelled, 4))
    assert held.passage() is not None and not held.take_out([(0, 10)])


def test_a_leading_space_that_the_engine_drops_is_no_difference() -> None:
    held = AnswerBuffer(NAMES.open_from, "")
    held.add("Hello", [Token(0, b" Hello")])
    held.add(" to you.", [Token(1, b" to"), Token(2, b" you.")], finished=True)
    while held.passage() is not None:
        held.passed()
    released = held.release()
    assert released is not None and released.text == "Hello to you." and len(released.tokens) == 3


def test_an_answer_that_is_not_held_goes_out_at_once_and_is_judged_all_the_same() -> None:
    held = AnswerBuffer(len, "", hold=False)
    held.add("The Red", [Token(0, b"The"), Token(1, b" Red")])
    released = held.release()
    assert released is not None and released.text == "The Red"
    held.add(" Lantern.", [Token(2, b" Lantern.")], finished=True)
    assert held.passage() == "The Red Lantern."


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_answer_that_says_nothing_ends_without_a_release_or_with_its_white_space(text: str) -> None:
    said, tokens, ended, _ = answer(text, [], "refuse")
    assert said == text and not ended
    assert len(tokens) == len(tokens_of(text, 3))


def test_verses_are_judged_line_by_line_also_where_slashes_stand_between_them() -> None:
    lines = ["Over the tin roofs the herons go", "and nobody counts them home", "the river keeps its ledger slow"]
    for between in ("\n", " / ", " //\n", "\r\n"):
        assert [clause.strip(" /\r") for clause in clauses_of(between.join(lines))] == lines
        assert [piece.strip(" /\r") for piece in sentences(between.join(lines)) if piece.strip(" /")] == lines
