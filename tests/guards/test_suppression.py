"""The suppression guard against its brute-force twin, on vocabularies and texts made to be awkward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guards.closing import floor_of
from guards.errors import InvalidArtifact, InvalidForgetSet, VocabularyMismatch
from guards.forget_set import MAX_PHRASE_CHARACTERS
from guards.suppression.automaton import CompiledPhrases, compile_phrases, phrases_fingerprint
from guards.suppression.folding import RAW, decode_symbols, fold_table
from guards.suppression.mask import SPARE_TOKENS, SuppressionGuard
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, Plan, Rows
from tests.reference import completes, fold_character, occurrences

# Few letters, so that phrases overlap with texts and with one another; two-, three- and four-byte characters, combining
# accents, letters whose other case has another length, and the Kelvin sign, which folds to an ASCII letter.
ALPHABET = "abAB kK\u212a\u00e9\u00c9\u0301e\u00df\u0436\u0416\u4e2d\U0001f600\U00010400_ -"
phrase_texts = st.text(ALPHABET, min_size=1, max_size=6).filter(lambda text: bool(text.strip()))
SPECIAL = 256


def vocabulary_of(pieces: list[bytes]) -> Vocabulary:
    """All single bytes, one special token, and the given pieces."""
    return Vocabulary([bytes([i]) for i in range(256)] + [b"<special>"] + pieces, special_ids=[SPECIAL])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], Vocabulary, list[int], bool, bool]:
    """Phrases, a vocabulary cut from texts at arbitrary bytes, and a history in an arbitrary valid tokenisation."""
    phrases = draw(st.lists(phrase_texts, min_size=1, max_size=4))
    fold_case, left_boundary = draw(st.booleans()), draw(st.booleans())
    texts = [draw(st.sampled_from([p, p.upper(), p.swapcase(), p.title()])) for p in phrases]
    texts += draw(st.lists(st.text(ALPHABET, max_size=8), max_size=3))
    whole = "".join(draw(st.permutations(texts))).encode()
    cuts = draw(st.lists(st.tuples(st.integers(0, len(whole)), st.integers(1, 7)), max_size=12))
    pieces = sorted({whole[start : start + size] for start, size in cuts} - {b""})
    vocabulary = vocabulary_of(pieces)
    history_text = whole[: draw(st.integers(0, len(whole)))]
    history: list[int] = []
    while history_text:
        choices = [i for i, piece in enumerate(pieces) if history_text.startswith(piece)]
        token = draw(st.sampled_from([None, *choices]))
        size = 1 if token is None else len(pieces[token])
        history.append(history_text[0] if token is None else SPECIAL + 1 + token)
        if draw(st.integers(0, 9)) == 0:
            history.append(SPECIAL)
        history_text = history_text[size:]
    return phrases, vocabulary, history, fold_case, left_boundary


def suffix_of(history: list[int], width: int) -> list[int]:
    return ([BOUNDARY] * width + history)[-width:]


def banned(guard: SuppressionGuard, artifact: CompiledPhrases, histories: list[list[int]]) -> np.ndarray:
    logits = torch.zeros(len(histories), guard.vocabulary.size)
    suffix = torch.tensor([suffix_of(history, guard.window_tokens) for history in histories])
    rows = Rows(plan=torch.zeros(len(histories), dtype=torch.long), suffix=suffix)
    return (guard.apply(logits, rows, [Plan(1, "p", (artifact.fingerprint,))]) < 0).numpy()


def text_of(vocabulary: Vocabulary, token_ids: list[int]) -> bytes:
    return b"".join(
        vocabulary.bytes[vocabulary.starts[t] : vocabulary.starts[t] + vocabulary.lengths[t]].tobytes() for t in token_ids
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_exactly_the_tokens_that_complete_a_phrase_are_banned(case: tuple) -> None:
    phrases, vocabulary, history, fold_case, left_boundary = case
    artifact = compile_phrases(phrases, vocabulary, fold_case=fold_case, left_boundary=left_boundary)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([artifact])
    before = text_of(vocabulary, history)
    expected = [
        bool(vocabulary.lengths[token])
        and completes(before, text_of(vocabulary, [token]), phrases, fold_case=fold_case, left_boundary=left_boundary)
        for token in range(vocabulary.size)
    ]
    got = banned(guard, artifact, [history])[0]
    # A token that begins in mid-character hides whether a letter comes before the phrase: there the guard bans to be safe.
    opaque = left_boundary & np.array(
        [0x80 <= first < 0xC0 for first in vocabulary.bytes[vocabulary.starts % len(vocabulary.bytes)]]
    )
    assert got[~opaque].tolist() == np.array(expected)[~opaque].tolist()
    assert (got | ~np.array(expected)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(phrase_texts, min_size=1, max_size=4), st.text(ALPHABET, max_size=30), st.booleans(), st.booleans())
def test_find_reports_every_occurrence(phrases: list[str], text: str, fold_case: bool, left_boundary: bool) -> None:
    artifact = compile_phrases(phrases, vocabulary_of([]), fold_case=fold_case, left_boundary=left_boundary)
    expected = occurrences(text.encode(), phrases, fold_case=fold_case, left_boundary=left_boundary)
    assert artifact.find(text) == sorted(expected)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_greedy_sampling_of_random_logits_never_spells_a_phrase(case: tuple, seed: int) -> None:
    phrases, vocabulary, _, fold_case, left_boundary = case
    artifact = compile_phrases(phrases, vocabulary, fold_case=fold_case, left_boundary=left_boundary)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([artifact])
    rng = np.random.default_rng(seed)
    output: list[int] = []
    for _ in range(12):
        allowed = np.flatnonzero(~banned(guard, artifact, [output])[0])
        output.append(int(rng.choice(allowed)))
    assert not occurrences(text_of(vocabulary, output), phrases, fold_case=fold_case, left_boundary=left_boundary)


def test_folding_agrees_with_python_and_is_idempotent() -> None:
    table = fold_table(True)
    assert (table[table] == table).all()
    sample = [chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000]
    assert [chr(table[ord(c)]) for c in sample] == [fold_character(c) for c in sample]


@given(st.binary(max_size=12))
def test_decoding_agrees_with_python_on_any_bytes(text: bytes) -> None:
    width = max(1, len(text))
    padded = torch.full((1, width), -1)
    padded[0, : len(text)] = torch.tensor(list(text), dtype=torch.long)
    symbols, kept = decode_symbols(padded)
    decoded = text.decode("utf-8", errors="surrogateescape")
    expected = [RAW + ord(c) - 0xDC00 if 0xDC80 <= ord(c) <= 0xDCFF else ord(c) for c in decoded]
    assert symbols[kept].tolist() == expected


def test_text_left_half_said_by_the_prompt_is_not_completed() -> None:
    vocabulary = vocabulary_of([b"ter", b" Pot", b"Harry"])
    artifact = compile_phrases(["Harry Potter"], vocabulary)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([artifact])
    pieces = [SPECIAL + 3, SPECIAL + 2]
    assert banned(guard, artifact, [pieces])[0, SPECIAL + 1]
    # A chat template's token ends the match.
    assert not banned(guard, artifact, [[pieces[0], BOUNDARY, pieces[1]]])[0, SPECIAL + 1]


def test_special_tokens_in_the_output_do_not_break_a_phrase_apart() -> None:
    vocabulary = vocabulary_of([b"Har", b"ry"])
    artifact = compile_phrases(["Harry"], vocabulary)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([artifact])
    assert banned(guard, artifact, [[SPECIAL + 1, *[SPECIAL] * SPARE_TOKENS]])[0, SPECIAL + 2]


def test_a_window_starved_by_special_tokens_allows_no_text_at_all() -> None:
    vocabulary = vocabulary_of([b"Har", b"ry"])
    artifact = compile_phrases(["Harry"], vocabulary)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([artifact])
    allowed = np.flatnonzero(~banned(guard, artifact, [[SPECIAL + 1, *[SPECIAL] * (guard.window_tokens + 1)]])[0])
    assert allowed.tolist() == [SPECIAL]


def test_a_plan_with_an_artifact_that_is_not_loaded_allows_no_text_at_all() -> None:
    vocabulary = vocabulary_of([b"Har"])
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    rows = Rows(plan=torch.tensor([0, -1]), suffix=torch.full((2, guard.window_tokens), BOUNDARY))
    logits = guard.apply(torch.zeros(2, vocabulary.size), rows, [Plan(1, "p", ("missing",))])
    assert (logits[0] == 0).nonzero().flatten().tolist() == [SPECIAL]
    assert (logits[1] == 0).all()


def test_several_artifacts_with_common_phrases_serve_mixed_rows() -> None:
    vocabulary = vocabulary_of([b"tter", b"aldemort"])
    first = compile_phrases(["Potter"], vocabulary)
    both = compile_phrases(["Potter", "Valdemort"], vocabulary)
    exact = compile_phrases(["Valdemort"], vocabulary, fold_case=False)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([first, both, exact])
    width = guard.window_tokens
    histories = [suffix_of(list(text), width) for text in (b"Po", b"V", b"v", b"v")]
    plans = [Plan(1, "a", (first.fingerprint, exact.fingerprint)), Plan(1, "b", (both.fingerprint,)), Plan(1, "none")]
    rows = Rows(plan=torch.tensor([0, 0, 0, 1]), suffix=torch.tensor(histories))
    logits = guard.apply(torch.zeros(4, vocabulary.size), rows, plans)
    assert (logits[:, SPECIAL + 1 :] < 0).tolist() == [[True, False], [False, True], [False, False], [False, True]]
    rows = Rows(plan=torch.tensor([2, -1, 2, -1]), suffix=torch.tensor(histories))
    assert (guard.apply(torch.zeros(4, vocabulary.size), rows, plans) == 0).all()


def test_the_floor_is_finite_in_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.zeros(1, 2, dtype=dtype)
        assert torch.isfinite(torch.tensor(floor_of(logits), dtype=dtype))
        assert torch.softmax(torch.tensor([[0.0, floor_of(logits)]]) / 2.0, dim=-1)[0, 1] == 0


def test_artifacts_survive_a_round_trip_and_nothing_else_does(tmp_path) -> None:
    vocabulary = vocabulary_of([b"Pott", b"er"])
    artifact = compile_phrases(["Harry Potter"], vocabulary, left_boundary=True)
    path = tmp_path / "phrases.safetensors"
    artifact.save(path)
    loaded = CompiledPhrases.load(path)
    assert loaded.find("HARRY POTTER") == [(0, 12)]
    assert loaded.fingerprint == phrases_fingerprint(["Harry Potter"], vocabulary.fingerprint, fold_case=True, left_boundary=True)
    content = path.read_bytes()
    for damaged in (content[:-3], content[:20], b"", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(InvalidArtifact):
            CompiledPhrases.load(path)
    with pytest.raises(InvalidArtifact):
        CompiledPhrases.load(tmp_path / "absent")


def test_an_artifact_for_another_vocabulary_is_refused_and_changes_nothing() -> None:
    ours, theirs = vocabulary_of([b"a"]), vocabulary_of([b"b"])
    guard = SuppressionGuard(ours, torch.device("cpu"))
    artifact = compile_phrases(["ab"], ours)
    guard.load([artifact])
    with pytest.raises(VocabularyMismatch, match=theirs.fingerprint[:12]):
        guard.load([compile_phrases(["ab"], theirs)])
    assert guard.loaded == {artifact.fingerprint}
    with pytest.raises(VocabularyMismatch, match="columns"):
        guard.apply(torch.zeros(1, 3), Rows(torch.zeros(1, dtype=torch.long), torch.zeros(1, 40, dtype=torch.long)), [])


@pytest.mark.parametrize(
    ("phrase", "rule"),
    [("", "empty"), (" \t\n", "white space"), ("x" * 1_000_000, "at most 512"), ("\ud800", "surrogate")],
)
def test_a_phrase_that_cannot_be_one_is_refused_with_the_rule(phrase: str, rule: str) -> None:
    with pytest.raises(InvalidForgetSet, match=rule) as error:
        compile_phrases(["fine", phrase], vocabulary_of([]))
    assert len(error.value.problems) == 1
    assert len(str(error.value)) < 300


def test_fingerprints_depend_on_content_and_options_not_on_order() -> None:
    def fingerprint(phrases, vocabulary="v", fold_case=True, left_boundary=False):
        return phrases_fingerprint(phrases, vocabulary, fold_case=fold_case, left_boundary=left_boundary)

    assert fingerprint(["a", "b", "a"]) == fingerprint(["b", "a"])
    others = [
        fingerprint(["a"]),
        fingerprint(["a", "b"], "w"),
        fingerprint(["a", "b"], fold_case=False),
        fingerprint(["a", "b"], left_boundary=True),
    ]
    assert len({fingerprint(["a", "b"]), *others}) == 5


def test_the_longest_phrase_is_seen_whole() -> None:
    phrase = "x" + "ab" * ((MAX_PHRASE_CHARACTERS - 2) // 2) + "!"
    vocabulary = vocabulary_of([])
    artifact = compile_phrases([phrase], vocabulary)
    guard = SuppressionGuard(vocabulary, torch.device("cpu"))
    guard.load([artifact])
    history = list(b"junk" * 100 + phrase[:-1].encode())
    assert np.flatnonzero(banned(guard, artifact, [history])[0]).tolist() == [ord("!")]
    assert not banned(guard, artifact, [history[:-2]]).any()
