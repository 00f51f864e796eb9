"""Names in texts that were turned as a whole: letters shifted, mirrored, backwards, or taken from the starts of words and lines.

Covered: all 25 Caesar shifts and atbash, whatever else stands around the name; the text backwards, each word backwards; first
letters of words and of lines. Any ordinary text holds many letters in such readings. So only names of `LEAST` letters count, of
words' first letters only those of `LEAST_INITIALS`, and only the letters as they are: no leet, no edits. Not covered: keys longer
than one letter (Vigenère), other steps than one letter or word, shifted letters with accents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from guards.similarity.fit import GLUED
from guards.similarity.keys import Key
from guards.similarity.prefixes import Prefixes
from guards.similarity.shapes import letters_of
from guards.similarity.skeleton import Skeleton, skeleton

LEAST = 6
LEAST_INITIALS = 8
_FIRSTS_OF_LINES = re.compile(r"^[^\w\n]*(?:\d+[.)]\s*)?([^\W\d_])", re.MULTILINE)
_LETTER_WORDS = re.compile(r"[^\W\d_]+")


class TurnedNames:
    """Finds names in what a text becomes when it is turned.

    Args:
        keys: letters of a name -> its keys.
    """

    def __init__(self, keys: Mapping[str, Sequence[str]]) -> None:
        self._keys = keys
        self._exact = Prefixes(keys)
        latin = [letters for letters in keys if letters.isascii() and letters.isalpha()]
        steps, place = _steps(".".join(latin)), 0
        self._by_steps: dict[str, list[str]] = {}
        for letters in latin:
            self._by_steps.setdefault(steps[place : place + len(letters) - 1], []).append(letters)
            place += len(letters) + 1
        self._steps = Prefixes(self._by_steps)

    def find(self, text: str) -> Iterator[tuple[int, int, str, str]]:
        """(start, end, key, how), in characters of the text."""
        shape = skeleton(text)
        if not self._keys or len(shape.letters) < LEAST:
            return
        yield from self._shifted(shape)
        size = len(text)
        for start, end, key in self._words(skeleton(text[::-1])):
            yield size - end, size - start, key, "backwards"
        words = list(_LETTER_WORDS.finditer(text))
        turned = list(text)
        for word in words:
            turned[word.start() : word.end()] = word[0][::-1]
        for start, end, key in self._words(skeleton("".join(turned))):
            yield start, end, key, "words backwards"
        yield from self._firsts([match.span() for match in words], text, LEAST_INITIALS, "first letters")
        if "\n" in text:
            lines = [match.span(1) for match in _FIRSTS_OF_LINES.finditer(text)]
            yield from self._firsts(lines, text, LEAST, "first letters of lines")

    def _words(self, shape: Skeleton) -> Iterator[tuple[int, int, str]]:
        for start in shape.starts:
            for letters in self._exact.at(shape.letters, start):
                for written in self._keys[letters]:
                    if _fits(written, shape, start):
                        yield (*shape.span(start, start + len(letters)), written)

    def _firsts(self, places: list[tuple[int, int]], text: str, least: int, how: str) -> Iterator[tuple[int, int, str, str]]:
        initials = "".join(letters_of(text[start])[:1] or " " for start, _ in places)
        for i in range(len(initials) - least + 1):
            for letters in self._exact.at(initials, i):
                if len(letters) >= least:
                    for written in self._keys[letters]:
                        yield places[i][0], places[i + len(letters) - 1][1], written, how

    def _shifted(self, shape: Skeleton) -> Iterator[tuple[int, int, str, str]]:
        """Caesar shifts keep the steps from letter to letter; atbash turns them round."""
        steps = _steps(shape.letters)
        mirrored = steps.translate(_TURN_ROUND)
        for start in shape.starts:
            for text_steps, atbash in ((steps, False), (mirrored, True)):
                for found in self._steps.at(text_steps, start):
                    for letters in self._by_steps[found]:
                        first, wanted = ord(shape.letters[start]) - 97, ord(letters[0]) - 97
                        shift = (first - wanted) % 26
                        if not (first + wanted == 25 if atbash else shift):
                            continue
                        for written in self._keys[letters]:
                            if _fits(written, shape, start):
                                how = "atbash" if atbash else f"shift {shift}"
                                yield (*shape.span(start, start + len(letters)), written, how)


def _fits(written: str, shape: Skeleton, start: int) -> bool:
    """Whether the words of the text are those of the name, or it is long and in one."""
    key = Key.of(written)
    end = start + len(key.letters)
    if end not in shape.ends or key.accented or len(key.units) < LEAST:
        return False
    breaks = {i for i in range(1, len(key.letters)) if start + i in shape.breaks}
    return breaks == set(key.joints) or (not breaks and len(key.units) >= GLUED) or key.unspaced


_TURN_ROUND = {97 + step: 97 + (26 - step) % 26 for step in range(26)}


def _steps(letters: str) -> str:
    """From each letter to the next, as one of 26 letters; a full stop beside anything that is none of a-z."""
    codes = np.frombuffer(letters.encode("latin-1", "replace"), np.uint8).astype(np.int16)
    latin = (codes >= ord("a")) & (codes <= ord("z"))
    steps = np.where(latin[1:] & latin[:-1], (codes[1:] - codes[:-1]) % 26 + ord("a"), ord("."))
    return steps.astype(np.uint8).tobytes().decode("ascii")
