"""Whether a name stands at a place of a text, and how it is written there.

The letters are the same there but for digits and ``l`` and ``I`` (`Skeleton.folded`); here it is decided what counts.

- *Plainly*, letters agree after case, accents and look-alikes. Digits are no letters, and ``l`` is no ``i``.
- *Leet* counts where the place itself shows it: a digit or symbol between letters, a capital I or a small l where the rest of the
  word is in the other case. Never for names of two letters or for digits alone; names of up to four begin with a letter and have
  no more digits than letters ("5am" is not Sam).
- *Joints*: two words may be written as one if they have `GLUED` letters together, or capitals show the joint ("AlRo").
- *Breaks* inside a word: letters set apart one by one, in names of up to four letters all of them alike and without anything more
  than one character between them; names of two letters not at all. A word in pieces ("Pot-ter") from `BROKEN` letters, by hyphens
  and the like but not by slashes or apostrophes; by spaces from `GLUED` letters where capitals show the words ("Har ry Pot ter").
- *Surname first* counts where every word has a capital, or what stands between them is no space, or a comma and long words.
- *Initials* are capitals with a full stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from guards.letters import is_invisible
from guards.similarity.affixes import follows_name
from guards.similarity.keys import INITIALS, NUMBER, PARTICLES, SURNAME_FIRST, Key
from guards.similarity.shapes import CAPITAL_I, SYMBOLS, is_accented
from guards.similarity.skeleton import Skeleton

GLUED = 8
"""Letters from which on a name of several words is also looked for as one word."""
BROKEN = 6
"""Letters from which on a name is also looked for in pieces."""
SPACED = 5
"""Letters from which on some words of a name may be spaced out and others not, whatever stands between the letters."""
FARTHEST = 64
"""Most characters between two letters of a name."""
_COMMON_BREAKS = frozenset("-.·_*~+=‐‑‧•|")  # noqa: RUF001
_SENTENCE_ENDS = frozenset("。！？；，、：.!?;,:")  # noqa: RUF001
_OTHER_GIVEN = re.compile(r"(?<!\w)[^\W\d_]\.[ \xa0]?\Z|[^\s.!?:;\"“(] [^\W\d_a-z][^\W\d_]+ \Z")
_GIVEN = 5
"""Letters of a given name that is found after "surname," in small letters."""


def fit(key: Key, shape: Skeleton, start: int) -> tuple[int, str] | None:
    """Where a name ends that begins at ``start``, in letters, and how it is written; None if it is not there.

    ``shape.folded`` has ``key.folded`` at ``start``.
    """
    end = start + len(key.letters)
    tail = shape.end_of_word(end)
    # A particle or ending written onto the name is part of the hit: taking out the name alone would leave half of a word.
    if tail > end and not follows_name(_slice(shape, start, end), _slice(shape, end, tail)):
        return None
    leet = shape.letters[start:end] != key.letters or (shape.symbols and not SYMBOLS.keys().isdisjoint(_slice(shape, start, end)))
    if leet and not _is_leet(key, shape, start):
        return None
    if any(not is_accented(shape.written(start + i)) for i in key.accented):
        return None
    joined = _joined(key, shape, start)
    if joined is None:
        return None
    if key.kind == SURNAME_FIRST and not _is_turned(key, shape, start):
        return None
    if key.kind == INITIALS and not _has_initials(key, shape, start):
        return None
    order = {SURNAME_FIRST: "surname first", INITIALS: "initials"}.get(key.kind, "")
    hows = [order, "leet" if leet else "", joined, "particle" if tail > end else ""]
    if not leet and not order and not joined and _is_disguised(shape, start, end):
        hows.append("look-alikes")
    return tail, ", ".join(filter(None, hows)) or "plain"


def _slice(shape: Skeleton, start: int, end: int) -> str:
    """What a part of a word is written as. Two letters may come of one character: it counts where it begins."""
    first, last = shape.span(start, end)
    return shape.text[first:last]


def _is_disguised(shape: Skeleton, start: int, end: int) -> bool:
    """Whether a letter stands there that is a look-alike, or one that shows nothing between them."""
    first, last = shape.span(start, end)
    text = shape.text[first:last]
    if text.isascii():
        return False
    latin = all(letter.isascii() for letter in shape.letters[start:end])
    return latin and any(
        is_invisible(c) or (not c.isascii() and not is_accented(c) and (c.isalpha() or unicodedata.category(c)[0] in "MS"))
        for c in text
    )


def _is_leet(key: Key, shape: Skeleton, start: int) -> bool:
    if key.kind in (NUMBER, INITIALS) or len(key.units) <= 2:
        return False
    digits = letters = odd = 0
    for i, wanted in enumerate(key.letters):
        character, seen = shape.written(start + i), shape.letters[start + i]
        symbol = character in SYMBOLS
        digits += seen.isdigit() or symbol
        letters += not (seen.isdigit() or symbol)
        if seen == wanted or seen.isdigit() or symbol:
            continue
        if wanted.isdigit() and seen in "ilo" and any(map(str.isdigit, shape.letters[start : start + len(key.letters)])):
            continue  # "Agent OO7"
        if _is_odd(shape, start + i):
            odd += 1
        elif len(key.letters) < SPACED:
            return False
    if not letters or not (digits or odd):
        return False
    if len(key.letters) <= 4:
        first = shape.written(start)
        return digits <= letters and (first.isalpha() or (first == "@" and len(key.letters) == 4))
    return letters >= 2


def _is_odd(shape: Skeleton, i: int) -> bool:
    """Whether a letter is a capital I in a word of small letters, or a small l in one of capitals."""
    written = shape.written(i)
    first = last = i
    while first not in shape.breaks:
        first -= 1
    while last + 1 not in shape.ends:
        last += 1
    others = [shape.written(j) for j in range(first, last + 1) if j != i]
    if written in CAPITAL_I:
        beside = [shape.written(j) for j in (i - 1, i + 1) if first <= j <= last]
        return i > first and any(map(str.islower, beside))
    if written == "l":
        return sum(map(str.isupper, others)) >= 2 and not any(map(str.islower, others))
    return False


def _joined(key: Key, shape: Skeleton, start: int) -> str | None:
    """Whether the words of the text are those of the name: "" if they are, how they are if others, None if not."""
    length = len(key.letters)
    breaks = [i - start for i in range(start + 1, start + length) if i in shape.breaks]
    if any(len(shape.before(start + i)) > FARTHEST for i in breaks):
        return None
    if key.kind == NUMBER:
        return ""
    wrong = [i for i in breaks if i not in key.joints]
    missing = [i for i in key.joints if i not in set(breaks) and key.joints[i] != "'"]
    between = {i: shape.before(start + i) for i in breaks}
    if not wrong and not missing:
        return "" if _is_tight(key, shape, start, between) else None
    if key.unspaced:
        return _unspaced(key, wrong, between)
    if missing and not all(_may_glue(key, shape, start, i) for i in missing):
        return None
    if not wrong:
        return "glued"
    return _broken(key, shape, start, wrong, between)


def _is_tight(key: Key, shape: Skeleton, start: int, between: dict[int, str]) -> bool:
    """A short name without spaces ("will.i.am") is in three words only where they have capitals: "a will. I am"."""
    if len(key.units) >= GLUED:
        return True
    loose = [i for i, joint in key.joints.items() if joint == "-" and any(map(str.isspace, between.get(i, "")))]
    return all(shape.written(start + i).isupper() for i in ((0, *key.joints) if loose else ()))


def _may_glue(key: Key, shape: Skeleton, start: int, joint: int) -> bool:
    before, after = shape.written(start + joint - 1), shape.written(start + joint)
    word_of_one = joint - 1 in (0, *key.joints)  # "WillIAm"
    return len(key.units) >= GLUED or not key.alphabetic or (after.isupper() and (before.islower() or word_of_one))


def _unspaced(key: Key, wrong: Sequence[int], between: dict[int, str]) -> str | None:
    """Chinese and the like: one line break, middle dots and spaces in long names, or every character set apart."""
    separators = {between[i] for i in wrong}
    if len(key.units) >= 4 and all(not set(each) & _SENTENCE_ENDS for each in separators):
        return "set apart"
    if separators <= {"\n", "\r\n"}:
        return "" if len(wrong) <= 1 else "set apart"
    every = set(wrong) >= set(key.units[1:]) - set(key.joints)
    return "set apart" if every and len(separators) == 1 and not set(min(separators)) & (_SENTENCE_ENDS - {"."}) else None


def _broken(key: Key, shape: Skeleton, start: int, wrong: Sequence[int], between: dict[int, str]) -> str | None:
    """Breaks inside of words: letters set apart, or words in pieces."""
    bounds = [0, *key.joints, len(key.letters)]
    spaced: set[int] = set()
    for low, high in pairwise(bounds):
        inner = {i for i in key.units if low < i < high}
        here = {i for i in wrong if low < i < high}
        if here and here == inner:
            spaced |= here
    pieces = [i for i in wrong if i not in spaced]
    size = len(key.units)
    every = set(wrong) == spaced == {i for i in key.units if i and i not in key.joints}
    if not pieces:
        if size >= SPACED:
            # Of a single word with one break ("A l Roberts") nobody would say that it is spaced out.
            return "spaced out" if every or len(spaced) > 1 else None
        alike = {between[i] for i in wrong}
        return "spaced out" if size > 2 and every and len(alike) == 1 and len(min(alike)) == 1 else None
    if size >= BROKEN and all(_is_common_break(between[i]) for i in pieces):
        return "in pieces"
    capitals = all(shape.written(start + i).isupper() for i in (0, *key.joints))
    small = all(shape.written(start + i).islower() and (between[i].isspace() or _is_common_break(between[i])) for i in pieces)
    return "in pieces" if size >= GLUED and key.joints and capitals and small else None


def _is_common_break(between: str) -> bool:
    """Whether this is what words are cut into pieces with; a hyphen also at the end of a line."""
    bare = between.replace("\r\n", "\n").removesuffix("\n")
    return bool(bare) and len(bare) <= 3 and all(c in _COMMON_BREAKS or ord(c) > 0x2600 for c in bare)


def _is_turned(key: Key, shape: Skeleton, start: int) -> bool:
    """Whether the surname is meant to stand first: "Smith will" is no Will Smith."""
    between = [shape.before(start + i) for i, joint in key.joints.items() if joint == " " and start + i in shape.breaks]
    if any(set(each) & set(".!?") and any(map(str.isspace, each)) for each in between):
        return False
    firsts = [shape.written(start + i) for i in (0, *key.joints)]
    if any(map(str.isupper, firsts)):
        return all(first.isupper() or part in PARTICLES for first, part in zip(firsts, key.parts, strict=True))
    if between and not any(any(map(str.isspace, each)) for each in between):
        return True
    return any("," in each for each in between) and len(key.parts[-1]) >= _GIVEN


def _has_initials(key: Key, shape: Skeleton, start: int) -> bool:
    """Whether its initials have full stops and capitals, and no other name or initial stands before them ("George R.R. Martin")."""
    first = shape.origin[start]
    if _OTHER_GIVEN.search(shape.text, max(0, first - 40), first):
        return False
    place, given = 0, True
    for number, part in enumerate(key.parts):
        if len(part) == 1:
            after = shape.origin[start + place] + 1
            if shape.text[after : after + 1] != "." or (given and number == 0 and not shape.written(start).isupper()):
                return False
        place += len(part)
    return shape.written(start + place - len(key.parts[-1])).isupper()
