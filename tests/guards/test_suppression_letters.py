"""Suppression and letters: what of running text counts as a phrase, and what does not."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guards.errors import InvalidForgetSet
from guards.suppression.automaton import compile_phrases
from guards.suppression.folding import folding
from guards.suppression.spelling import is_number
from tests.guards.suppression_cases import ALPHABETS, SPECIAL, _composed, banned, vocabulary_of
from tests.plans import suppression_guard
from tests.reference import is_number as twin_of_is_number
from tests.reference import symbols_of


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


def test_a_number_may_stand_in_a_text_full_of_separators() -> None:
    vocabulary = vocabulary_of([])
    artifact = compile_phrases(["+49 30 9018 2000"], vocabulary)
    guard = suppression_guard(vocabulary, artifact)
    assert not banned(guard, artifact, [list(b"-" * 2_000)])[0].any()
    assert np.flatnonzero(banned(guard, artifact, [list(b"call 030 / 9018 - 200")])[0]).tolist() == [ord("0")]
