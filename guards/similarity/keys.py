"""What is kept of a name: one short string for each way in which it is written.

A key is a mark for its kind, then the letters of its words (`skeleton`), joined by what stands between them: a space, ``-`` for
anything without one, ``'`` for an apostrophe. A capital stands for a letter that must have an accent in the text. So artifacts
hold no names as they were written, and need no more than their keys.

Of a *name* (two to five capitalised words, particles in between) there are also keys with the surname first, with initials, and
with transcribed umlauts ("Mueller" for "Müller", and the other way round); titles at its start are left out. Of a telephone
number with a country code also those without. Not covered: names with a middle name left out, nicknames, transliteration,
translation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

from guards.letters import is_unspaced
from guards.similarity.shapes import LEET, is_spoken_mark
from guards.similarity.skeleton import skeleton
from guards.telephone import telephone_of

NAME, TEXT, SURNAME_FIRST, INITIALS, NUMBER = "~", "=", "<", ".", "#"
MOST_KEYS = 16
"""Of one name."""
NUMBER_DIGITS = 6
"""From so many digits on, if they are half of all, a phrase is a number, in which separators do not count."""
SHORTEST_TURNED = 6
"""Letters of a name that is looked for with the surname first: "Ro Al" would be found in too much."""
SHORTEST_SURNAME = 4
"""Letters of a surname that is looked for with initials."""
MOST_WORDS = 5
"""Of a name: what has more words is a phrase."""
_TITLES = """
    " dr prof professor doctor mr mrs ms miss mx sir dame lord lady frau herr fräulein dipl ing mme mlle
    madame mademoiselle monsieur m maître me don doña dona dom señor señora sr sra srta sig signor signora
    dott dottssa ir drs mag hon rev fr st saint capt captain gen general col maj lt sgt president king queen
    prince princess sheikh shaykh imam rabbi pan pani
"""
_SUFFIXES = "jr sr phd md esq"
_PARTICLES = """
    van der den de von zu vom zum zur am la le du des del della di da dos das do e y i bin ibn ben al el abu bint ter ten te het 't
    af av of the und
