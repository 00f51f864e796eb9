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
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.automaton import compile_phrases, phrases_fingerprint
from guards.suppression.elements import RAW, elements_of_bytes, join_bytes
from guards.suppression.mask import FARTHEST, SPARE_TOKENS
from guards.types import BOUNDARY, Plan, Rows
from tests.guards.suppression_cases import ALPHABETS, SPECIAL, banned, cases, counts, suffix_of, text_of, vocabulary_of
from tests.plans import suppress, suppression_guard
from tests.reference import completes, occurrences


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_exactly_the_tokens_that_complete_a_phrase_are_banned(case: tuple) -> None:
    phrases, vocabulary, history, options = case
    artifact = compile_phrases(phrases, vocabulary, **options)
    guard = suppression_guard(vocabulary, artifact)
    before = text_of(vocabulary, history)
    expected = [
        bool(vocabulary.lengths[token]) and completes(before, text_of(vocabulary, [token]), phrases, **options)
        for token in range(vocabulary.size)
    ]
    got = banned(guard, artifact, [history])[0]
    # A token that begins in mid-character hides whether a letter comes before the phrase: there the guard bans to be safe.
    opaque = options["left_boundary"] & np.array(
        [0x80 <= first < 0xC0 for first in vocabulary.bytes[vocabulary.starts % len(vocabulary.bytes)]]
    )
    assert got[~opaque].tolist() == np.array(expected)[~opaque].tolist()
    assert (got | ~np.array(expected)).all()


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(ALPHABETS), st.booleans(), st.booleans(), st.sampled_from(["folded", "exact"]))
def test_find_reports_every_occurrence(data, letters: str, fold_case: bool, left_boundary: bool, match: str) -> None:
    text = st.text(letters, min_size=1, max_size=6).filter(counts)
    phrases = data.draw(st.lists(text, min_size=1, max_size=4))
    haystack = data.draw(st.text(letters, max_size=30))
    options = {"fold_case": fold_case, "left_boundary": left_boundary, "match": match}
    artifact = compile_phrases(phrases, vocabulary_of([]), **options)
    assert artifact.find(haystack) == sorted(occurrences(haystack.encode(), phrases, **options))


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_greedy_sampling_of_random_logits_never_spells_a_phrase(case: tuple, seed: int) -> None:
    phrases, vocabulary, _, options = case
    artifact = compile_phrases(phrases, vocabulary, **options)
    guard = suppression_guard(vocabulary, artifact)
    rng = np.random.default_rng(seed)
    output: list[int] = []
    for _ in range(12):
        allowed = np.flatnonzero(~banned(guard, artifact, [output])[0])
        output.append(int(rng.choice(allowed)))
    assert not occurrences(text_of(vocabulary, output), phrases, **options)


@settings(deadline=None)
@given(st.binary(max_size=12))
def test_decoding_agrees_with_python_on_any_bytes(text: bytes) -> None:
    width = max(1, len(text))
    padded = torch.full((1, width), -1)
    padded[0, : len(text)] = torch.tensor(list(text), dtype=torch.long)
    elements, there = join_bytes(elements_of_bytes(padded))
    decoded = text.decode("utf-8", errors="surrogateescape")
    expected = [RAW + ord(c) - 0xDC00 if 0xDC80 <= ord(c) <= 0xDCFF else ord(c) for c in decoded]
    assert elements[there].tolist() == expected


def test_text_left_half_said_by_the_prompt_is_not_completed() -> None:
    vocabulary = vocabulary_of([b"ter", b" Pot", b"Harry"])
    artifact = compile_phrases(["Harry Potter"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    pieces = [SPECIAL + 3, SPECIAL + 2]
    assert banned(guard, artifact, [pieces])[0, SPECIAL + 1]
    # A chat template's token ends the match.
    assert not banned(guard, artifact, [[pieces[0], BOUNDARY, pieces[1]]])[0, SPECIAL + 1]


def test_special_tokens_in_the_output_do_not_break_a_phrase_apart() -> None:
    vocabulary = vocabulary_of([b"Har", b"ry"])
    artifact = compile_phrases(["Harry"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    assert banned(guard, artifact, [[SPECIAL + 1, *[SPECIAL] * SPARE_TOKENS]])[0, SPECIAL + 2]


def test_a_window_full_of_what_does_not_count_allows_no_text_at_all() -> None:
    vocabulary = vocabulary_of([b"Harry"])
    artifact = compile_phrases(["Harry Potter"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    hidden = list("\u200b".encode()) * FARTHEST
    assert np.flatnonzero(~banned(guard, artifact, [[SPECIAL + 1, *hidden]])[0]).tolist() == [SPECIAL]


@settings(deadline=None)
@given(
    st.text(ALPHABETS[2], max_size=40),
    st.text(ALPHABETS[2], max_size=10),
    st.text(ALPHABETS[2], min_size=1, max_size=6).filter(counts),
)
def test_the_end_of_a_text_is_enough_to_find_what_goes_on_after_it(before: str, after: str, phrase: str) -> None:
    artifact = compile_phrases([phrase], vocabulary_of([]))
    end = artifact.end_of(before)
    whole = [len(before) + len(after) - stop for _, stop in artifact.find(before + after) if stop > len(before)]
    assert [len(end) + len(after) - stop for _, stop in artifact.find(end + after) if stop > len(end)] == whole


def test_a_window_starved_by_special_tokens_allows_no_text_at_all() -> None:
    vocabulary = vocabulary_of([b"Har", b"ry"])
    artifact = compile_phrases(["Harry"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    allowed = np.flatnonzero(~banned(guard, artifact, [[SPECIAL + 1, *[SPECIAL] * (guard.window_tokens + 1)]])[0])
    assert allowed.tolist() == [SPECIAL]


def test_a_plan_with_an_artifact_that_is_not_loaded_allows_no_text_at_all() -> None:
    vocabulary = vocabulary_of([b"Har"])
    guard = suppression_guard(vocabulary)
    rows = Rows(plan=torch.tensor([0, -1]), suffix=torch.full((2, guard.window_tokens), BOUNDARY))
    logits = guard.apply(torch.zeros(2, vocabulary.size), rows, [Plan(1, "p", suppress("missing"))])
    assert (logits[0] == 0).nonzero().flatten().tolist() == [SPECIAL]
    assert (logits[1] == 0).all()


def test_several_artifacts_with_common_phrases_serve_mixed_rows() -> None:
    vocabulary = vocabulary_of([b"tter", b"aldemort"])
    first = compile_phrases(["Potter"], vocabulary)
    both = compile_phrases(["Potter", "Valdemort"], vocabulary)
    exact = compile_phrases(["Valdemort"], vocabulary, fold_case=False)
    guard = suppression_guard(vocabulary, first, both, exact)
    width = guard.window_tokens
    histories = [suffix_of(list(text), width) for text in (b"Po", b"V", b"v", b"v")]
    plans = [
        Plan(1, "a", suppress(first.fingerprint, exact.fingerprint)),
        Plan(1, "b", suppress(both.fingerprint)),
        Plan(1, "none"),
    ]
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
    artifact = compile_phrases(["ab"], ours)
    guard = suppression_guard(ours, artifact)
    with pytest.raises(VocabularyMismatch, match=theirs.fingerprint[:12]):
        guard.load({"theirs": compile_phrases(["ab"], theirs)})
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
    guard = suppression_guard(vocabulary, artifact)
    history = list(b"junk" * 100 + phrase[:-1].encode())
    assert np.flatnonzero(banned(guard, artifact, [history])[0]).tolist() == [ord("!")]
    assert not banned(guard, artifact, [history[:-2]]).any()
