"""Texts inside texts: what a reader would decode, decoded, to a bounded depth and size.

All passages of a text are decoded at once, in their places. So a name that is half in one passage and half beside it is read, and
the number of readings does not grow with that of passages; what is decoded is decoded again, up to `DEPTH`.

Covered: see `codes` and `alphabets`; letters of other scripts inside words, leet and spaced-out letters as they are meant, for
the encoder; sentences that are words only when their letters are shifted or read backwards, for the encoder (`turned` finds names
in them). Not covered: ciphers with a key, compression, encodings of encodings beyond `DEPTH`, pictures.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from guards.errors import GuardError
from guards.letters import is_invisible
from guards.similarity.alphabets import signs
from guards.similarity.codes import Passage, passages
from guards.similarity.shapes import plain_letters

DEPTH = 2
MAX_READINGS = 1_000
"""Decoded passages of one text. One that has more is an attack on time, or on this bound, and is not read at all."""
_WORD = re.compile(r"\w+")
_SPACED = re.compile(r"(?<![^\W_])(?:[^\W_][ .\-_*·|/]{1,3}){3,}[^\W_](?![^\W_])")  # letters are no separators: else exponential
_SENTENCE = re.compile(r"[^.:;!?\n\"“”()]{12,}")
_CODES_AT_END = re.compile(
    r"(?<![^\s,;:/|])(?:(?:0[xX][0-9a-fA-F]{2}|\d{1,3}|[01]{7,8}|[0-9a-fA-F]{2}|[.\-·•−–]{1,5}|U\+[0-9A-F]{4,6}|[A-Za-z0-9+/]{76})"  # noqa: RUF001
    r"(?:[\s,;/|-]{1,3}|\Z)){3,}\Z"
)
_LONGEST_OPEN = 1_000
_COMMON = frozenset("etaoinsrh")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class TooMuchToRead(GuardError):
    """A text that would take too long to read. It is refused, since what is not read cannot be judged."""


@dataclass(frozen=True, slots=True)
class View:
    """One reading of a text.

    ``passages`` are the parts of ``text`` that were decoded, by their places in the reading, in order; where each is in the
    original is beside them. A reading without any is turned or rewritten as a whole.
    """

    text: str
    how: str  # "plain", or what was undone
    start: int  # the part of the original text that it stands for
    end: int
    passages: tuple[Passage, ...] = ()  # start and end are places in the reading
    origins: tuple[tuple[int, int], ...] = ()  # of each passage: [start, end) in the original

    def touched(self, start: int, end: int) -> list[Passage]:
        """The passages that lie in [start, end) of the reading, if only with a part."""
        first = bisect_right(self.passages, start, key=lambda passage: passage.end)
        found = []
        for passage in self.passages[first:]:
            if passage.start >= end:
                break
            found.append(passage)
        return found

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Where [start, end) of the reading is in the original; the whole passage, if it is inside of one."""
        if not self.passages:
            return (start, end) if self.how == "plain" else (self.start, self.end)
        return self._original(start, last=False), self._original(max(start, end - 1), last=True)

    def _original(self, position: int, *, last: bool) -> int:
        i = bisect_right(self.passages, position, key=lambda passage: passage.start) - 1
        if i < 0:
            return position + last
        passage, (start, end) = self.passages[i], self.origins[i]
        if position < passage.end:
            return end if last else start
        return end + position - passage.end + last


