"""The suppression guard against its brute-force twin, on vocabularies and texts made to be awkward."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guards.closing import floor_of
from guards.errors import InvalidArtifact, InvalidForgetSet, VocabularyMismatch
from guards.forget_set import MAX_PHRASE_CHARACTERS
from guards.suppression.automaton import CompiledPhrases, compile_phrases, phrases_fingerprint
from guards.suppression.folding import RAW, elements_of_bytes, folding, join_bytes
from guards.suppression.mask import FARTHEST, SPARE_TOKENS, SuppressionGuard
from guards.suppression.spelling import is_number
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, Plan, Rows
from tests.plans import suppress, suppression_guard
from tests.reference import completes, forms, occurrences, symbols_of
from tests.reference import is_number as twin_of_is_number

# Few letters, so that phrases overlap with texts and with one another; two-, three- and four-byte characters, and what is awkward
# in each: combining accents that commute (below and above) and that do not, letters whose other case has another length, the
# Kelvin sign, Turkish and Greek letters, ligatures, white space of several kinds, invisible characters, a soft hyphen, vowel marks,
# digits and their separators, scripts without spaces.
ALPHABETS = (
    "abAB kK\u212a\u00e9\u00c9\u0301e\u00df\u0436\u0416\u4e2d\U0001f600\U00010400_ -",
    "iI\u0131\u0130\u0307j i\u0301 \u03b1\u03ac\u0391\u0386\u0301\u0308\u03c3\u03c2\u03a3\u1fb3",
    "s\u00dfSf\ufb01 i\u00a0\u2009\t\n//a\u200b\u00ad\u2800'\u2019\u00b4\u201c\"\u2010-",
    "e\u0323\u0302\u1ec7\u00ea\u1eb9 e\u0307\u1e57\uff45\U0001d41e\u0663" + "3",
    "\u0645\u064e\u0640\u062d\u0651 \u05d0\u05b8\u4e2d\u6587\u0e01\u0e31\u0e48\uac00\u1100\u1161\u304b\u3099a",
    "0123 45-.(/)+a6\uff17",
)


def counts(phrase: str) -> bool:
    """Whether anything of a phrase is compared at all."""
    return bool(forms(phrase, fold_case=True, match="folded"))


SPECIAL = 256


def vocabulary_of(pieces: list[bytes]) -> Vocabulary:
    """All single bytes, one special token, and the given pieces."""
    return Vocabulary([bytes([i]) for i in range(256)] + [b"<special>"] + pieces, special_ids=[SPECIAL])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], Vocabulary, list[int], dict]:
    """Phrases, a vocabulary cut from texts at arbitrary bytes, and a history in an arbitrary valid tokenisation."""
    letters = draw(st.sampled_from(ALPHABETS))
    text = st.text(letters, min_size=1, max_size=8 if letters is ALPHABETS[-1] else 5)
    phrases = draw(st.lists(text.filter(counts), min_size=1, max_size=4))
    options = {
        "fold_case": draw(st.booleans()),
        "left_boundary": draw(st.booleans()),
        "match": draw(st.sampled_from(["folded", "folded", "exact"])),
    }
    texts = [draw(st.sampled_from([p, p.upper(), p.swapcase(), p.title(), _decomposed(p), _composed(p)])) for p in phrases]
    texts += draw(st.lists(st.text(letters, max_size=8), max_size=3))
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
    return phrases, vocabulary, history, options


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def suffix_of(history: list[int], width: int) -> list[int]:
    return ([BOUNDARY] * width + history)[-width:]


def banned(guard: SuppressionGuard, artifact: CompiledPhrases, histories: list[list[int]]) -> np.ndarray:
    logits = torch.zeros(len(histories), guard.vocabulary.size)
    suffix = torch.tensor([suffix_of(history, guard.window_tokens) for history in histories])
    rows = Rows(plan=torch.zeros(len(histories), dtype=torch.long), suffix=suffix)
    return (guard.apply(logits, rows, [Plan(1, "p", suppress(artifact.fingerprint))]) < 0).numpy()


def text_of(vocabulary: Vocabulary, token_ids: list[int]) -> bytes:
    return b"".join(
        vocabulary.bytes[vocabulary.starts[t] : vocabulary.starts[t] + vocabulary.lengths[t]].tobytes() for t in token_ids
    )


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


@pytest.mark.parametrize("match", ["folded", "exact"])
@pytest.mark.parametrize("fold_case", [True, False])
def test_every_character_is_compared_as_the_unicode_data_has_it(match: str, fold_case: bool) -> None:
    by = folding(match, fold_case)
    differing = [
        hex(code)
        for code in range(0x110000)
        if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")
        and "".join(map(chr, by.symbols[by.starts[code] : by.starts[code + 1]]))
        != symbols_of(chr(code), fold_case=fold_case, match=match)
    ]
    assert differing == []


@settings(deadline=None)
@given(st.text(ALPHABETS[-1], max_size=20) | st.text(max_size=12))
def test_numbers_are_told_from_words_as_by_the_twin(text: str) -> None:
    assert is_number(text) == twin_of_is_number(text)


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


SAME = [
    (
        "\u0130brahim I\u015f\u0131k",
        ["ibrahim \u0131\u015f\u0131k", "\u0130BRAH\u0130M I\u015eIK", "IBRAHIM I\u015eIK", "i\u0307brahim i\u015fik"],
    ),
    ("ibrahim \u0131\u015f\u0131k", ["\u0130BRAH\u0130M I\u015eIK", "Ibrahim I\u015f\u0131k"]),
    ("Stra\u00dfe", ["STRASSE", "stra\u1e9ee", "Strasse", "STRA\u00dfE"]),
    ("MASSE WEISSER", ["ma\u00dfe weisser", "Masse wei\u00dfer"]),
    (
        "\u03a0\u03b1\u03c0\u03b1\u03b4\u03cc\u03c0\u03bf\u03c5\u03bb\u03bf\u03c2",
        [
            "\u03a0\u0391\u03a0\u0391\u0394\u039f\u03a0\u039f\u03a5\u039b\u039f\u03a3",
            "\u03a0\u0391\u03a0\u0391\u0394\u038c\u03a0\u039f\u03a5\u039b\u039f\u03a3",
        ],
    ),
    (
        "Vi\u1ec7t Nguy\u1ec5n",
        ["vie\u0323\u0302t nguye\u0302\u0303n", "VI\u00ca\u0323T NGUY\u1ec4N", "vi\u1eb9\u0302t nguy\u00ea\u0303n"],
    ),
    ("\u01c6oka \ufb01n", ["\u01c5OKA FIN", "d\u017eoka fin"]),
    ("O'Brien-\u201cMac\u201d", ["o\u2019brien\u2011\u00abmac\u00bb", 'O\u00b4BRIEN\u2013"Mac"']),
    (
        "Maria\u00a0Kowalczyk",
        [
            "Maria Kowalczyk",
            "maria \t\r\n kowalczyk",
            "Ma\u00adria\u2009Kowal\u200bczyk",
            "\uff2d\uff41\uff52\uff49\uff41 Kowalczyk",
        ],
    ),
    (
        "the herons go\nand nobody",
        ["the herons go / and nobody", "THE HERONS GO\r\n\r\nAND NOBODY", "the herons go //\nand nobody"],
    ),
    ("/etc/passwd", ["cat /etc/passwd", "/etc/passwd", "(/ETC/passwd)"]),
    ("\u0645\u062d\u0645\u062f", ["\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f", "\u0645\u062d\u0640\u0645\u062f"]),
    (
        "\u05e9\u05dc\u05d5\u05dd \u05db\u05d4\u05df",
        ["\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05db\u05bc\u05b9\u05d4\u05b5\u05df"],
    ),
    ("\uae40\ubbfc\uc218", ["\uae40\ubbfc\uc218\ub294", "\u1100\u1175\u11b7\u1106\u1175\u11ab\u1109\u116e"]),
    (
        "+49 30 9018 2000",
        ["+493090182000", "(030) 9018-2000", "0049 30/90182000", "+49 (0)30 9018-2000", "\u0664\u0669\u0663\u06609018 2000"],
    ),
    ("DE89 3704 0044 0532 0130 00", ["DE89370400440532013000", "de89-3704-0044-0532-0130-00"]),
    ("\u0535\u0580\u0587\u0561\u0576", ["\u0535\u0550\u0535\u054e\u0531\u0546", "\u0565\u0580\u0565\u0582\u0561\u0576"]),
    (
        "\u1f00\u03bb\u03bb\u2019 \u1f10\u03b3\u03ce",
        ["\u1f00\u03bb\u03bb\u1fbd \u1f10\u03b3\u03ce", "\u0391\u039b\u039b' \u0395\u0393\u03a9"],
    ),
    ("\u06a9\u0631\u06cc\u0645", ["\u0643\u0631\u064a\u0645"]),
    ("\u7ea6\u7ff0\u00b7\u53f2\u5bc6\u65af", ["\u7ea6\u7ff0\u30fb\u53f2\u5bc6\u65af", "\u7ea6\u7ff0\u2022\u53f2\u5bc6\u65af"]),
    ("$1,250,000", ["$1250000", "\u20ac 1.250.000", "1\u066c250\u066c000"]),
    ("123456", ["1\ufe0f\u20e32\ufe0f\u20e33\ufe0f\u20e34\ufe0f\u20e35\ufe0f\u20e36\ufe0f\u20e3"]),
    ("1984-03-12", ["1984/03/12", "19840312", "1984. 03. 12"]),
]
OTHER = [
    ("\u00d6sel", ["loosely", "osel"]),
    ("Th\u1ebf", ["the", "th\u00ea"]),
    ("Jean-Luc", ["Jean Luc", "JeanLuc"]),
    ("\uae40\ubbfc\uc218", ["\uae40\ubbfc\uc21c", "\uae40\ubbfc"]),
    ("Section 3.2", ["section 32", "Section 3 2"]),
    ("in 1984", ["in 19 84"]),
    ("herons go", ["heronsgo", "herons/go"]),
]


@pytest.mark.parametrize(("phrase", "texts"), SAME, ids=[phrase for phrase, _ in SAME])
def test_a_phrase_is_found_however_running_text_writes_it(phrase: str, texts: list[str]) -> None:
    artifact = compile_phrases([phrase], vocabulary_of([]))
    assert [text for text in texts if not artifact.find(f"He said: {text}.")] == []
    exact = compile_phrases([phrase], vocabulary_of([]), match="exact", fold_case=False)
    assert [text for text in texts if phrase not in _composed(text) and exact.find(text)] == []


@pytest.mark.parametrize(("phrase", "texts"), OTHER, ids=[phrase for phrase, _ in OTHER])
def test_another_letter_or_another_word_is_not_the_phrase(phrase: str, texts: list[str]) -> None:
    artifact = compile_phrases([phrase], vocabulary_of([]))
    assert [text for text in texts if artifact.find(text)] == []


@pytest.mark.parametrize("before", ["\u53eb", "A", "\u0e04\u0e23\u0e31", "\u304b\u3099", "1", ""])
def test_in_scripts_without_spaces_a_word_starts_anywhere(before: str) -> None:
    artifact = compile_phrases(["\u5f20\u4f1f\u660e", "Harry"], vocabulary_of([]), left_boundary=True)
    assert artifact.find(f"{before}\u5f20\u4f1f\u660e\u3002")
    assert bool(artifact.find(f"{before}Harry")) == (before not in ("A", "1"))


def test_a_path_is_found_after_a_word_also_where_words_count() -> None:
    artifact = compile_phrases(["/home/anna/secret.txt"], vocabulary_of([]), left_boundary=True)
    assert artifact.find("cat /home/anna/secret.txt") and artifact.find("/home/anna/secret.txt")


def test_an_accent_that_drops_out_behind_another_one_at_the_beginning_of_a_token_is_seen() -> None:
    vocabulary = vocabulary_of(["\u0323\u0307x".encode()])
    artifact = compile_phrases(["i\u0323x"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    assert artifact.find("i\u0323\u0307x") and banned(guard, artifact, [list(b"i")])[0, SPECIAL + 1]


def test_an_accent_at_the_beginning_of_a_token_belongs_to_the_word_before_it() -> None:
    vocabulary = vocabulary_of(["\u03023".encode()])
    artifact = compile_phrases(["3"], vocabulary, left_boundary=True)
    guard = suppression_guard(vocabulary, artifact)
    got = banned(guard, artifact, [list("\u1eb9".encode()), list(b"-")])
    assert got[:, SPECIAL + 1].tolist() == [False, True]


@pytest.mark.parametrize("phrase", ["\u200b", "\u00ad\ufeff", "\u0640", "\u064e", "\u0301", " \u0308", "/ /"])
def test_a_phrase_of_which_nothing_counts_is_refused(phrase: str) -> None:
    with pytest.raises(InvalidForgetSet, match="could match nothing"):
        compile_phrases([phrase], vocabulary_of([]))


@pytest.mark.parametrize("white", [b" ", b"\n\t", b"        ", "\u00a0\u2003".encode(), "\u200b \u00ad".encode()])
def test_white_space_between_two_words_may_be_as_long_as_it_likes(white: bytes) -> None:
    vocabulary = vocabulary_of([b"Harry", white, b"Potter", b" Potter"])
    artifact = compile_phrases(["Harry Potter"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    harry, space, potter, spaced = range(SPECIAL + 1, SPECIAL + 5)
    for times in (1, 10, guard.window_tokens - 20):
        got = banned(guard, artifact, [[harry, *[space] * times]])[0]
        assert got[potter] and got[spaced], times
        assert not got[harry]


def test_a_window_full_of_what_does_not_count_allows_no_text_at_all() -> None:
    vocabulary = vocabulary_of([b"Harry"])
    artifact = compile_phrases(["Harry Potter"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    hidden = list("\u200b".encode()) * FARTHEST
    assert np.flatnonzero(~banned(guard, artifact, [[SPECIAL + 1, *hidden]])[0]).tolist() == [SPECIAL]


def test_a_number_may_stand_in_a_text_full_of_separators() -> None:
    vocabulary = vocabulary_of([])
    artifact = compile_phrases(["+49 30 9018 2000"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    assert not banned(guard, artifact, [list(b"-" * 2_000)])[0].any()
    assert np.flatnonzero(banned(guard, artifact, [list(b"call 030 / 9018 - 200")])[0]).tolist() == [ord("0")]


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
