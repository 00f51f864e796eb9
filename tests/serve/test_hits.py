"""What guards found in a request: kept for a while, and no more of its text than the hit."""

from __future__ import annotations

import pytest

from guards.similarity.gate import Verdict
from guards.suppression.automaton import compile_phrases
from guards.suppression.vocabulary import Vocabulary
from serve.api.hits import KEPT, MOST_CHARACTERS, MOST_HITS, Hit, RecentHits, hit_of


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


def test_a_phrase_in_pieces_is_seen_and_its_text_is_told() -> None:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from serve.api.engine_client.watch import Watch

    vocabulary = Vocabulary([bytes([i]) for i in range(256)], special_ids=[])
    artifact = compile_phrases(["Maria Kowalczyk"], vocabulary)
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    watch = Watch([artifact], vocabulary, params, "")
    white = " " * 5_000  # far more than a phrase is long
    for piece in ("Ask mar", "ia", white, "\n\t"):
        output = CompletionOutput(0, piece, list(piece.encode()), None, None)
        assert not watch.completes_a_phrase(output)
    piece = "KOWALCZYK and"
    assert watch.completes_a_phrase(CompletionOutput(0, piece, list(piece.encode()), None, None))
    assert watch.hit is not None and watch.hit.text.lower().startswith("maria") and watch.hit.artifact == 0
    assert watch.safe_text(CompletionOutput(0, piece, [], None, None)) == ""


@pytest.mark.parametrize("escape", ["\\u004b", "K"])
def test_a_phrase_in_json_escapes_is_seen(escape: str) -> None:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from serve.api.engine_client.watch import Watch

    vocabulary = Vocabulary([bytes([i]) for i in range(256)], special_ids=[])
    artifact = compile_phrases(["Maria Kowalczyk"], vocabulary)
    watch = Watch([artifact], vocabulary, SamplingParams(output_kind=RequestOutputKind.DELTA), "")
    pieces = ('{"n": "M', "\\u0061ria\\n", escape, "owalczy", "k")
    hits = [watch.completes_a_phrase(CompletionOutput(0, piece, list(piece.encode()), None, None)) for piece in pieces]
    assert hits == [False] * 4 + [True]
