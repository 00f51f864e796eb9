"""What Unicode says of single characters, for every guard that reads text: invisible, white, of a script without spaces.

Taken from the Unicode data that Python ships (`unicodedata`), so that a new Python brings new letters. Script names are not in
there, but each character's name begins with its script's.
"""

from __future__ import annotations

import unicodedata
from functools import cache

_SHOWS_NOTHING = frozenset({0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0})
"""Of other categories than Cf, and default ignorable all the same: grapheme joiner, Hangul fillers, inherent Khmer vowels."""
_VISIBLE_FORMATS = frozenset({*range(0x0600, 0x0606), 0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x110BD, 0x110CD})
"""Of category Cf, but drawn: Arabic and Kaithi number signs."""
_BRAILLE_BLANK = "\u2800"
_UNSPACED = tuple(
    f"{script} "
    for script in (
        "CJK",
        "HIRAGANA",
        "KATAKANA",
        "HALFWIDTH KATAKANA",
        "KATAKANA-HIRAGANA",
        "HENTAIGANA",
        "BOPOMOFO",
        "IDEOGRAPHIC",
        "KANGXI",
        "THAI",
        "LAO",
        "KHMER",
        "MYANMAR",
        "TIBETAN",
        "TAI",
        "NEW TAI",
        "AHOM",
        "JAVANESE",
        "BALINESE",
        "YI",
        "NUSHU",
        "TANGUT",
        "KHITAN",
    )
)


@cache
def is_invisible(character: str) -> bool:
    """Whether a character shows nothing and takes no place: zero width, direction marks, tags, variation selectors, controls."""
    code, category = ord(character), unicodedata.category(character)
    if category == "Cf":
        return code not in _VISIBLE_FORMATS
    if category == "Cc":
        return not character.isspace()
    return code in _SHOWS_NOTHING or 0x180B <= code <= 0x180F or 0xFE00 <= code <= 0xFE0F or 0xE0000 <= code <= 0xE0FFF


def is_white(character: str) -> bool:
    """Whether a character is white space: any that `str.isspace` knows, and the blank braille pattern, which looks the same."""
    return character.isspace() or character == _BRAILLE_BLANK


@cache
def is_unspaced(character: str) -> bool:
    """Whether a letter or mark belongs to a script that puts no spaces between words, so that a word may start at any letter."""
    if character < "\u0e00" or unicodedata.category(character)[0] not in "LMN":
        return False
    return unicodedata.name(character, "").startswith(_UNSPACED)
