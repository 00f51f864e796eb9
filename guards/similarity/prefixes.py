"""Many strings, sorted: which of them stand at a place, and which could still."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class Prefixes:
    """Finds strings at a place in a text in time that hardly depends on their number. Empty ones are never found."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = sorted({each for each in strings if each})
        self.longest = max(map(len, self._strings), default=0)
        self._heads = {each[:2] for each in self._strings}

    def __bool__(self) -> bool:
        return bool(self._strings)

    def at(self, text: str, start: int) -> Iterator[str]:
        """The strings that the text has at ``start``, the longest first."""
        if text[start : start + 2] not in self._heads and text[start : start + 1] not in self._heads:
            return
        rest = text[start : start + self.longest]
        while rest:
            i = bisect_right(self._strings, rest) - 1
            if i < 0:
                return
            string = self._strings[i]
            shared = 0
            while shared < min(len(string), len(rest)) and string[shared] == rest[shared]:
                shared += 1
            if shared == len(string):
                yield string
            # Any shorter string that ``rest`` starts with is a prefix of what the two share.
            rest = rest[:shared] if shared < len(string) else rest[: len(string) - 1]

    def go_on(self, beginning: str) -> bool:
        """Whether some string is longer than ``beginning`` and starts with it."""
        i = bisect_right(self._strings, beginning)
        return i < len(self._strings) and self._strings[i].startswith(beginning)
