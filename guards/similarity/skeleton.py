"""A text as its letters: what names are compared by.

A text's *skeleton* is its letters and digits, each as what it may be read as (`shapes`), with the place in the text where each
comes from, and where words start and end. "P0tter" with Greek or Cyrillic look-alikes, "P.o.t.t.e.r" and one with a zero-width
space inside all have the same letters as "Potter", but for the digit; which differences count is for `fit` to say.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from guards.letters import is_invisible, is_unspaced
from guards.similarity.shapes import LEET, SYMBOLS, is_spoken_mark, letters_of

_WORD = re.compile(r"[A-Za-z0-9]+")
_SYMBOL_IN_WORD = re.compile(r"(?<=[^\W_])[!|+¡@$€£]+(?=[^\W_])|(?<![^\W_])[@$€£](?=[^\W_])|(?<=[^\W_])[@$](?![^\W_])")


@dataclass(frozen=True)
class Skeleton:
    """A text's letters and where they come from."""

    text: str
    letters: str
    origin: list[int]  # [len(letters)] index into the text
    starts: list[int]  # ascending indexes into letters at which a word starts
    ends: frozenset[int]  # indexes into letters before which a word ends
    breaks: frozenset[int]  # the starts that have something else than a letter before them in the text
    symbols: bool = False  # whether symbols count as letters

    @cached_property
    def folded(self) -> str:
        """The letters with digits as letters and ``l`` as ``i``, at the same places."""
        return self.letters.translate(LEET)

    def written(self, i: int) -> str:
        """The character of the text that a letter comes from."""
        return self.text[self.origin[i]]

    def before(self, i: int) -> str:
        """What stands between a letter and the one before it."""
        return self.text[self.origin[i - 1] + 1 : self.origin[i]]

    def end_of_word(self, i: int) -> int:
        """Where the word ends to which the letter before ``i`` belongs; ``i`` if it ends there."""
        while i not in self.ends:
            i += 1
        return i

    def span(self, start: int, end: int) -> tuple[int, int]:
        """[start, end) of letters as characters of the text."""
        return self.origin[start], self.origin[end - 1] + 1


def skeletons(text: str) -> Iterator[Skeleton]:
    """Every way in which the letters of a text may be seen: at least one, at most four."""
    forms = (False,) if text.isascii() else (False, True)
    symbols = (False, True) if _SYMBOL_IN_WORD.search(text) else (False,)
    for as_seen in forms:
        for with_symbols in symbols:
            yield skeleton(text, as_seen=as_seen, symbols=with_symbols)


def skeleton(text: str, *, as_seen: bool = False, symbols: bool = False) -> Skeleton:
    """The skeleton of any text.

    Args:
        as_seen: capitals as what they look like, see `shapes.letters_of`.
        symbols: ``@``, ``$`` and the like inside words, and some at their start, are letters.
    """
    if text.isascii() and not symbols:
        return _of_ascii(text)
    in_words = {i for run in _SYMBOL_IN_WORD.finditer(text) for i in range(run.start(), run.end())} if symbols else ()
    letters: list[str] = []
    origin: list[int] = []
    starts: list[int] = []
    ends: set[int] = set()
    breaks: set[int] = set()
    inside, writing = False, ""
    for i, character in enumerate(text):
        found = SYMBOLS.get(character, "") if i in in_words else letters_of(character, as_seen)
        if found:
            place = len(origin)
            kind = writing if inside and is_spoken_mark(character) else _writing(character)
            if not inside:
                starts.append(place)
                breaks.add(place)
            elif kind != writing or (kind == "unspaced" and not is_spoken_mark(character)):
                starts.append(place)
                ends.add(place)
            letters.append(found)
            origin += [i] * len(found)
            inside, writing = True, kind
        elif inside and not is_invisible(character) and unicodedata.category(character)[0] != "M" and character != "ـ":
            ends.add(len(origin))
            inside = False
    ends.add(len(origin))
    return Skeleton(text, "".join(letters), origin, starts, frozenset(ends), frozenset(breaks), symbols)


def _of_ascii(text: str) -> Skeleton:
    origin: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for word in _WORD.finditer(text):
        starts.append(len(origin))
        origin += range(word.start(), word.end())
        ends.append(len(origin))
    letters = "".join(_WORD.findall(text)).lower()
    return Skeleton(text, letters, origin, starts, frozenset([*ends, len(origin)]), frozenset(starts))


@cache
def _writing(character: str) -> str:
    """Writing systems between which a word ends although nothing stands there: "Harryは", "Potter는"."""
    name = unicodedata.name(character, "")
    if name.startswith(("KATAKANA", "HALFWIDTH KATAKANA")):
        return "katakana"
    if is_unspaced(character):
        return "unspaced"
    if name.startswith(("HANGUL", "HALFWIDTH HANGUL")):
        return "hangul"
    return "arabic" if name.startswith(("ARABIC", "HEBREW")) else ""