def visible(text: str) -> str:
    """The text without invisible characters, in compatibility form, white space as it is."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKC", text) if not is_invisible(c))


def readings(text: str) -> list[View]:
    """The text itself, everything decoded from it, nearest first, and what the encoder should read of it.

    Raises:
        TooMuchToRead: more than `MAX_READINGS` passages decode to something.
    """
    plain = View(text, "plain", 0, len(text))
    found, source = [plain], plain
    count = 0
    for _ in range(DEPTH):
        decoded = _decoded(source)
        if decoded is None:
            break
        count += len(decoded.passages)
        if count > MAX_READINGS:
            raise TooMuchToRead(f"the text holds more than {MAX_READINGS:,} encoded passages; send fewer at once")
        found.append(decoded)
        source = decoded
    for view in list(found):
        found += _rewritten(view)
    return found


def open_from(text: str) -> int:
    """Where the last words of a text begin that may be a passage which is not over: codes, one after another, up to its end."""
    run = _CODES_AT_END.search(text, max(0, len(text) - _LONGEST_OPEN))
    return run.start() if run else len(text)


def _decoded(source: View) -> View | None:
    """The reading in which all passages of another are decoded; None if there are none."""
    chosen: list[Passage] = []
    taken: list[tuple[int, int]] = []
    for passage in (*passages(source.text), *signs(source.text)):
        i = bisect_right(taken, (passage.start, passage.end))
        if (i and taken[i - 1][1] > passage.start) or (i < len(taken) and taken[i][0] < passage.end):
            continue
        taken.insert(i, (passage.start, passage.end))
        chosen.append(passage)
    if not chosen:
        return None
    chosen.sort(key=lambda passage: passage.start)
    text: list[str] = []
    placed: list[Passage] = []
    origins: list[tuple[int, int]] = []
    length, place = 0, 0

    def keep(start: int, end: int) -> None:
        """Copy what was not decoded now; what was decoded before stays marked."""
        nonlocal length
        for earlier in source.touched(start, end):
            low, high = max(start, earlier.start), min(end, earlier.end)
            placed.append(Passage(length + low - start, length + high - start, "", earlier.how, earlier.least))
            origins.append(source.place(low, high))
        text.append(source.text[start:end])
        length += end - start

    for passage in chosen:
        keep(place, passage.start)
        how = " ".join(dict.fromkeys([*(each.how for each in source.touched(passage.start, passage.end)), passage.how]))
        placed.append(Passage(length, length + len(passage.text), passage.text, how, passage.least))
        origins.append(source.place(passage.start, passage.end))
        text.append(passage.text)
        length += len(passage.text)
        place = passage.end
    keep(place, len(source.text))
    hows = " ".join(dict.fromkeys(passage.how for passage in placed))
    return View("".join(text), hows, 0, source.end, tuple(placed), tuple(origins))


def reads_better(text: str, decoded: str) -> bool:
    """Whether ``decoded`` looks like words more than ``text`` does, by how common its letters are."""
    return _commonness(decoded) > _commonness(text) + 0.1


def _commonness(candidate: str) -> float:
    letters = [c for c in candidate.lower() if "a" <= c <= "z"]
    return sum(c in _COMMON for c in letters) / len(letters) if len(letters) >= 8 else 0.0


def _rewritten(view: View) -> Iterator[View]:
    """What the encoder should read as well: the whole in plain letters, and sentences that are words only in a cipher."""
    if (plain := _in_plain_letters(view.text)) != view.text:
        yield View(plain, f"{view.how} letters".removeprefix("plain "), view.start, view.end)
    for sentence in _SENTENCE.finditer(view.text):
        counts = Counter(letter for letter in sentence[0].lower() if letter in _ALPHABET)
        total = counts.total()
        if total < 12 or sum(counts[letter] for letter in _COMMON) >= 0.5 * total:
            continue

        def commonness(shift: int, counts: Counter[str] = counts) -> int:
            return sum(counts[_ALPHABET[(_ALPHABET.index(letter) + shift) % 26]] for letter in _COMMON)

        best = max(range(1, 26), key=commonness)
        shifted = sentence[0].translate(_shift(-best))
        if reads_better(sentence[0], shifted):
            yield View(shifted, f"shift {best}", *view.place(*sentence.span()))
        mirrored = sentence[0].translate(_ATBASH)
        if reads_better(sentence[0], mirrored):
            yield View(mirrored, "atbash", *view.place(*sentence.span()))
    if _is_backwards(view.text):
        yield View(view.text[::-1], "backwards", view.start, view.end)


def _shift(by: int) -> dict[int, int]:
    turned = "".join(_ALPHABET[(i + by) % 26] for i in range(26))
    return str.maketrans(_ALPHABET + _ALPHABET.upper(), turned + turned.upper())


_ATBASH = str.maketrans(_ALPHABET + _ALPHABET.upper(), _ALPHABET[::-1] + _ALPHABET[::-1].upper())
_ENDS = re.compile(r"\b(?:eht|dna|fo|si|saw|ohw|tahw|erehw|nehw|ot|rof|morf|htiw|taht|rohtua|nrob)\b", re.IGNORECASE)


def _is_backwards(text: str) -> bool:
    """Whether common English words stand in a text backwards."""
    return len(set(map(str.lower, _ENDS.findall(text)))) >= 2


def _in_plain_letters(text: str) -> str:
    """Look-alikes inside words of other letters, leet and spaced-out letters, as they are meant to be read."""
    text = _WORD.sub(lambda word: plain_letters(word[0]) if _mixed(word[0]) else word[0], visible(text))
    return _SPACED.sub(lambda run: " ".join(re.sub(r"\W|_", "", part) for part in re.split(r" {2,}", run[0])), text)


def _mixed(word: str) -> bool:
    if word.isalpha() and word.isascii():
        return False
    ascii_letters = sum(c.isascii() and c.isalpha() for c in word)
    others = sum(not c.isascii() or c.isdigit() for c in word)
    return bool(ascii_letters and others) and any(c.isalpha() for c in word)
