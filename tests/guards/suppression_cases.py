"""Phrases, vocabularies and texts to try suppression with."""

from __future__ import annotations

import unicodedata

import numpy as np
import torch
from hypothesis import strategies as st

from guards.suppression.artifact import CompiledPhrases
from guards.suppression.guard import SuppressionGuard
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, Plan, Rows
from tests.plans import suppress
from tests.reference import forms

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
