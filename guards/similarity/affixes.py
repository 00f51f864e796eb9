"""What may be written onto a name without a space, and leaves it the same name.

Covered: Korean particles, titles and copulas, stacked; Arabic and Hebrew proclitics; Russian case endings after a last word of
five letters or more that ends in a consonant ("Путина"). English, Turkish and Finnish endings after an apostrophe ("Ayşe'ye")
need nothing: a word ends there. Not covered: endings that change the name ("Анны", "Kowalskiego"), and endings of other
languages.
"""

# ruff: noqa: RUF001 - the letters of other scripts are meant.
from __future__ import annotations

import re
import unicodedata

_KOREAN_ENDINGS = (
    "는 은 이 가 을 를 의 에 에서 에게 에게서 께 께서 한테 한테서 와 과 랑 이랑 하고 로 으로 로서 으로서 "
    "로부터 으로부터 라고 이라고 라는 이라는 란 이란 도 만 부터 까지 조차 마저 처럼 같이 보다 마다 밖에 나 "
    "이나 든지 이든지 야 아 여 이여 씨 님 군 양 선생 선생님 작가 작가님 교수 교수님 박사 박사님 들 이다 다 "
    "입니다 입니까 이에요 예요 이었다 였다 인 인데 인가 인가요 일 임 이며 며 이고 고 이면 면 이지만 지만 이라 "
    "라 이라서 라서 뿐 대로 요 이요 인지 네 측 에는 에도 에만 께서는 "
)
"""Particles, titles after names, and forms of "to be"."""
_KOREAN = re.compile(f"(?:{'|'.join(_KOREAN_ENDINGS.split())})+")
_ARABIC_ARTICLE = "ال"
_RUSSIAN = re.compile("(?:а|у|е|ы|и|ом|ем|ов|ым|ых|ой|ого|ому|ами|ах|я|ю)")
_RUSSIAN_CONSONANT = re.compile("[бвгджзклмнпрстфхцчшщ]")


def follows_name(name: str, rest: str) -> bool:
    """Whether the rest of a word may follow a name that begins it.

    Args:
        name: as it is written in the text.
        rest: what follows up to the end of the word, not empty.
    """
    last = unicodedata.normalize("NFC", name)[-1:]
    rest = unicodedata.normalize("NFC", rest)
    if "가" <= last <= "힣":
        return len(rest) <= 12 and _KOREAN.fullmatch(rest) is not None
    if "\u0400" <= last <= "\u04ff":
        word = re.split(r"[\W_]+", name)[-1].lower()
        if len(word) < 5 or not _RUSSIAN_CONSONANT.fullmatch(last.lower()):
            return False
        return _RUSSIAN.fullmatch(rest.lower()) is not None
    return False


def may_go_on(name: str) -> bool:
    """Whether more may be written onto a name, so that a word that begins with it is not judged before it ends."""
    last = unicodedata.normalize("NFC", name)[-1:]
    return "가" <= last <= "힣" or "\u0400" <= last <= "\u04ff"


def proclitics(letters: str, start: int) -> list[int]:
    """Lengths of what may stand before a name at the start of an Arabic or Hebrew word, by its `shapes.letters_of`."""
    first = letters[start : start + 1]
    if not "\u0590" <= first <= "\u06ff":
        return []
    if first >= "\u0600":
        found: set[int] = set()
        for length in (0, 1, 2):
            head = letters[start : start + length]
            if any(letter not in "وفبكل" for letter in head) or (length == 2 and head[0] not in "وف"):
                break
            if length:
                found.add(length)
            if letters.startswith(_ARABIC_ARTICLE, start + length):
                found.add(length + 2)
            if length and letters.startswith("لل", start + length - 1):
                found.add(length + 1)
        return sorted(found)
    return [n for n in (1, 2) if len(letters) > start + n and all(letter in "והבלמשכ" for letter in letters[start : start + n])]


def proclitic_fits(clitic: str, units: int) -> bool:
    """Whether a name of so many letters may have this before it: short names only "and", since others make words of them."""
    return not clitic or units >= 4 or (units == 3 and clitic in ("و", "ו"))
