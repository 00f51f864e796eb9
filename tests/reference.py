"""The slow, obvious twins of the fast paths. Nothing here shares code with what it checks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def fold_character(character: str) -> str:
    for _ in range(2):
        for folded in (character.casefold(), character.lower()):
            if len(folded) == 1:
                character = folded
                break
    return character


def is_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character)[0] in "LMN"


def decode(text: bytes) -> list[tuple[str, int]]:
    """Characters with the byte offset at which each ends; invalid bytes become lone surrogates of their own."""
    characters, offset = [], 0
    for character in text.decode("utf-8", errors="surrogateescape"):
        offset += len(character.encode("utf-8", errors="surrogateescape"))
        characters.append((character, offset))
    return characters


def spellings(phrase: str, fold_case: bool) -> set[str]:
    forms = {phrase}
    if fold_case:
        forms |= {phrase.upper(), phrase.lower(), phrase.title(), phrase.casefold()}
    return forms | {unicodedata.normalize(form, text) for text in forms for form in ("NFC", "NFD")}


def occurrences(text: bytes, phrases: Iterable[str], *, fold_case: bool, left_boundary: bool) -> set[tuple[int, int]]:
    """(start, end) in characters of every occurrence of every phrase."""
    characters = [character for character, _ in decode(text)]
    fold = fold_character if fold_case else (lambda character: character)
    haystack = [fold(character) for character in characters]
    found = set()
    for phrase in phrases:
        for form in spellings(phrase.strip(), fold_case):
            needle = [fold(character) for character in form]
            for start in range(len(haystack) - len(needle) + 1):
                if haystack[start : start + len(needle)] == needle and not (
                    left_boundary and start and is_word(characters[start - 1])
                ):
                    found.add((start, start + len(needle)))
    return found


def completes(history: bytes, token: bytes, phrases: Iterable[str], *, fold_case: bool, left_boundary: bool) -> bool:
    """Would ``token`` after ``history`` finish a phrase that was not finished before?"""
    ends = [end for _, end in decode(history + token)]
    return any(
        ends[end - 1] > len(history)
        for _, end in occurrences(history + token, phrases, fold_case=fold_case, left_boundary=left_boundary)
    )