"""
TITLES, SUFFIXES, PARTICLES = (frozenset(words.split()) for words in (_TITLES, _SUFFIXES, _PARTICLES))
_TRANSCRIBED = {"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "Å": "Aa", "Ø": "Oe"}
_APOSTROPHES = ("'", "’", "ʼ", "`")  # noqa: RUF001
_BETWEEN = re.compile("[^a-z0-9]+")
_JOINTS = re.compile("([ '-])")
_WITHOUT_JOINTS = {**{ord(joint): None for joint in " '-"}, **{ord(c): c.lower() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}}
_CAPITAL = re.compile("[A-Z]")
_NO_ALPHABET = re.compile("[\\d\u1100-\u11ff]")
_NONE: frozenset[int] = frozenset()
_MOST_CHOICES = 3
"""Letters of a name that are transcribed or not independently of one another."""


@dataclass(frozen=True)
class Key:
    """A key, read."""

    kind: str
    parts: tuple[str, ...]  # in lower case
    joints: dict[int, str]  # index into letters at which a part begins -> what joins it to the one before
    accented: frozenset[int]  # indexes into letters that must have an accent in the text

    @staticmethod
    @lru_cache(maxsize=65_536)
    def of(key: str) -> Key:
        """Read a key."""
        kind, written = key[:1], key[1:]
        pieces = _JOINTS.split(written)
        parts, joints, length = pieces[::2], {}, 0
        for part, joint in zip(parts, pieces[1::2], strict=False):
            length += len(part)
            joints[length] = joint
        accented = frozenset(i for i, c in enumerate("".join(parts)) if "A" <= c <= "Z") if _CAPITAL.search(written) else _NONE
        return Key(kind, tuple(part.lower() for part in parts), joints, accented)

    @cached_property
    def letters(self) -> str:
        return "".join(self.parts)

    @cached_property
    def folded(self) -> str:
        return self.letters.translate(LEET)

    @cached_property
    def units(self) -> Sequence[int]:
        """Where what is read as one letter begins: vowel signs and the parts of a Hangul syllable belong to what they follow."""
        if self.letters.isascii():
            return range(len(self.letters))
        return tuple(i for i, letter in enumerate(self.letters) if not i or not _goes_on(letter))

    @cached_property
    def unspaced(self) -> bool:
        """Whether it is in a script without spaces, in which joints mean little."""
        return not self.letters.isascii() and any(map(is_unspaced, self.letters))

    @cached_property
    def alphabetic(self) -> bool:
        """Whether one letter more or less leaves it much the same: not so for Chinese, Korean, and numbers."""
        return not self.unspaced and _NO_ALPHABET.search(self.letters) is None


def letters_in(key: str) -> str:
    """The letters of a key, without reading the rest of it."""
    return key[1:].translate(_WITHOUT_JOINTS)


def _goes_on(letter: str) -> bool:
    return is_spoken_mark(letter) or "\u1160" <= letter <= "\u11ff"


def keys_of(name: str) -> tuple[str, ...]:
    """Every key of a name or phrase, the plainest first, at most `MOST_KEYS`; none if it has no letters and digits."""
    words = _without_titles(name.split())
    is_name = _is_name(words)
    if not is_name:
        words = name.split()
    plain = _written(" ".join(words))
    if not plain:
        return ()
    digits = sum(character.isdigit() for character in plain)
    if digits >= NUMBER_DIGITS and 2 * digits >= len(re.sub("[ '-]", "", plain)):
        return tuple(dict.fromkeys(NUMBER + number for number in (plain, *_numbers(name))))
    kind = NAME if is_name else TEXT
    found = [kind + plain]
    if len(words) <= MOST_WORDS:
        others = [other for other in _transcriptions(" ".join(words)) if other != plain]
        found += [kind + other for other in (*others, *_korean(plain))]
        if is_name and len(words) > 1:
            found += [f"{SURNAME_FIRST}{turned}" for turned in _surname_first(words)]
            found += [f"{INITIALS}{short}" for short in _with_initials(words)]
            found += [f"{SURNAME_FIRST}{turned}" for other in others for turned in _surname_first(other.split())]
    return tuple(dict.fromkeys(found))[:MOST_KEYS]


def _written(name: str) -> str:
    """The letters of a name, with its joints."""
    return " ".join(filter(None, map(_written_word, name.split())))


@lru_cache(maxsize=65_536)
def _written_word(word: str) -> str:
    if word.isascii():
        return _BETWEEN.sub(_joint, word.lower()).strip("-'")
    shape = skeleton(word)
    breaks = sorted(shape.breaks)
    found: list[str] = []
    for start, end in zip(breaks, [*breaks[1:], len(shape.letters)], strict=True):
        found += ["'" if shape.before(start) in _APOSTROPHES else "-"] if start else []
        found.append(shape.letters[start:end])
    return "".join(found)


def _joint(between: re.Match[str]) -> str:
    return "'" if between[0] in _APOSTROPHES else "-"


def _without_titles(words: Sequence[str]) -> list[str]:
    """A name without titles before and suffixes after it, if at least two words are left."""
    kept = list(words)
    while len(kept) > 2 and _bare(kept[0]) in TITLES:
        del kept[0]
    while len(kept) > 2 and _bare(kept[-1]) in SUFFIXES:
        del kept[-1]
    return kept


def _bare(word: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFC", word)).lower()


def _is_name(words: Sequence[str]) -> bool:
    """Whether this looks like a name: at most five words, capitalised but for particles, without digits."""
    if not 1 <= len(words) <= MOST_WORDS or any(any(map(str.isdigit, word)) for word in words):
        return False
    first = [next((c for c in word if c.isalpha()), "") for word in words]
    return all(letter.isupper() or _bare(word) in PARTICLES for letter, word in zip(first, words, strict=True)) and (
        first[0].isupper() or first[-1].isupper()
    )


def _surname_first(words: Sequence[str]) -> Iterator[str]:
    if sum(len(_written(word)) for word in words) >= SHORTEST_TURNED:
        for split in range(1, len(words)):
            if _bare(words[split - 1]) not in PARTICLES:
                yield _written(" ".join((*words[split:], *words[:split])))


def _with_initials(words: Sequence[str]) -> Iterator[str]:
    """ "J. v. d. Berg", "J. van der Berg", and with more than one given name "Jan A. Kowalski"."""
    first = len(words) - 1
    while first > 1 and _bare(words[first - 1]) in PARTICLES:
        first -= 1
    given, particles, surname = words[:first], words[first:-1], words[-1]
    if len(_written(surname)) < SHORTEST_SURNAME:
        return

    def initials(each: Sequence[str]) -> list[str]:
        return [re.sub(r"(\w)\w*", r"\1", _written(word)) for word in each]

    for head in dict.fromkeys((tuple(initials(given)), (_written(given[0]), *initials(given[1:])))):
        for middle in dict.fromkeys((tuple(map(_written, particles)), tuple(initials(particles)))):
            if any(len(part) == 1 for part in (*head, *middle)):
                yield " ".join((*head, *middle, _written(surname)))


def _transcriptions(name: str) -> Iterator[str]:
    """The name with its umlauts as two letters, and with two letters as the umlaut that they may stand for."""
    name = unicodedata.normalize("NFC", name)
    places = [i for i, character in enumerate(name) if character in _TRANSCRIBED]
    if places:
        yield _written("".join(_TRANSCRIBED.get(character, character) for character in name))
    if 1 < len(places) <= _MOST_CHOICES:
        for chosen in places:
            yield _written("".join(_TRANSCRIBED[c] if i == chosen else c for i, c in enumerate(name)))
    written = _written(name)
    pairs = [match.start() for match in re.finditer("ae|oe|ue|aa", written)]
    for choice in product((True, False), repeat=len(pairs)) if len(pairs) <= _MOST_CHOICES else ():
        other, dropped = list(written), 0
        for place, taken in zip(pairs, choice, strict=True):
            if taken:
                other[place - dropped : place - dropped + 2] = [written[place].upper()]
                dropped += 1
        yield "".join(other)


def _korean(written: str) -> Iterator[str]:
    """A Korean name may have a space after the surname, or none."""
    if all("\u1100" <= letter <= "\u11ff" for letter in written.replace(" ", "")):
        syllables = Key.of(NAME + written).units
        if 3 <= len(syllables) <= 4:
            glued = written.replace(" ", "")
            yield glued
            yield f"{glued[: syllables[1]]} {glued[syllables[1] :]}"


def _numbers(name: str) -> Iterator[str]:
    """A telephone number with its country as it is dialled there, from outside, and with both prefixes."""
    if (found := telephone_of(name)) is not None:
        abroad = f"{found.country}{found.number}"
        yield from (found.dialled, f"00{abroad}", f"{found.country}{found.dialled}", abroad)
