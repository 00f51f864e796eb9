"""From text to the symbols that phrases are compared in, and the rolling hash over them.

A text is read as *elements* (see `elements`). A `Folding` says which *symbols* each character stands for (none, one, or up to
`MOST_SYMBOLS`) and which elements drop out because of what stands before them. What drops out depends on the left side only, so
a text can be folded while it grows, and a phrase is found across token boundaries without decoding everything again.

There are three ways to match (`Match`):

- ``folded``: as running text is read. Unicode's compatibility caseless matching (D146), where I, i and both Turkish letters are
  one and Greek loses the accents that capitals do without; any white space, also around a slash, is one space; apostrophes,
  quotes and hyphens are one of each; decimal digits are those of ASCII; invisible characters, soft hyphens, tatweel and vowel
  marks of Arabic, Hebrew and Syriac are nothing.
- ``exact``: character by character, composed or decomposed; letter case alone is folded, and that only if asked.
- ``number``: as ``folded``, without whatever separates groups of digits.

The same code serves the compiler (tokens of a vocabulary), the step (the last tokens of each row) and the text scanner, so they
cannot disagree. All of it comes from the Unicode data that Python ships, whose version is part of every artifact's fingerprint.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from guards.letters import is_invisible, is_unspaced, is_white
from guards.suppression.elements import ABSENT, BREAK, ELEMENTS, RAW, code_points

MOST_SYMBOLS = 4
"""Of one character: as many as canonical decompositions have. The few ligatures that stand for more stay themselves."""
Match = Literal["folded", "exact", "number"]

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so invertible modulo 2**64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
LEFT_BOUNDARY_KEY = 0x5851F42D4C957F2D
"""Added to the hash of a phrase that may only start at a word boundary, so that both kinds share one table."""

_APOSTROPHES = frozenset("'‘’‚‛ʹʻʼʽʾʿˈ´`′‵׳՚ꞌ＇᾽᾿´῾΄ߴ❛❜\u1ffd")  # noqa: RUF001
_QUOTES = frozenset('"“”„‟«»‹›″‶״「」『』〝〞〟＂❝❞⹂🙶🙷🙸')  # noqa: RUF001
_HYPHENS = frozenset("\u2212\u2043\u02d7")  # beside the whole category of dashes
_SLASHES = frozenset("\u2044\u2215")
_TATWEEL = "\u0640"
_PARTS_OF_LETTERS = frozenset("\u0653\u0654\u0655\u065f")  # madda and hamza
_DOT_ABOVE = "\u0307"
_GREEK_MARKS = frozenset("\u0300\u0301\u0304\u0306\u0308\u0313\u0314\u0342\u0343")
_HAN = (0x4E00, 0x9FFF), (0x20000, 0x33FFF)
_MIDDLE_DOTS = frozenset("\u2022\u2027\u22c5\u30fb")
_KEYBOARDS = {"\u06cc": "\u064a", "\u06a9": "\u0643", "\u0671": "\u0627"}
"""Persian and Urdu letters -> the Arabic ones that other keyboards type for them."""
_SEPARATORS = frozenset(" -./()',:+_;|[]\u00b7\u066b\u066c\u3001")
"""Between groups of digits; currency signs too."""

# What an element is, as bits: what it depends on, and what depends on it.
WHITE, SLASH, MARK, DOT, GREEK_MARK, AFTER_DOTTED, AFTER_GREEK, WORD = (1 << bit for bit in range(8))

CONTEXTS: dict[int, tuple[int, int]] = {
    WHITE: (ord(" "), WHITE | SLASH),
    AFTER_GREEK: (ord("α"), GREEK_MARK),  # noqa: RUF001
    AFTER_DOTTED: (ord("i"), DOT),
}
"""What an element may find before it that makes it drop out -> an element that stands for that, and what drops out."""


def _without_vowels(symbols: str) -> str:
    """Without what Arabic, Hebrew and Syriac are usually written without."""
    kept = []
    for symbol in symbols:
        scripted = unicodedata.name(symbol, "").startswith(("ARABIC ", "HEBREW ", "SYRIAC "))
        vowel = scripted and unicodedata.category(symbol) == "Mn" and symbol not in _PARTS_OF_LETTERS
        enclosing = unicodedata.category(symbol) == "Me"  # a keycap around a digit
        if not vowel and not enclosing and symbol != _TATWEEL and not is_invisible(symbol):
            kept.append(symbol)
    return "".join(kept)


def _plain(symbol: str) -> str:
    """The symbol that all of its kind of punctuation, or all digits of its value, are compared as."""
    if symbol in _APOSTROPHES:
        return "'"
    if symbol in _QUOTES:
        return '"'
    if unicodedata.category(symbol) == "Pd" or symbol in _HYPHENS:
        return "-"
    if symbol in _SLASHES:
        return "/"
    if symbol in _MIDDLE_DOTS:
        return "\u00b7"
    if symbol in _KEYBOARDS:
        return _KEYBOARDS[symbol]
    digit = unicodedata.decimal(symbol, None)
    return symbol if digit is None else str(digit)


def symbols_of(character: str, match: Literal["folded", "exact"], fold_case: bool) -> str:
    """What one character is compared as; empty for what does not count."""
    running = match != "exact"
    if running and is_invisible(character):
        return ""
    if running and is_white(character):
        symbols = " "
    elif running and character in _APOSTROPHES | _QUOTES:
        symbols = _plain(character)
    else:
        form: Literal["NFD", "NFKD"] = "NFKD" if running else "NFD"
        symbols = unicodedata.normalize("NFD", character)
        for _ in range(2):  # folding what was decomposed, and decomposing what was folded, as D145 and D146 have it
            symbols = unicodedata.normalize(form, symbols.casefold() if fold_case else symbols)
        if running:
            symbols = "".join(map(_plain, _without_vowels(symbols)))
        if fold_case:
            symbols = _without_dots_and_tonos(symbols.replace("\u0131", "i"))
        if len(symbols) > MOST_SYMBOLS or (len(symbols) > 1 and any(symbol in " /" for symbol in symbols)):
            symbols = character
    return symbols


def _without_dots_and_tonos(symbols: str) -> str:
    """Within one character, what `Folding.read` does between characters."""
    kept, base = [], ""
    for symbol in symbols:
        if unicodedata.combining(symbol) == 0:
            base = symbol
        elif (symbol == _DOT_ABOVE and base in ("i", "j")) or (symbol in _GREEK_MARKS and _is_greek(base)):
            continue
        kept.append(symbol)
    return "".join(kept)


def _is_greek(symbol: str) -> bool:
    return bool(symbol) and unicodedata.name(symbol, "").startswith("GREEK ")


def _bits_of(symbols: str, match: Literal["folded", "exact"], fold_case: bool) -> int:
    bits = 0
    if match == "folded":
        bits |= WHITE * (symbols == " ") | SLASH * (symbols == "/")
    bases = [symbol for symbol in symbols if unicodedata.combining(symbol) == 0]
    if not bases:
        bits |= MARK
        if fold_case:
            bits |= DOT * (symbols == _DOT_ABOVE) | GREEK_MARK * _GREEK_MARKS.issuperset(symbols)
        return bits
    base = bases[-1]
    if fold_case:
        bits |= AFTER_DOTTED * (base in "ij") | AFTER_GREEK * _is_greek(base)
    word = base == "_" or (unicodedata.category(base)[0] in "LMN" and not is_unspaced(base))
    return bits | WORD * word


@functools.cache
def symbol_hashes() -> np.ndarray:
    """[ELEMENTS] uint64: a fixed random number per symbol (splitmix64, so the same in every process and release)."""
    with np.errstate(over="ignore"):
        z = (np.arange(ELEMENTS, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
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


@dataclass(frozen=True, slots=True, eq=False)
class Folding:
    """One way to compare texts, as tables over elements. Get one from `folding`."""

    match: Match
    fold_case: bool
    starts: np.ndarray  # [ELEMENTS + 1] int64 into ``symbols``
    symbols: np.ndarray  # [S] int32, of all elements one after the other
    counts: np.ndarray  # [ELEMENTS] int64, symbols of an element
    hashes: np.ndarray  # [ELEMENTS] int64, of its symbols: the sum of hash(symbol) * base**(symbols after it)
    bits: np.ndarray  # [ELEMENTS] uint8: see WHITE and the others

    @property
    def name(self) -> str:
        return f"{self.match}{'' if self.fold_case else ' cased'}"

    def expand(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Symbols of a flat [N] array of elements that count, and the element that each belongs to: [S] int32, [S] int64."""
        counts = self.counts[elements]
        owner = np.repeat(np.arange(len(elements)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.symbols[self.starts[elements][owner] + within], owner

    def kept(self, elements: np.ndarray, owner: np.ndarray, before: int = BREAK) -> np.ndarray:
        """Which elements count, of texts that are given one after the other.

        Args:
            elements: [N] int64.
            owner: [N] int64, the text of each, ascending.
            before: an element that stands before each text.

        Returns:
            [N] bool.
        """
        # Two more elements before each text: a break, so that the text before does not count, and ``before``.
        begins = np.diff(owner, prepend=-1) != 0
        place = np.arange(len(owner)) + 2 * np.cumsum(begins)
        row = np.full(len(owner) + 2 * int(begins.sum()), BREAK, dtype=np.int64)
        row[place] = elements
        row[place[begins] - 1] = before
        tensor = torch.from_numpy(row)[None]
        return self.on(torch.device("cpu")).kept(tensor, tensor != ABSENT)[0].numpy()[place]

    def read(self, text: str) -> np.ndarray:
        """[K] int64: where in a text the characters stand that count."""
        elements = code_points(text).astype(np.int64)
        return np.flatnonzero(self.kept(elements, np.zeros_like(elements)))

    def fold(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The symbols of each text, [S] int32 each."""
        if not texts:
            return []
        elements = code_points("".join(texts)).astype(np.int64)
        owner = np.repeat(np.arange(len(texts)), list(map(len, texts)))
        kept = self.kept(elements, owner)
        symbols, element = self.expand(elements[kept])
        return np.split(symbols, np.searchsorted(owner[kept][element], np.arange(1, len(texts))))

    def on(self, device: torch.device) -> FoldingTables:
        """The tables as tensors."""
        return _tables(self, device)


@functools.lru_cache(maxsize=16)
def _tables(folding: Folding, device: torch.device) -> FoldingTables:
    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return FoldingTables(folding.match, folding.fold_case, moved(folding.counts), moved(folding.hashes), moved(folding.bits))


@dataclass(frozen=True, slots=True, eq=False)
class FoldingTables:
    """A `Folding` on a device."""

    match: Match
    fold_case: bool
    counts: Tensor  # [ELEMENTS] int64
    hashes: Tensor  # [ELEMENTS] int64
    bits: Tensor  # [ELEMENTS] uint8

    def kept(self, elements: Tensor, there: Tensor) -> Tensor:
        """Which elements count.

        Args:
            elements: [N, L] int64, rows of text.
            there: [N, L] bool, False where a row has no element.

        Returns:
            [N, L] bool.
        """
        known = torch.where(there, elements, 0)
        kept = there & (self.counts[known] > 0)
        bits = torch.where(kept, self.bits[known], 0)
        if self.match == "folded":
            # Of a run of white space and slashes, everything after the first white space drops out.
            run = (bits & (WHITE | SLASH)) != 0
            white = ((bits & WHITE) != 0).cumsum(1)
            before_run = _carry_right(torch.where(run, 0, white), kept & ~run)
            kept = kept & ~(run & (white - ((bits & WHITE) != 0).long() > before_run))
        if self.fold_case:
            dropping = (bits & (DOT | GREEK_MARK)) != 0
            if dropping.any():
                base = _carry_right(bits.long(), kept & ((bits & MARK) == 0))
                kept = kept & ~(((bits & DOT) != 0) & ((base & AFTER_DOTTED) != 0))
                kept = kept & ~(((bits & GREEK_MARK) != 0) & ((base & AFTER_GREEK) != 0))
        return kept

    def words(self, elements: Tensor, kept: Tensor) -> Tensor:
        """[N, L] bool: is the last letter at or before a position part of a word, so that no word can start after it?

        Marks belong to the letter before them; bytes of half a character and letters of scripts without spaces are no parts.
        """
        bits = torch.where(kept, self.bits[torch.where(kept, elements, 0)], 0)
        return (_carry_right(bits.long(), kept & ((bits & MARK) == 0)) & WORD) != 0

    def contexts(self, elements: Tensor, kept: Tensor) -> Tensor:
        """[N] int64: what the end of each row makes drop out, a key of `CONTEXTS`, or 0."""
        bits = torch.where(kept, self.bits[torch.where(kept, elements, 0)], 0).long()
        last = _carry_right(bits, kept)[:, -1] & WHITE
        base = _carry_right(bits, kept & ((bits & MARK) == 0))[:, -1] & (AFTER_DOTTED | AFTER_GREEK)
        return torch.where(last > 0, last, base)


def _carry_right(value: Tensor, known: Tensor) -> Tensor:
    """[N, L]: at each position the value at the last known position at or before it; 0 if there is none."""
    position = torch.where(known, torch.arange(known.shape[1], device=known.device), -1).cummax(1).values
    return torch.where(position >= 0, value.gather(1, position.clamp(min=0)), 0)


@functools.cache
def folding(match: Match, fold_case: bool) -> Folding:
    """The tables of one way to compare. About two seconds, once in a process."""
    if match == "number":
        return _without_separators(folding("folded", fold_case))
    symbols_by_code: dict[int, str] = {}
    bits = np.zeros(ELEMENTS, dtype=np.uint8)
    for code in range(RAW):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Cn", "Co", "Cs") and not 0xE0000 <= code <= 0xE0FFF:
            continue
        if any(low <= code <= high for low, high in _HAN) and unicodedata.normalize("NFKD", character) == character:
            continue  # half of all characters: themselves, and no part of a word in a script without spaces
        symbols = symbols_of(character, match, fold_case)
        if symbols:
            bits[code] = _bits_of(symbols, match, fold_case)
        if symbols != character:
            symbols_by_code[code] = symbols
    counts = np.ones(ELEMENTS, dtype=np.int64)
    counts[list(symbols_by_code)] = list(map(len, symbols_by_code.values()))
    starts = np.concatenate([[0], np.cumsum(counts)])
    flat = np.empty(starts[-1], dtype=np.int32)
    single = counts == 1
    flat[starts[:-1][single]] = np.flatnonzero(single)
    for code, symbols in symbols_by_code.items():
        flat[starts[code] : starts[code + 1]] = [ord(symbol) for symbol in symbols]
    return _folding(match, fold_case, counts, flat, bits)


def _without_separators(whole: Folding) -> Folding:
    signs = [code for code in range(RAW) if unicodedata.category(chr(code)) == "Sc"]
    dropped = np.isin(whole.symbols, [*(ord(each) for each in _SEPARATORS), *signs])
    owner = np.repeat(np.arange(ELEMENTS), whole.counts)
    counts = whole.counts - np.bincount(owner[dropped], minlength=ELEMENTS)
    bits = np.where(counts > 0, whole.bits & ~np.uint8(WHITE | SLASH), 0).astype(np.uint8)
    return _folding("number", whole.fold_case, counts, whole.symbols[~dropped], bits)


def _folding(match: Match, fold_case: bool, counts: np.ndarray, symbols: np.ndarray, bits: np.ndarray) -> Folding:
    starts = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(ELEMENTS), counts)
    after = starts[1:][owner] - 1 - np.arange(len(owner))
    with np.errstate(over="ignore"):
        sums = np.concatenate([[np.uint64(0)], np.cumsum(symbol_hashes()[symbols] * powers(MOST_SYMBOLS)[after], dtype=np.uint64)])
        hashes = sums[starts[1:]] - sums[starts[:-1]]
    return Folding(match, fold_case, starts, symbols, counts, hashes.view(np.int64), bits)
