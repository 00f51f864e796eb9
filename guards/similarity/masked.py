"""Names whose vowels are starred out: "H*rry P*tter".

Names of `MASKED` letters are found by their consonants, then letter by letter, at least one star for each letter. Not covered:
shorter names, starred consonants, names of which fewer letters are left than are starred.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from guards.similarity.shapes import letters_of

MASKED = 8
_WORD = re.compile(r"[^\s_/-]+")
_VOWELS = str.maketrans("", "", "aeiou*")
_MOST_WORDS = 5


class MaskedNames:
    """Finds names with stars in them.

    Args:
        keys: letters of a name -> its keys.
    """

    def __init__(self, keys: Mapping[str, Sequence[str]]) -> None:
        self._keys = keys
        self._consonants: dict[str, list[str]] = {}
        for letters in keys:
            if len(letters) >= MASKED and letters.isascii():
                self._consonants.setdefault(letters.translate(_VOWELS), []).append(letters)

    def find(self, text: str) -> Iterator[tuple[int, int, str, str]]:
        """(start, end, key, how), in characters of the text."""
        if "*" not in text or not self._consonants:
            return
        words = [(word.start(), word.end()) for word in _WORD.finditer(text)]
        starred = [i for i, (low, high) in enumerate(words) if "*" in text[low:high]]
        for first in sorted({i for star in starred for i in range(max(0, star - _MOST_WORDS + 1), star + 1)}):
            for last in range(first, min(first + _MOST_WORDS, len(words))):
                low, high = words[first][0], words[last][1]
                run = text[low:high].rstrip(".,;:!?\"')*")
                if "*" not in run or high - low > 100:
                    continue
                seen = "".join(c if c == "*" else letters_of(c) for c in run)
                for letters in self._consonants.get(seen.translate(_VOWELS), ()):
                    if self._fits(seen, letters):
                        for written in self._keys[letters]:
                            yield low, low + len(run), written, "starred out"

    @staticmethod
    def _fits(seen: str, letters: str) -> bool:
        stars = seen.count("*")
        parts = re.findall(r"\*+|[^*]", seen)
        pattern = "".join(f".{{1,{len(part)}}}" if part[0] == "*" else part for part in parts)
        return 2 * stars <= len(letters) and re.fullmatch(pattern, letters) is not None
