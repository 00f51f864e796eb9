"""Finds any of many names in a text, in time that hardly depends on their number.

Covered: names as `keys` has them, wherever `fit` says that they stand; with one edit if they are long (`near`); in texts that
were turned as a whole (`turned`). Not covered: what has to be decoded first (`disguise`), transliteration, translation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from guards.similarity.affixes import may_go_on, proclitic_fits, proclitics
from guards.similarity.fit import FARTHEST, fit
from guards.similarity.keys import NAME, TEXT, Key, letters_in
from guards.similarity.masked import MaskedNames
from guards.similarity.near import NEAR, NearIndex, is_near
from guards.similarity.prefixes import Prefixes
from guards.similarity.shapes import LEET
from guards.similarity.skeleton import Skeleton, skeletons
from guards.similarity.turned import LEAST, TurnedNames


@dataclass(frozen=True, slots=True)
class Found:
    """A name in a text."""

    start: int  # characters of the text
    end: int
    key: str
    how: str = "plain"  # how it is written: see `fit`; "one edit"


class Names:
    """Finds names.

    Args:
        keys: of all names (`keys.keys_of`).
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._folded: dict[str, list[str]] = {}
        near: dict[str, list[str]] = {}
        turned: dict[str, list[str]] = {}
        for key in keys:
            letters = letters_in(key)
            self._folded.setdefault(letters.translate(LEET), []).append(key)
            if key[0] == NAME and len(letters) >= NEAR and _may_be_near(key):
                near.setdefault(letters, []).append(key)
            if key[0] in (NAME, TEXT) and len(letters) >= LEAST:
                turned.setdefault(letters, []).append(key)
        self._prefixes = Prefixes(self._folded)
        self._near = _NearNames(near)
        self._turned = TurnedNames(turned)
        self._masked = MaskedNames(near)

    def find(self, text: str, *, least: int = 0) -> list[Found]:
        """Every place where a name stands, names that begin with one another all of them.

        Args:
            least: letters that a name must have.
        """
        found: dict[tuple[int, int, str], str] = {}
        for shape in skeletons(text) if self._folded else ():
            for first, start in _starts(shape):
                for folded in self._prefixes.at(shape.folded, start):
                    for written in self._folded[folded]:
                        key = Key.of(written)
                        if least > len(key.units) or not proclitic_fits(shape.letters[first:start], len(key.units)):
                            continue
                        if (fitted := fit(key, shape, start)) is not None:
                            end, how = fitted
                            how = how if first == start else "particle" if how == "plain" else f"{how}, particle"
                            found.setdefault((*shape.span(start, end), written), how)
            if not shape.symbols:
                exact = sorted({(start, end) for start, end, _ in found})
                for low, high, written in self._near.find(shape):
                    start, end = shape.span(low, high)
                    if len(Key.of(written).units) >= least and not any(start < other and one < end for one, other in exact):
                        found.setdefault((start, end, written), "one edit")
        return [Found(*place, how) for place, how in sorted(found.items())]

    def find_turned(self, text: str) -> list[Found]:
        """Names in a text whose letters are shifted or in another order (`turned`), and names with stars (`masked`)."""
        return [Found(*place) for place in (*self._turned.find(text), *self._masked.find(text))]

    def open_from(self, text: str) -> int:
        """Where in ``text`` the first name begins that more text could complete; ``len(text)`` if there is none."""
        opened = len(text)
        for shape in skeletons(text) if self._folded else ():
            if not shape.origin or len(text) - shape.origin[-1] > FARTHEST:
                continue
            opened = min(opened, self._open(shape))
            if not shape.symbols and (start := self._near.open_from(shape)) is not None:
                opened = min(opened, shape.origin[start])
        return opened

    def _open(self, shape: Skeleton) -> int:
        for first, start in _starts(shape):
            if self._prefixes.go_on(shape.folded[start:]) or self._may_go_on(shape, start):
                return shape.origin[first]
        return len(shape.text)

    def _may_go_on(self, shape: Skeleton, start: int) -> bool:
        """Whether a name stands there that ends in the text's last word, which more text may continue."""
        if shape.origin[-1] + 1 < len(shape.text) or not may_go_on(shape.text):
            return False
        last = len(shape.letters)
        return any(shape.end_of_word(start + len(folded)) == last for folded in self._prefixes.at(shape.folded, start))


def _may_be_near(key: str) -> bool:
    read = Key.of(key)
    return read.alphabetic and not read.accented and len(read.units) >= NEAR


def _starts(shape: Skeleton) -> Iterator[tuple[int, int]]:
    """(where a word starts, where a name may start in it): after what is written onto it, too."""
    for start in shape.starts:
        yield start, start
        for length in proclitics(shape.letters, start):
            yield start, start + length


class _NearNames:
    """Names that are long enough to be found with one edit, by their letters."""

    def __init__(self, strings: dict[str, list[str]]) -> None:
        self._written = strings
        self._whole = NearIndex(list(strings))
        # What may be left open: the first words of a name.
        heads: dict[str, set[tuple[str, ...]]] = {}
        self._words = {1}
        for each in strings.values():
            for written in each:
                parts = Key.of(written).parts
                self._words.add(len(parts))
                for count in range(1, len(parts)):
                    heads.setdefault("".join(parts[:count]), set()).add(parts[:count])
        self._heads = heads
        self._begun = NearIndex(list(heads))

    def find(self, shape: Skeleton) -> Iterator[tuple[int, int, str]]:
        """(start, end, key) in letters, exact ones left out."""
        spans = self._spans(shape, self._whole, self._words)
        for which, owner in self._whole.candidates(shape.letters, spans):
            letters = self._whole.strings[owner]
            start, end = spans[which]
            seen = _words(shape, start, end)
            for written in self._written[letters]:
                parts = Key.of(written).parts
                if len(seen) in (1, len(parts)) and is_near(parts, seen):
                    yield start, end, written

    def open_from(self, shape: Skeleton) -> int | None:
        """The letter at which the last words begin, if they may begin a name, as an unfinished last word always may."""
        if not self._written:
            return None
        length = len(shape.letters)
        over = shape.origin[-1] + 1 < len(shape.text)
        complete = length if over else max(shape.breaks)
        spans = [span for span in self._spans(shape, self._begun, self._words) if span[1] == complete]
        starts = [] if over else [complete]
        for which, owner in self._begun.candidates(shape.letters, spans):
            seen = _words(shape, *spans[which])
            heads = self._heads[self._begun.strings[owner]]
            if any(len(parts) == len(seen) and (seen == parts or is_near(parts, seen, whole=False)) for parts in heads):
                starts.append(spans[which][0])
        return min(starts, default=None)

    @staticmethod
    def _spans(shape: Skeleton, index: NearIndex, words: set[int]) -> list[tuple[int, int]]:
        """Runs of so many words that are about as long as some name."""
        bounds = [*sorted(shape.breaks), len(shape.letters)]
        shortest, longest, most = index.shortest - 1, index.longest + 1, max(words)
        found = []
        for i in range(len(bounds) - 1):
            for j in range(i + 1, min(i + most, len(bounds) - 1) + 1):
                length = bounds[j] - bounds[i]
                if length > longest:
                    break
                if length >= shortest and j - i in words:
                    found.append((bounds[i], bounds[j]))
        return found


def _words(shape: Skeleton, start: int, end: int) -> tuple[str, ...]:
    bounds = [start, *sorted(i for i in shape.breaks if start < i < end), end]
    return tuple(shape.letters[low:high] for low, high in pairwise(bounds))
