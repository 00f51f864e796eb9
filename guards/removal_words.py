"""What is said about a removal list, and how its texts are cleaned: words for `removal_list`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice

import ftfy
from ftfy.badness import is_bad

from guards.errors import InvalidForgetSet
from guards.letters import is_invisible, is_unspaced, is_white
from guards.ordinary import Occurrences
from guards.strict_json import shorten

MAX_PROBLEMS = 15
"""Lines of error in all. A file with more has a cause that the first ones show."""
_SHOWN_ALONE = 3
"""Up to so many breaches of one rule are reported one by one."""
_SHOWN_PHRASES = 5
_SHORT_LETTERS = 4
NEVER_MEANT = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]+")
"""Soft hyphens, zero-width spaces and joiners of words, direction marks, byte order marks. The joiners of letters (U+200C, U+200D)
belong to the spelling of Persian and of Indic languages, and stay."""


class Problems:
    """What is wrong, by rule, so that 10,000 lines that break one rule give one line of error."""

    def __init__(self) -> None:
        self._by_rule: dict[str, list[tuple[str, str]]] = {}

    def add(self, place: str, rule: str, message: str) -> None:
        self._by_rule.setdefault(rule, []).append((place, message))

    def sentences(self) -> list[str]:
        found: list[str] = []
        for rule, breaches in self._by_rule.items():
            if len(breaches) <= (1 if rule == "encoding" else _SHOWN_ALONE):
                found += [f"{place}: {message}" if place else message for place, message in breaches]
            else:
                places = [place for place, _ in breaches]
                found.append(f"{_name_places(places)}; {places[0]}: {breaches[0][1]}")
        return found

    def raise_if_any(self) -> None:
        if found := self.sentences():
            raise InvalidForgetSet(limit(found, MAX_PROBLEMS, "problems"))


def limit(sentences: list[str], most: int, what: str) -> list[str]:
    return sentences if len(sentences) <= most else [*sentences[:most], f"and {len(sentences) - most:,} more {what}"]


def _name_places(places: Sequence[str]) -> str:
    """``lines 3, 4, 5 and 9,996 more``."""
    shown = ", ".join(places[:_SHOWN_ALONE]) + (f" and {len(places) - _SHOWN_ALONE:,} more" if len(places) > _SHOWN_ALONE else "")
    for word in ("line", "item"):
        if all(place.startswith(f"{word} ") for place in places):
            return f"{word}s {shown.replace(f'{word} ', '')}"
    return shown


def counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def some_reasons(reasons: dict[str, str]) -> str:
    """``"n/a" (reason), "e" (reason) and 3 more``."""
    shown = ", ".join(f"{shorten(phrase)} ({reason})" for phrase, reason in islice(reasons.items(), _SHOWN_PHRASES))
    return shown + (f" and {len(reasons) - _SHOWN_PHRASES:,} more" if len(reasons) > _SHOWN_PHRASES else "")


def times(count: Occurrences) -> str:
    return counted(count.total, "time")


def short_words(values: Iterable[str]) -> list[str]:
    """Those of four letters or fewer, of scripts in which such words are short."""
    found = []
    for value in dict.fromkeys(values):
        letters = [character for character in value if character.isalnum()]
        if 0 < len(letters) <= _SHORT_LETTERS and len(value.split()) == 1 and not any(map(is_unspaced, letters)):
            found.append(value)
    return found


def short_names(values: Sequence[str], noun: str) -> str:
    """``2 phrases ("Ana", "Rio") have four letters or fewer``."""
    shown = ", ".join(shorten(value) for value in values[:_SHOWN_PHRASES]) + (", ..." if len(values) > _SHOWN_PHRASES else "")
    return f"{counted(len(values), noun)} ({shown}) {'has' if len(values) == 1 else 'have'} four letters or fewer"


_SURNAME_FIRST = re.compile(r"([^\W\d_][\w'’.-]*(?: [\w'’.-]+){0,3}), ?([^\W\d_][\w'’.-]*(?: [\w'’.-]+){0,2})")  # noqa: RUF001


def surname_first(phrases: Sequence[str]) -> list[str]:
    """A note on names such as "Kowalczyk, Maria", unless the set has the other order too."""
    present, found = set(phrases), []
    for phrase in phrases:
        match = _SURNAME_FIRST.fullmatch(phrase)
        if match and match[1].split()[-1][0].isupper() and match[2][0].isupper() and f"{match[2]} {match[1]}" not in present:
            found.append((phrase, f"{match[2]} {match[1]}"))
    if not found:
        return []
    number = f"{len(found):,} phrases look" if len(found) > 1 else "1 phrase looks"
    first, other = found[0]
    return [f"{number} like a name with the surname first, such as {shorten(first)}; add {shorten(other)} too, if that is a name"]


def clean_ends(text: str) -> str:
    """Without white space, byte order marks and other never meant characters at the ends; empty if nothing in it shows."""
    start, end = 0, len(text)
    while start < end and _drops_out(text[start]):
        start += 1
    while end > start and _drops_out(text[end - 1]):
        end -= 1
    text = text[start:end]
    return "" if all(is_invisible(character) or is_white(character) for character in text) else text


def _drops_out(character: str) -> bool:
    return is_white(character) or NEVER_MEANT.match(character) is not None


def undamaged(text: str) -> str | None:
    """What ``text`` was before it was read in the wrong encoding, or None if it seems sound."""
    if not is_bad(text):
        return None
    fixed = ftfy.fix_encoding(text)
    return fixed if len(fixed) < len(text) and not is_bad(fixed) and "\ufffd" not in fixed else None
