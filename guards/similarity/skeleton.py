"""Names as their letters: what is left of a text when case, accents, spacing, look-alikes and digits for letters are taken away.

A text's *skeleton* is its letters and digits, each replaced by what it looks like (UTS #39 confusables, NFKC, no marks, ``0`` for
``o`` and so on), with the place in the text where each comes from. "P0tter" with Greek or Cyrillic look-alikes, "P.o.t.t.e.r" and
one with a zero-width space inside all have the skeleton of "Potter". Names match where their skeleton starts at the start of a word
and ends at the end of one.

Covered: letter case, accents, full width and other compatibility forms, invisible characters, homoglyphs, spaced-out letters, leet
digits, ``@`` and ``$`` inside words. Not covered: misspellings, transliteration (Гарри Поттер), other languages' names for the same
person, encodings (see `disguise`).
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_DIGITS = str.maketrans("013457", "oieast")
_LEET = _DIGITS | {ord("l"): "i"}
"""Digits that stand for letters, and ``l`` for ``i``, since ``1`` may mean either. Done to names and texts alike."""
_SYMBOLS = {"@": "a", "$": "s", "!": "i", "|": "i", "€": "e", "£": "l"}
"""Count as letters only between letters: elsewhere they are punctuation."""
_INVISIBLE = {0x034F, 0x115F, 0x1160, 0x3164, 0xFFA0, 0x00AD}
"""Not of category Cf, and nothing to see: grapheme joiner, Hangul fillers, soft hyphen."""
FARTHEST = 64
"""Characters without a letter after which nobody would read on in a name."""
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x31FF),  # CJK radicals, kana
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Scripts without spaces: every character counts as a word."""


@cache
def _look_alikes() -> dict[str, str]:
    """Character -> the ASCII letter or digit that it may be taken for."""
    known = json.loads((files("confusable_homoglyphs") / "confusables.json").read_text("utf-8"))
    table: dict[str, str] = {}
    for character, others in known.items():
        plain = [other["c"] for other in others if other["c"].isascii() and other["c"].isalnum()]
        if plain and not character.isascii():
            table[character] = plain[0]
    return table


def is_invisible(character: str) -> bool:
    """Whether a character shows nothing: zero width, direction marks, tags, variation selectors, fillers."""
    code = ord(character)
    return unicodedata.category(character) == "Cf" or code in _INVISIBLE or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF


@cache
def _shape_of(character: str, as_seen: bool) -> str:
    """What a character may be read as, in lower case: nothing, or one or more of a-z, 0-9 and letters of other scripts.

    A capital may look like another letter than its small form does (a Greek capital nu is an N, a small one a v). ``as_seen`` goes
    by the form that stands there; otherwise both forms count as what the small one looks like, so that letter case makes no
    difference.
    """
    shape = []
    for part in unicodedata.normalize("NFKC", character):
        if as_seen:
            part = _look_alikes().get(part, part)
        for each in unicodedata.normalize("NFKD", part.casefold()):
            like = _look_alikes().get(each) or _look_alikes().get(each.upper()) or each
            like = like.casefold()
            shape.append(like if like.isalnum() else "")
    return "".join(shape)


@cache
def _letters_of(character: str, as_seen: bool = False) -> str:
    """What a character leaves in a skeleton."""
    return _shape_of(character, as_seen).translate(_LEET)


def plain_letters(word: str) -> str:
    """A word in the ASCII letters that it may be read as: look-alikes and leet undone, letter case lost."""
    return "".join(_shape_of(character, True).translate(_DIGITS) or character for character in word)


def _unspaced(character: str) -> bool:
    code = ord(character)
    return code >= 0x0E00 and any(low <= code <= high for low, high in _UNSPACED)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A text's letters and where they come from."""

    letters: str
    origin: list[int]  # [len(letters)] index into the text
    starts: list[int]  # indexes into letters at which a word starts
    ends: frozenset[int]  # indexes into letters before which a word ends


def skeleton(text: str, *, as_seen: bool = False) -> Skeleton:
    """The skeleton of any text; ``as_seen``: capitals as what they look like, see `_shape_of`."""
    letters: list[str] = []
    origin: list[int] = []
    starts: list[int] = []
    ends: set[int] = set()
    inside = False
    for i, character in enumerate(text):
        found = _letters_of(character, as_seen)
        if not found and character in _SYMBOLS and inside and i + 1 < len(text) and _letters_of(text[i + 1], as_seen):
            found = _SYMBOLS[character]
        if found:
            if not inside or _unspaced(character):
                starts.append(len(letters))
                ends.add(len(letters))
            letters += found
            origin += [i] * len(found)
            inside = True
            if _unspaced(character):
                ends.add(len(letters))
                inside = False
        elif inside and not is_invisible(character) and not unicodedata.combining(character):
            ends.add(len(letters))
            inside = False
    ends.add(len(letters))
    return Skeleton("".join(letters), origin, starts, frozenset(ends))


def key_of(name: str) -> str:
    """What `Names` looks for; empty for a name without letters and digits."""
    return skeleton(name).letters


def _skeletons(text: str) -> list[Skeleton]:
    return [skeleton(text)] if text.isascii() else [skeleton(text), skeleton(text, as_seen=True)]


@dataclass(frozen=True, slots=True)
class Found:
    """A name in a text."""

    start: int  # characters of the text
    end: int
    key: str  # the skeleton of the name


class Names:
    """Finds any of many names in a text, in time that hardly depends on their number.

    Args:
        keys: skeletons of the names (`key_of`); empty ones never match.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = sorted({key for key in keys if key})
        self._longest = max(map(len, self._keys), default=0)

    def find(self, text: str) -> list[Found]:
        """Every place where a name starts and ends with a word. Names that begin with one another are all found."""
        if not self._keys:
            return []
        found: dict[tuple[int, int, str], None] = {}
        for shape in _skeletons(text):
            for start in shape.starts:
                for key in self._at(shape, start):
                    found[shape.origin[start], shape.origin[start + len(key) - 1] + 1, key] = None
        return [Found(*each) for each in sorted(found)]

    def open_from(self, text: str) -> int:
        """Where in ``text`` the first name begins that more text could complete; ``len(text)`` if there is none."""
        opened = len(text)
        for shape in _skeletons(text) if self._keys else ():
            if shape.origin and len(text) - shape.origin[-1] > FARTHEST:
                continue
            for start in shape.starts:
                rest = shape.letters[start:]
                i = bisect_right(self._keys, rest)
                if i < len(self._keys) and self._keys[i].startswith(rest):
                    opened = min(opened, shape.origin[start])
                    break
        return opened

    def _at(self, shape: Skeleton, start: int) -> Iterator[str]:
        """The names at one place, the longest first."""
        rest = shape.letters[start : start + self._longest]
        while rest:
            i = bisect_right(self._keys, rest) - 1
            if i < 0:
                return
            key = self._keys[i]
            shared = 0
            while shared < min(len(key), len(rest)) and key[shared] == rest[shared]:
                shared += 1
            if shared == len(key) and start + len(key) in shape.ends:
                yield key
            # Any shorter name that ``rest`` starts with is a prefix of what the two share.
            rest = rest[:shared] if shared < len(key) else rest[: len(key) - 1]
