"""From bytes to the symbols that phrases are compared in, and the rolling hash over them.

A *symbol* is a case-folded code point where the bytes form a complete, valid UTF-8 character, and ``RAW + byte`` where they
do not (half a character at either end of a token, or garbage). Folding is per character and so commutes with concatenation,
which is what lets a phrase be matched across token boundaries without ever decoding the whole text.

The same decoder serves the compiler (tokens of a vocabulary), the step (the last bytes of each row) and the text scanner, so
they cannot disagree.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import torch
from torch import Tensor

RAW = 0x110000
"""Symbols from here on are single bytes that are not part of a complete character."""
SYMBOLS = RAW + 256
ABSENT = -1
"""Marks positions without a byte in a padded byte matrix."""

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so invertible modulo 2**64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
LEFT_BOUNDARY_KEY = 0x5851F42D4C957F2D
"""Added to the hash of a phrase that may only start at a word boundary, so that both kinds share one table."""


@functools.cache
def fold_table(fold_case: bool) -> np.ndarray:
    """[SYMBOLS] int32: each symbol's representative. Identity without folding.

    Two characters share a representative when simple case folding says so: ``k``, ``K`` and the Kelvin sign. Characters whose
    folding is longer than one character (``ß``) keep their own; `spellings` adds the long form as another phrase.
    """
    table = np.arange(SYMBOLS, dtype=np.int32)
    if fold_case:
        for code_point in range(RAW):
            if 0xD800 <= code_point < 0xE000:
                continue
            character = chr(code_point)
            folded = character.casefold()
            if len(folded) != 1:
                folded = character.lower()
            if len(folded) == 1 and folded != character:
                table[code_point] = ord(folded)
        table = table[table]  # one more round reaches the representative of chains such as capital sharp s
    return table


@functools.cache
def case_variants(fold_case: bool) -> dict[int, tuple[str, ...]]:
    """Representative -> every character that folds to it, for representatives with more than one."""
    if not fold_case:
        return {}
    table = fold_table(True)
    moved = np.flatnonzero(table != np.arange(SYMBOLS))
    groups: dict[int, list[str]] = {}
    for code_point in moved.tolist():
        groups.setdefault(int(table[code_point]), []).append(chr(code_point))
    return {representative: (chr(representative), *others) for representative, others in groups.items()}


@functools.cache
def word_table() -> np.ndarray:
    """[SYMBOLS] bool: is the symbol part of a word (a letter, a mark, a digit, an underscore)? Raw bytes are not."""
    table = np.zeros(SYMBOLS, dtype=bool)
    for code_point in range(RAW):
        if not 0xD800 <= code_point < 0xE000:
            category = unicodedata.category(chr(code_point))
            table[code_point] = category[0] in "LMN" or code_point == 0x5F
    return table


@functools.cache
def symbol_hashes() -> np.ndarray:
    """[SYMBOLS] uint64: a fixed random number per symbol (splitmix64, so the same in every process and release)."""
    with np.errstate(over="ignore"):
        z = (np.arange(SYMBOLS, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def powers(count: int, *, inverse: bool = False) -> np.ndarray:
    """[count] uint64: the hash's base to the powers 0 … count-1, modulo 2**64."""
    return _powers(1 << max(12, (count - 1).bit_length()), inverse)[:count]


@functools.lru_cache(maxsize=32)
def _powers(count: int, inverse: bool) -> np.ndarray:
    base = _BASE_INVERSE if inverse else _BASE
    values, value = [], 1
    for _ in range(count):
        values.append(value)
        value = value * base & 0xFFFFFFFFFFFFFFFF
    return np.array(values, dtype=np.uint64)


def decode_symbols(text: Tensor) -> tuple[Tensor, Tensor]:
    """Decode UTF-8 row by row, tolerating anything.

    Args:
        text: [N, L] int64 of byte values, ``ABSENT`` where a row has no byte (padding at either end).

    Returns:
        ``symbols`` [N, L] int64, unfolded, meaningful where ``kept``; ``kept`` [N, L] bool, True where a symbol starts.
        The bytes of an incomplete or invalid character each keep a symbol of their own.
    """
    length = text.shape[1]
    padded = torch.nn.functional.pad(text, (0, 3), value=ABSENT)
    second, third, fourth = (padded[:, i : i + length] for i in (1, 2, 3))

    def continues(byte: Tensor) -> Tensor:
        return (byte >= 0x80) & (byte < 0xC0)

    two = (text >= 0xC2) & (text < 0xE0) & continues(second)
    three_value = ((text & 0x0F) << 12) | ((second & 0x3F) << 6) | (third & 0x3F)
    three = (text >= 0xE0) & (text < 0xF0) & continues(second) & continues(third)
    three &= (three_value >= 0x800) & ~((three_value >= 0xD800) & (three_value < 0xE000))
    four_value = ((text & 0x07) << 18) | ((second & 0x3F) << 12) | ((third & 0x3F) << 6) | (fourth & 0x3F)
    four = (text >= 0xF0) & (text < 0xF5) & continues(second) & continues(third) & continues(fourth)
    four &= (four_value >= 0x10000) & (four_value < RAW)

    symbols = torch.where(text < 0x80, text, text + RAW)
    symbols = torch.where(two, ((text & 0x1F) << 6) | (second & 0x3F), symbols)
    symbols = torch.where(three, three_value, symbols)
    symbols = torch.where(four, four_value, symbols)

    covered = torch.zeros_like(two)
    covered[:, 1:] |= (two | three | four)[:, :-1]
    covered[:, 2:] |= (three | four)[:, :-2]
    covered[:, 3:] |= four[:, :-3]
    return symbols, (text != ABSENT) & ~covered


def spellings(phrase: str, fold_case: bool) -> list[str]:
    """The spellings of a phrase that per-character folding alone would not unite.

    Composed and decomposed forms always; with case folding also the full upper, lower, title and folded forms, which may
    differ in length (``ß`` -> ``SS``).
    """
    forms = {phrase}
    if fold_case:
        forms |= {phrase.upper(), phrase.lower(), phrase.title(), phrase.casefold()}
    return sorted({unicodedata.normalize(form, text) for text in forms for form in ("NFC", "NFD")} | forms)
