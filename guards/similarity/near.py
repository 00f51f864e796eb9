"""Names within one edit: a letter changed, left out, put in, or two neighbours swapped.

Two strings are within one edit only if they are the same after at most one letter is taken out of each (symmetric deletion,
SymSpell). So the hashes of every name with and without each letter are sorted once, and those of the text's words are looked up
in them, all at once in numpy: the time hardly depends on how many names there are. What is found is then compared letter by
letter.

An edit may be in a word of `EDITED` letters, or swap two letters in one of four. It may not turn one ending into another, since
that makes other people ("Daniela", "Mario", "Roberts", "Christian" for "Christina"): see `_is_ending`. A name of one word is not
edited in its last two letters ("Alexandre").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEAR = 9
"""Letters from which on a name is also looked for with one edit."""
EDITED = 5
"""Letters of a word in which a letter may be changed."""
_ENDINGS = frozenset("aeiousn")
_BASE = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_BASE, -1, 1 << 64)


class NearIndex:
    """Finds strings within one edit.

    Args:
        strings: each longer than two letters.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = list(strings)
        lengths = np.array([len(each) for each in self.strings], np.int64)
        ends = np.cumsum(lengths)
        hashes, owners = _deletions("".join(self.strings), ends - lengths, ends)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]
        self.shortest, self.longest = int(lengths.min(initial=0)), int(lengths.max(initial=0))

    def candidates(self, letters: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(index of a span, index of a string) for all that may be within one edit, by their hashes."""
        if not len(self._hashes) or not spans:
            return []
        bounds = np.array(spans, np.int64)
        hashes, which = _deletions(letters, bounds[:, 0], bounds[:, 1])
        low = np.searchsorted(self._hashes, hashes, "left")
        high = np.searchsorted(self._hashes, hashes, "right")
        found = {
            (int(which[i]), int(owner)) for i in np.flatnonzero(high > low) for owner in self._owners[int(low[i]) : int(high[i])]
        }
        return sorted(found)


def _deletions(letters: str, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of every [start, end) of the letters, whole and without each of its letters; and whose they are."""
    codes = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + np.uint64(1)
    powers = _powers(_BASE, len(codes) + 1)
    inverse = _powers(_INVERSE, len(codes) + 2)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers[:-1], dtype=np.uint64)])
    whole = (sums[ends] - sums[starts]) * inverse[starts]
    lengths = ends - starts
    which = np.repeat(np.arange(len(starts)), lengths)
    first = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - first[which] + starts[which]
    after = (sums[ends[which]] - sums[place + 1]) * np.uint64(_INVERSE)
    without = (sums[place] - sums[starts[which]] + after) * inverse[starts[which]]
    return np.concatenate([whole, without]), np.concatenate([np.arange(len(starts)), which])


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def is_near(wanted: Sequence[str], seen: Sequence[str], *, whole: bool = True) -> bool:
    """Whether the words of a text are those of a name but for one edit in one of them, none of the edits that make another name.

    Args:
        wanted: the words of the name.
        seen: as many words, or one that is all of them.
        whole: these are all words of the name, not only its first.
    """
    if len(seen) == 1 < len(wanted):
        return _edited("".join(wanted), seen[0])
    different = [(one, other) for one, other in zip(wanted, seen, strict=True) if one != other]
    if whole and len(wanted) == 1 and different and wanted[0][:-2] != seen[0][: len(wanted[0]) - 2]:
        return _edited(wanted[0], seen[0])
    return (len(wanted) > 1 or not whole) and len(different) == 1 and _edited(*different[0])


def _edited(wanted: str, seen: str) -> bool:
    """Whether two different words are one allowed edit apart."""
    shorter = min(len(wanted), len(seen))
    if abs(len(wanted) - len(seen)) > 1 or any(map(str.isdigit, seen)):
        return False
    first = next((i for i in range(shorter) if wanted[i] != seen[i]), shorter)
    if len(wanted) == len(seen):
        if wanted[first : first + 2] == seen[first : first + 2][::-1] and wanted[first + 2 :] == seen[first + 2 :]:
            return len(wanted) >= EDITED - 1 and not _is_ending(wanted[first:], seen[first:])
        changed = wanted[first + 1 :] == seen[first + 1 :]
    elif len(wanted) > len(seen):
        changed = wanted[first + 1 :] == seen[first:]
    else:
        changed = wanted[first:] == seen[first + 1 :]
    return changed and len(wanted) >= EDITED and not _is_ending(wanted[first:], seen[first:])


def _is_ending(wanted: str, seen: str) -> bool:
    """Whether what is different is how words end: at most two letters, of those that endings are made of."""
    return len(wanted) <= 2 and len(seen) <= 2 and set(wanted + seen) <= _ENDINGS
