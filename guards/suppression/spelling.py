"""How a phrase is compared: which folding it takes, and every sequence of symbols that counts as the phrase.

Most phrases have one. A phrase has more where folding alone cannot unite two ways to write it: accents of one letter in another
order, a slash at its beginning (which drops out after white space), and the national form of a telephone number.

Not covered: other spellings (transliterations, initials, "surname, given name"), dates in another order, "[at]" for "@".
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from guards.errors import InvalidForgetSet
from guards.suppression.folding import MARK, Folding, Match, folding
from guards.telephone import telephone_of

FEWEST_DIGITS = 6
"""A phrase with as many, and not more letters than digits, is a number: shorter ones would be found in any list or table."""
MOST_ORDERS = 64
"""Of the accents of one phrase. Beyond, there are two: Unicode's, and the accents of a vowel before those of a tone."""
_TONES_LAST = {220: 231}
"""Combining class -> its place: a dot below comes after what makes another vowel, as Vietnamese is typed."""
_SPACE, _SLASH = ord(" "), ord("/")
_ECH_YIWN = ((0x565, 0x582), (0x565, 0x57E))
_ECH_VEW = ((0x565, 0x57E), (0x565, 0x582))
"""The Armenian ligature (and): its letters as Unicode folds it, and as Eastern Armenian writes it in capitals."""
_ALPHANUMERIC = frozenset("0123456789abcdefghijklmnopqrstuvwxyz")


def spell(phrases: Sequence[str], match: Match, fold_case: bool) -> dict[Folding, list[list[np.ndarray]]]:
    """Every sequence of symbols, [S] int32 each, that counts as one of the phrases, by the folding that compares it.

    Raises:
        InvalidForgetSet: nothing of a phrase counts, so that it could match nothing.
    """
    numbers = set(filter(is_number, phrases)) if match == "folded" else set()
    groups: dict[Match, list[str]] = {match: [phrase for phrase in phrases if phrase not in numbers], "number": sorted(numbers)}
    found: dict[Folding, list[list[np.ndarray]]] = {}
    problems = []
    for kind, each in groups.items():
        if each:
            by = folding(kind, fold_case)
            found[by] = [_spellings(*pair, by) for pair in zip(each, by.fold(each), strict=True)]
            problems += [
                f"phrase {phrase[:60]!r} has no character that counts, so it could match nothing; remove it"
                for phrase, spellings in zip(each, found[by], strict=True)
                if not spellings
            ]
    if problems:
        raise InvalidForgetSet(problems)
    return found


def is_number(phrase: str) -> bool:
    """Whether a phrase is a number (telephone, account, date), whose grouping does not matter."""
    if sum(map(str.isdigit, phrase)) < FEWEST_DIGITS:
        return False
    symbols = [chr(symbol) for symbol in folding("number", True).fold([phrase])[0]]
    digits = sum(symbol in "0123456789" for symbol in symbols)
    return digits >= FEWEST_DIGITS and _ALPHANUMERIC.issuperset(symbols) and len(symbols) - digits <= digits


def _spellings(phrase: str, symbols: np.ndarray, by: Folding) -> list[np.ndarray]:
    # Neither white space at the ends counts nor an accent at the beginning, which has no letter.
    first, last = _ends(symbols != _SPACE)
    symbols = symbols[first:last]
    while len(symbols) and (symbols[0] == _SPACE or by.bits[symbols[0]] & MARK):
        symbols = symbols[1:]
    if phrase.isascii() and phrase[:1] not in "/+0":
        return [symbols] if len(symbols) else []
    found = list(_orders(symbols)) if len(symbols) else []
    if found and by.match == "folded" and symbols[0] == _SLASH:
        # After white space the slash drops out of the text.
        first, last = _ends((symbols != _SPACE) & (symbols != _SLASH))
        if not last:
            return []
        found += [np.concatenate([[_SPACE], each]).astype(np.int32) for each in _orders(symbols[first:])]
    if by.match == "number":
        found += by.fold(_national_forms(phrase))
    if by.fold_case:
        found += [_with(each, *pair) for each in found for pair in (_ECH_YIWN, _ECH_VEW) if _has(each, pair[0])]
    return found


def _has(symbols: np.ndarray, part: tuple[int, int]) -> bool:
    return bool(((symbols[:-1] == part[0]) & (symbols[1:] == part[1])).any())


def _with(symbols: np.ndarray, part: tuple[int, int], other: tuple[int, int]) -> np.ndarray:
    """The symbols with every ``part`` replaced by ``other``."""
    changed, places = symbols.copy(), np.flatnonzero((symbols[:-1] == part[0]) & (symbols[1:] == part[1]))
    changed[places], changed[places + 1] = other
    return changed


def _ends(wanted: np.ndarray) -> tuple[int, int]:
    """From the first to the last place that is wanted; nothing if none is."""
    places = np.flatnonzero(wanted)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _orders(symbols: np.ndarray) -> Iterator[np.ndarray]:
    """All orders of accents that are canonically the same (accents of one combining class keep theirs)."""
    text = [chr(symbol) for symbol in symbols]
    if not any(map(unicodedata.combining, text)):
        yield symbols
        return
    runs: list[list[tuple[str, ...]]] = []
    for is_run, group in itertools.groupby(text, key=lambda symbol: unicodedata.combining(symbol) != 0):
        letters = tuple(group)
        runs.append(_orders_of_run(letters) if is_run else [letters])
    if np.prod([float(len(run)) for run in runs]) > MOST_ORDERS:
        runs = [[run[0], run[-1]] if len(run) > 1 else run for run in runs]
        choices = [[run[0] for run in runs], [run[-1] for run in runs]]
    else:
        choices = [list(choice) for choice in itertools.product(*runs)]
    for choice in choices:
        yield np.array([ord(symbol) for part in choice for symbol in part], dtype=np.int32)


def _orders_of_run(accents: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Unicode's order first, that of Vietnamese typing last."""
    classes = [unicodedata.combining(each) for each in accents]
    first = tuple(each for _, each in sorted(zip(classes, accents, strict=True), key=lambda pair: pair[0]))
    if len(set(classes)) == 1 or len(accents) > 4:
        return [first]
    last = tuple(sorted(first, key=lambda each: _TONES_LAST.get(unicodedata.combining(each), unicodedata.combining(each))))

    def by_class(order: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(order, key=unicodedata.combining))

    others = {order for order in itertools.permutations(first) if by_class(order) == first} - {first, last}
    return list(dict.fromkeys([first, *sorted(others), last]))


def _national_forms(phrase: str) -> list[str]:
    """The ways a telephone number with its country is written in that country, and abroad without the plus."""
    found = telephone_of(phrase)
    if found is None:
        return []
    # "+49 (0)30 …": the trunk prefix stands beside the country, though nobody dials both.
    forms = (found.national, f"+{found.country}{found.number}", f"+{found.country} {found.national}")
    return [form for form in forms if sum(map(str.isdigit, form)) >= FEWEST_DIGITS]
