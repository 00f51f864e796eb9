"""How often phrases occur in ordinary text, so that nobody takes a letter, "the" or "n/a" from every answer by mistake.

The sample, ``ordinary.txt``, is text as assistants write it (explanations, letters, recipes, dialogues, tables of tips): 3,500
words of English and 100 to 150 words each of 16 other languages. It was written for this purpose. The most frequent words of these
languages follow, since some of them are missing from so short a text.

What is covered: phrases that are frequent in any of these languages, single letters and signs, what spreadsheets put into empty
cells, special tokens of chat templates. What is not covered: words that are frequent in one field only, other languages, and
words that a sample of this size lacks by chance. Matching here is simpler than that of the guard: letter case and runs of white
space do not count, everything else does.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from guards.letters import is_invisible, is_unspaced, is_white

SAMPLE = Path(__file__).with_name("ordinary.txt")
_MOST_PER_THOUSAND_WORDS = 1
_MOST_IN_SHORT_PARTS = 2
"""In 100 to 150 words, chance alone brings many words twice."""
_PREFIX_CHARACTERS = 64
"""Suffixes of the sample are sorted by that many characters; longer phrases are compared with the text itself."""
_WHITE = re.compile("[\\s\u2800]+")
_PLACEHOLDERS = frozenset(
    re.split(
        r",\s+",
        """n/a, n.a., n.a, #n/a, k. a., k.a., н/д, nil, none, null, nan, undefined, tbd, tba, tbc, to be determined, todo,
        not available, not applicable, unknown, unbekannt, inconnu, desconocido, 不明, 未知, empty, blank, missing,
        missing value, keine, 無し, なし, 없음, #ref!, #value!, #name?, #null!, #div/0!, #error!, test, tests, testing, example,
        sample, placeholder, foo, lorem ipsum, xxx, xxxx, name, names, first name, last name, surname, phrase, phrases, alias,
        aliases, text, true, false, yes""",
    )
)
_SPECIAL_TOKEN = re.compile(
    r"<[|｜][^|｜<>]{1,60}[|｜]>"  # noqa: RUF001
    r"|</?(?:s|bos|eos|pad|unk|mask|sep|cls|think|tool_call|tool_response|tools|start_of_turn|end_of_turn|start_of_image)>"
    r"|\[/?(?:inst|cls|sep|pad|unk|mask|bos|eos|system_prompt|available_tools|tool_calls|tool_results)\]"
    r"|<</?sys>>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Occurrences:
    """How often a phrase occurs in the sample, in all languages together, and whether that is too often in one of them."""

    total: int = 0
    too_common: bool = False


def ordinary_counts(phrases: Sequence[str], case_sensitive: bool = False, word_boundary: bool = False) -> list[Occurrences]:
    """How often each phrase occurs in the sample of ordinary text. 100,000 phrases take about a second.

    Args:
        case_sensitive: whether letter case counts.
        word_boundary: whether a phrase counts only where it starts a word, as in a forget set.
    """
    index = _index(case_sensitive, word_boundary)
    return [index.count(_normalize(phrase, case_sensitive)) for phrase in phrases]


def why_never_meant(phrase: str) -> str | None:
    """Why a phrase (or alias) cannot name anything, if so: a letter, a sign, an empty cell, a special token, "und"."""
    visible = phrase if phrase.isascii() else "".join(character for character in phrase if not is_invisible(character))
    text = _normalize(visible, case_sensitive=True).strip()
    if text.casefold() in _PLACEHOLDERS:
        return "stands for an empty cell, a heading or a trial"
    if text.casefold() in _frequent_words():
        return "is among the most frequent words of a language"
    if _SPECIAL_TOKEN.fullmatch(text):
        return "is a special token of chat templates"
    if all(_is_sign(character) or is_white(character) for character in text):
        return "has no letter and no digit"
    if len(text) <= 2 and text.isascii():
        return "has one or two characters"
    if len(text) == 1 and unicodedata.category(text)[0] in "LNM" and not _is_ideograph(text):
        return "is a single letter or digit"
    return None


def sample_words() -> int:
    """How many words the sample has, separated by white space."""
    return sum(len(part.split()) for part in _parts())


class _Index:
    """The sorted suffixes of the sample: all occurrences of a phrase stand side by side in it."""

    def __init__(self, parts: Sequence[str], *, word_boundary: bool) -> None:
        text, ends, most = "", [], []
        for part in parts:
            text += part + "\n"  # no phrase contains a line end, see _normalize
            ends.append(len(text))
            most.append(max(_MOST_IN_SHORT_PARTS, len(part.split()) * _MOST_PER_THOUSAND_WORDS // 1_000))
        starts = (i for i in range(len(text)) if not word_boundary or starts_word(text, i))
        pairs = sorted((text[i : i + _PREFIX_CHARACTERS], i) for i in starts)
        self._text, self._ends, self._most = text, ends, most
        self._prefixes = [prefix for prefix, _ in pairs]
        self._starts = [start for _, start in pairs]

    def count(self, phrase: str) -> Occurrences:
        if not phrase:
            return Occurrences()
        prefix = phrase[:_PREFIX_CHARACTERS]
        first = bisect_left(self._prefixes, prefix)
        if first == len(self._prefixes) or not self._prefixes[first].startswith(prefix):
            return Occurrences()
        last = bisect_right(self._prefixes, prefix + "\U0010ffff", lo=first)
        starts = [start for start in self._starts[first:last] if self._text.startswith(phrase, start)]
        by_language = Counter(bisect_right(self._ends, start) for start in starts)
        return Occurrences(len(starts), any(count > self._most[language] for language, count in by_language.items()))


def starts_word(text: str, index: int) -> bool:
    """Whether a word can start at ``index``: no letter, digit or mark of a script with spaces stands before it."""
    if index == 0 or is_unspaced(text[index]):
        return True
    before = text[index - 1]
    return is_unspaced(before) or not (before.isalnum() or unicodedata.category(before)[0] == "M")


@cache
def _sample() -> tuple[tuple[str, ...], str]:
    """The texts, one for each language, and the frequent words of all."""
    *parts, frequent = (part.strip() for part in re.split(r"^== .+ ==$", SAMPLE.read_text("utf-8"), flags=re.MULTILINE)[1:])
    return tuple(parts), frequent


def _parts() -> tuple[str, ...]:
    return _sample()[0]


@cache
def _frequent_words() -> frozenset[str]:
    return frozenset(_sample()[1].casefold().split())


@cache
def _index(case_sensitive: bool, word_boundary: bool) -> _Index:
    return _Index([_normalize(part, case_sensitive) for part in _parts()], word_boundary=word_boundary)


def _normalize(text: str, case_sensitive: bool) -> str:
    """Composed, with one space for each run of white space, at the ends too; in small letters unless case counts."""
    text = unicodedata.normalize("NFC", text)
    if not case_sensitive:
        text = unicodedata.normalize("NFC", text.casefold())
    return _WHITE.sub(" ", text)


def _is_sign(character: str) -> bool:
    """Punctuation and the like. An emoji is not a sign here: somebody may want one gone."""
    return unicodedata.category(character)[0] in "PZ" or unicodedata.category(character) in ("Sm", "Sk", "Sc")


def _is_ideograph(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY", "TANGUT", "NUSHU"))
