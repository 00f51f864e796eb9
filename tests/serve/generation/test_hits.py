"""What guards found in a request: kept for a while, and no more of its text than the hit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.similarity.gate import Verdict
from guards.suppression.automaton import compile_phrases
from guards.suppression.vocabulary import Vocabulary
from serve.generation.watch import Watch
from serve.hits import KEPT, MOST_CHARACTERS, MOST_HITS, Hit, RecentHits, hit_of

VOCABULARY = Vocabulary([bytes([i]) for i in range(256)], special_ids=[])


def test_the_latest_requests_are_kept_and_no_more_than_that() -> None:
    recent = RecentHits()
    hits = [Hit("s", "gate", 0, 1, "x")] * (MOST_HITS + 1)
    for number in range(KEPT + 1):
        recent.keep(str(number), "key", "default", 7, hits if number == KEPT else hits[:1], refused=True)
    assert recent.get("0") is None
    kept = recent.get(str(KEPT))
    assert kept is not None and len(kept.hits) == MOST_HITS and kept.refused and kept.revision == 7


def test_a_hit_says_where_in_the_answer_it_is_and_shows_no_more_than_itself() -> None:
    verdict = Verdict("owner", "similarity", 0.91234, 0.75, "w" * 1_000, "plain", 3, 9)
    hit = hit_of("stream", verdict, "author", where="answer", offset=100, action="stream refuse")
    assert (hit.start, hit.end, hit.turn, hit.forget_set) == (103, 109, None, "author")
    assert len(hit.text) == MOST_CHARACTERS and hit.score == pytest.approx(0.9123)


def watching(*phrases: str) -> Watch:
    artifact = compile_phrases(list(phrases), VOCABULARY)
    return Watch([artifact], VOCABULARY, SamplingParams(output_kind=RequestOutputKind.DELTA), "")


def piece(text: str, *, finished: bool = False) -> CompletionOutput:
    logprobs = [{byte: Logprob(0.0)} for byte in text.encode()]
    return CompletionOutput(0, text, list(text.encode()), None, logprobs, finish_reason="stop" if finished else None)


def test_a_phrase_in_pieces_is_seen_and_its_text_and_place_are_told() -> None:
    watch = watching("Maria Kowalczyk")
    white = " " * 5_000  # far more than a phrase is long
    shown = ""
    for each in ("Ask mar", "ia", white, "\n\t"):
        given = watch.take(piece(each))
        assert not watch.ended
        shown += given.text if given is not None else ""
    last = watch.take(piece("KOWALCZYK and"))
    assert watch.ended and last is not None and watch.hit is not None
    assert shown + last.text == "Ask " and watch.place == 4
    assert watch.hit.text.startswith("mar") and watch.hit.artifact == 0


@pytest.mark.parametrize("escape", ["\\u004b", "K"])
def test_a_phrase_in_json_escapes_is_seen(escape: str) -> None:
    watch = watching("Maria Kowalczyk")
    ended = []
    for each in ('{"n": "M', "\\u0061ria\\n", escape, "owalczy", "k"):
        watch.take(piece(each))
        ended.append(watch.ended)
    assert ended == [False] * 4 + [True]


@pytest.mark.parametrize("padding", ["\\u200b" * 80, "\\n" * 200, "\\u0020", " "])
def test_escapes_that_say_nothing_do_not_hide_a_phrase(padding: str) -> None:
    watch = watching("Maria Kowalczyk")
    for each in ('{"n": "x ', "Maria ", *[padding[i : i + 7] for i in range(0, len(padding), 7)], "Kowalczyk", '"}'):
        given = watch.take(piece(each))
        if watch.ended:
            break
    assert watch.ended and given is not None and watch.place == len('{"n": "x ')


def test_a_phrase_that_the_prompt_began_is_the_first_one() -> None:
    artifact = compile_phrases(["Johanna van der Berg"], VOCABULARY)
    params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)
    watch = Watch([artifact], VOCABULARY, params, "Her name is Johanna van ")
    given = watch.take(piece("der Berg, or again Johanna van der Berg", finished=True))
    assert watch.ended and given is not None and given.text == ""


def test_characters_in_pieces_do_not_cost_text_later() -> None:
    watch, text = watching("Johanna van der Berg"), "\U0001f600" * 30 + " hello Johanna van der Berg"
    shown = ""
    data = text.encode()
    for i, size in zip(range(0, len(data), 3), [3] * len(data), strict=False):
        part = data[i : i + size]
        whole = data[: i + len(part)].decode("utf-8", "ignore")[len(data[:i].decode("utf-8", "ignore")) :]
        given = watch.take(CompletionOutput(0, whole, list(part), None, None))
        shown += given.text if given is not None else ""
        if watch.ended:
            break
    assert watch.ended and shown == "\U0001f600" * 30 + " hello "


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([*"HogwartsPe r", "\u017f", "\u00df", "\\u0073", "\\n", "\\", "Hogwarts"]), max_size=40).map("".join),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_a_stream_shows_what_the_whole_answer_shows_and_is_never_ahead_of_it(text: str, cuts: list[int]) -> None:
    """Text, token ids and log-probabilities, for any way to cut the answer into pieces."""
    phrases = ("Hogwarts", "Potter", "ss")
    artifact = compile_phrases(list(phrases), VOCABULARY)
    whole = Watch([artifact], VOCABULARY, SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY), "")
    expected = whole.take(piece(text, finished=True))
    assert expected is not None
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[low:high] for low, high in pairwise(places)] or [""]
    watch, shown, tokens = watching(*phrases), "", 0
    for number, each in enumerate(pieces):
        given = watch.take(piece(each, finished=number == len(pieces) - 1))
        if given is not None:
            shown += given.text
            tokens += len(given.token_ids)
            assert given.logprobs is not None and len(given.logprobs) == len(given.token_ids)
        assert expected.text.startswith(shown)
        if watch.ended:
            break
    assert (shown, watch.ended, tokens) == (expected.text, whole.ended, len(expected.token_ids))
    assert not artifact.find(shown)
