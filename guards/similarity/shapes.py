"""What a character may be read as: the plain letters that are left when case, accents, styles and look-alikes are undone.

Covered: letter case, accents and other marks, compatibility forms (full width, mathematical, circled, superscript), letters of
Greek, Cyrillic and other scripts that look like Latin ones (Unicode UTS #39), Latin letters that do not decompose ("ł", "ø", "ß",
small capitals), squared and circled letters, braille, digits of any script; Arabic hamza seats, alef maqsura, teh marbuta and
tatweel. Marks of Indic and South-East Asian scripts are vowels and stay. Not covered: pictures of letters made of several
characters ("|-|" for H), transliteration between scripts.
"""

# ruff: noqa: RUF001 - the letters of other scripts are meant.
from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from importlib.resources import files

DIGITS = str.maketrans("013456789", "oieasgtbg")
"""Digits that are used for letters."""
LEET = DIGITS | {ord("l"): "i"}
"""The same with ``l`` and ``i`` as one letter, since ``1`` and ``I`` may mean either. One character each, so that places stay."""
SYMBOLS = {"@": "a", "$": "s", "!": "i", "|": "i", "€": "e", "£": "l", "¡": "i", "+": "t"}
"""Symbols that are used for letters inside words."""
CAPITAL_I = frozenset("I\u0399\u0406\u04c0\u2c92\u0196")
"""Capital letters that look like a small l: Latin, Greek, Cyrillic, Coptic."""
_IRREGULAR = {"ð": "d", "þ": "th", "ŋ": "n", "ĸ": "k", "ə": "e", "ǝ": "e", "æ": "ae", "œ": "oe", "ı": "i", "ȝ": "y", "ƿ": "w"}
_ARABIC = {"ى": "ي", "ی": "ي", "ے": "ي", "ة": "ه", "ہ": "ه", "ھ": "ه", "ک": "ك", "ٱ": "ا", "ـ": ""}
_LATIN = re.compile(
    r"LATIN (?:SMALL |SMALL CAPITAL )?LETTER (?:SMALL CAPITAL )?(?:DOTLESS )?(A[EOUVY]|O[EOU]|T[HZ]|[A-Z])(?: WITH .+)?"
)
_BOXED = re.compile(r"(?:NEGATIVE )?(?:CIRCLED|SQUARED|CROSSED NEGATIVE SQUARED) LATIN CAPITAL LETTER ([A-Z])")
_BRAILLE = dict(zip("⠁⠃⠉⠙⠑⠋⠛⠓⠊⠚⠅⠇⠍⠝⠕⠏⠟⠗⠎⠞⠥⠧⠺⠭⠽⠵", "abcdefghijklmnopqrstuvwxyz", strict=True))
_SPOKEN_MARKS = ((0x0900, 0x0DFF), (0x0E00, 0x109F), (0x1780, 0x17FF), (0x1A00, 0x1AFF), (0xA980, 0xA9DF))
"""Blocks in which marks are vowels and the like, so that dropping them would make other words."""
_NUKTAS = frozenset("\u093c\u09bc\u0a3c\u0abc\u0b3c")


@cache
def _look_alikes() -> dict[str, str]:
    """Character -> the ASCII letter or digit that it may be taken for."""
    known = json.loads((files("confusable_homoglyphs") / "confusables.json").read_text("utf-8"))
    table: dict[str, str] = {}
    for character, others in known.items():
        plain = [other["c"] for other in others if other["c"].isascii() and other["c"].isalnum()]
        if plain and not character.isascii():
            table[character] = plain[0]
    return table | dict.fromkeys(CAPITAL_I - {"I"}, "i")


@cache
def letters_of(character: str, as_seen: bool = False) -> str:
    """What a character may be read as, in lower case: nothing, or one or more of a-z, 0-9 and letters of other scripts.

    A capital may look like another letter than its small form does (a Greek capital nu is an N, a small one a v). ``as_seen`` goes
    by the form that stands there; otherwise both forms count as what the small one looks like, so that letter case makes no
    difference.
    """
    if character in _BRAILLE:
        return _BRAILLE[character]
    if boxed := _BOXED.fullmatch(unicodedata.name(character, "")):
        return boxed[1].lower()
    shape: list[str] = []
    for part in unicodedata.normalize("NFKC", character):
        if as_seen:
            part = _look_alikes().get(part, part)
        shape += map(_plain, unicodedata.normalize("NFKD", part.casefold()))
    return "".join(shape)


def _plain(letter: str) -> str:
    """One decomposed letter in lower case."""
    if letter.isascii():
        return letter if letter.isalnum() else ""
    if letter in _ARABIC:
        return _ARABIC[letter]
    if letter in _IRREGULAR:
        return _IRREGULAR[letter]
    if unicodedata.category(letter)[0] == "M":
        return letter if is_spoken_mark(letter) else ""
    if letter.isdecimal():
        return str(unicodedata.decimal(letter))
    like = _look_alikes().get(letter) or _look_alikes().get(letter.upper())
    if like is None and (latin := _LATIN.fullmatch(unicodedata.name(letter, ""))):
        like = latin[1]
    like = (like or letter).casefold()
    return like if like.isalnum() else ""


@cache
def is_spoken_mark(character: str) -> bool:
    """Whether a mark is part of how a word is spelled, as vowel signs of Hindi and Thai are."""
    code = ord(character)
    return (
        unicodedata.category(character)[0] == "M"
        and character not in _NUKTAS
        and any(low <= code <= high for low, high in _SPOKEN_MARKS)
    )


@cache
def is_accented(character: str) -> bool:
    """Whether a letter is a Latin one with something on it, or two written as one: "ü", "ø", "å", "æ"."""
    return not character.isascii() and letters_of(character).isascii() and unicodedata.name(character, "").startswith("LATIN")


def plain_letters(word: str) -> str:
    """A word in the ASCII letters that it may be read as: look-alikes and leet undone, letter case lost."""
    return "".join(letters_of(character, True).translate(DIGITS) or character for character in word)
