"""Phrases compiled against a vocabulary: the artifact that the suppression guard runs on.

A phrase is about to be completed when the text so far ends with its first part ``q`` and the next token starts with the rest
``r``. So for every split of every phrase whose rest is the beginning of at least one token, the artifact stores
``hash(q) -> range of tokens that start with r`` (tokens are sorted, so it is one range). This is the byte automaton of
Aho and Corasick with its states addressed by content instead of by number: no failure links, no state to keep per request, and
a step costs the same for a hundred phrases as for a hundred thousand. Tokens that contain a whole phrase are banned always.

Splits inside a character (a token may end in the middle of one) are splits like any other, once for each letter case.

Exactness: equal texts have equal hashes, so nothing that must be banned is ever missed. Two different texts may share a 64-bit
hash, which would ban a token needlessly, once in about 2**64 look-ups.

Not covered: see the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from guards.errors import InvalidArtifact, VocabularyMismatch
from guards.forget_set import MAX_PHRASE_CHARACTERS, check_phrases
from guards.suppression.folding import (
    LEFT_BOUNDARY_KEY,
    RAW,
    SYMBOLS,
    case_variants,
    fold_table,
    powers,
    spellings,
    symbol_hashes,
    word_table,
)
from guards.suppression.vocabulary import SortedTokens, Vocabulary

_FORMAT = "lethe-phrases-1"


def phrases_fingerprint(phrases: Iterable[str], vocabulary: str, *, fold_case: bool, left_boundary: bool) -> str:
    """The content address of compiled phrases: a sha256 of everything that the result depends on."""
    content = [_FORMAT, vocabulary, fold_case, left_boundary, sorted(set(phrases))]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Ranges:
    """Ragged lists of ranges over sorted tokens: list ``i`` is ``low/high[starts[i]:starts[i + 1]]``."""

    starts: np.ndarray  # [N + 1] int64
    low: np.ndarray  # [M] int32
    high: np.ndarray  # [M] int32, exclusive


@dataclass(frozen=True)
class CompiledPhrases:
    """The artifact. Lists 0 and 1 of ``ranges`` are the tokens banned always, and after a word boundary; the list of
    ``keys[i]`` is ``i + 2``."""

    fingerprint: str
    vocabulary: str  # fingerprint of the vocabulary it was compiled against
    fold_case: bool
    left_boundary: bool
    phrase_count: int
    window_bytes: int  # how far back a step has to look
    keys: np.ndarray  # [N] uint64 ascending
    ranges: Ranges
    phrase_keys: np.ndarray  # [P] uint64 ascending, hashes of the whole phrases in all spellings
    phrase_lengths: np.ndarray  # [D] int32, the distinct lengths in characters

    def find(self, text: str) -> list[tuple[int, int]]:
        """Every occurrence of a phrase in ``text`` as (start, end) in characters, ordered by start.

        This is the guard's definition of "appears", for reports and for checking finished text.
        """
        if not text or not self.phrase_keys.size:
            return []
        symbols = fold_table(self.fold_case)[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]
        count = len(symbols)
        with np.errstate(over="ignore"):
            sums = np.concatenate(
                [[np.uint64(0)], np.cumsum(symbol_hashes()[symbols] * powers(count, inverse=True), dtype=np.uint64)]
            )
            at_boundary = np.ones(count, dtype=bool)
            if self.left_boundary:
                at_boundary[1:] = ~word_table()[symbols[:-1]]
            found = []
            for length in self.phrase_lengths.tolist():
                if length > count:
                    continue
                hashes = (sums[length:] - sums[:-length]) * powers(count)[length - 1 :]
                hit = _contains(self.phrase_keys, hashes) & at_boundary[: count - length + 1]
                found += [(int(start), int(start) + length) for start in np.flatnonzero(hit)]
        return sorted(found)

    def save(self, path: Path) -> None:
        """Write to ``path`` (the caller makes it atomic)."""
        tensors = {
            "keys": self.keys.view(np.int64),
            "range_starts": self.ranges.starts,
            "range_low": self.ranges.low,
            "range_high": self.ranges.high,
            "phrase_keys": self.phrase_keys.view(np.int64),
            "phrase_lengths": self.phrase_lengths,
        }
        header: dict[str, Any] = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary,
            "fold_case": self.fold_case,
            "left_boundary": self.left_boundary,
            "phrase_count": self.phrase_count,
            "window_bytes": self.window_bytes,
        }
        header["content"] = _content_digest(tensors, header)
        path.write_bytes(save(tensors, metadata={"lethe": json.dumps(header)}))

    @staticmethod
    def load(path: Path) -> CompiledPhrases:
        """Read what `save` wrote.

        Raises:
            InvalidArtifact: missing, truncated, altered, or not of this kind and version.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("lethe", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InvalidArtifact(
                f"{path} cannot be read as compiled phrases ({error}); restart the server to have it rebuilt"
            ) from error
        if header.get("format") != _FORMAT:
            raise InvalidArtifact(f"{path} has format {header.get('format')!r}, this version reads {_FORMAT!r}; rebuild it")
        if header.pop("content", None) != _content_digest(tensors, header):
            raise InvalidArtifact(f"{path} was altered after it was written; restart the server to have it rebuilt")
        return CompiledPhrases(
            fingerprint=header["fingerprint"],
            vocabulary=header["vocabulary"],
            fold_case=header["fold_case"],
            left_boundary=header["left_boundary"],
            phrase_count=header["phrase_count"],
            window_bytes=header["window_bytes"],
            keys=tensors["keys"].view(np.uint64),
            ranges=Ranges(tensors["range_starts"], tensors["range_low"], tensors["range_high"]),
            phrase_keys=tensors["phrase_keys"].view(np.uint64),
            phrase_lengths=tensors["phrase_lengths"],
        )


def compile_phrases(
    phrases: Sequence[str],
    vocabulary: Vocabulary,
    *,
    fold_case: bool = True,
    left_boundary: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> CompiledPhrases:
    """Compile phrases against a vocabulary. About a second for 10,000 phrases, mostly linear in their characters.

    Args:
        phrases: non-empty texts of at most MAX_PHRASE_CHARACTERS characters; white space around them does not count.
        fold_case: ban every letter case.
        left_boundary: ban only where the phrase starts a word, so that "Ron" leaves "electron" alone.
        progress: called with the fraction done.

    Raises:
        InvalidForgetSet: a phrase is empty, too long or not text.
    """
    check_phrases(phrases)
    progress(0.0)
    texts = _Texts.of(sorted({form for phrase in phrases for form in _forms(phrase.strip(), fold_case)}), fold_case)
    progress(0.2)
    tokens = vocabulary.sorted_tokens(fold_case)
    if len(np.unique(tokens.prefix_keys)) != len(tokens.prefix_keys):
        raise VocabularyMismatch("two different token prefixes share a hash; this vocabulary needs another hash base")
    offset = np.uint64(LEFT_BOUNDARY_KEY if left_boundary else 0)

    entries = [_whole_character_splits(texts, tokens), *_split_characters(texts, tokens, fold_case)]
    progress(0.7)
    keys, low, high, window = (np.concatenate(column) for column in zip(*entries, strict=True))
    with np.errstate(over="ignore"):
        keys = keys + offset
    order = np.lexsort((high, low, keys))
    keys, low, high = keys[order], low[order], high[order]
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[1:] != keys[:-1]) | (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    keys, low, high = keys[fresh], low[fresh], high[fresh]
    unique_keys, counts = np.unique(keys, return_counts=True)

    always, after_boundary = _tokens_that_contain(texts, tokens, left_boundary)
    progress(0.9)
    lists = [_as_ranges(always), _as_ranges(after_boundary)]
    heads = np.array([len(lists[0][0]), len(lists[1][0])], dtype=np.int64)
    return CompiledPhrases(
        fingerprint=phrases_fingerprint(phrases, vocabulary.fingerprint, fold_case=fold_case, left_boundary=left_boundary),
        vocabulary=vocabulary.fingerprint,
        fold_case=fold_case,
        left_boundary=left_boundary,
        phrase_count=len(set(phrases)),
        # One more character, so that the one before the phrase is seen too.
        window_bytes=int(window.max(initial=0)) + 4,
        keys=unique_keys,
        ranges=Ranges(
            starts=np.concatenate([[0], np.cumsum(np.concatenate([heads, counts]))]).astype(np.int64),
            low=np.concatenate([lists[0][0], lists[1][0], low]).astype(np.int32),
            high=np.concatenate([lists[0][1], lists[1][1], high]).astype(np.int32),
        ),
        phrase_keys=np.unique(texts.whole_hashes()),
        phrase_lengths=np.unique(texts.lengths).astype(np.int32),
    )


def _forms(phrase: str, fold_case: bool) -> list[str]:
    return [phrase.lower() if fold_case else phrase] if phrase.isascii() else spellings(phrase, fold_case)


def _contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    position = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[position] == values


@dataclass(frozen=True)
class _Texts:
    """Distinct folded phrases, laid end to end, with running hash sums so that any part's hash is one subtraction."""

    symbols: np.ndarray  # [S] int32
    begins: np.ndarray  # [P] int64
    lengths: np.ndarray  # [P] int64
    sums: np.ndarray  # [S + 1] uint64, of hash(symbol) * base**-(position in phrase)

    @staticmethod
    def of(texts: list[str], fold_case: bool) -> _Texts:
        folded = {fold_table(fold_case)[_code_points(text)].tobytes() for text in texts}
        parts = [np.frombuffer(part, dtype=np.int32) for part in sorted(folded)]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        begins = np.cumsum(lengths) - lengths
        symbols = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        position = np.arange(len(symbols)) - np.repeat(begins, lengths)
        with np.errstate(over="ignore"):
            terms = symbol_hashes()[symbols] * powers(MAX_PHRASE_CHARACTERS * 4, inverse=True)[position]
            sums = np.concatenate([[np.uint64(0)], np.cumsum(terms, dtype=np.uint64)])
        return _Texts(symbols, begins, lengths, sums)

    def hashes(self, begin: np.ndarray, end: np.ndarray, phrase: np.ndarray) -> np.ndarray:
        """Hashes of ``symbols[begin:end]``, parts of the given phrases; 0 for an empty part."""
        with np.errstate(over="ignore"):
            last = np.maximum(end - 1 - self.begins[phrase], 0)
            return (self.sums[end] - self.sums[begin]) * powers(MAX_PHRASE_CHARACTERS * 4)[last]

    def whole_hashes(self) -> np.ndarray:
        return self.hashes(self.begins, self.begins + self.lengths, np.arange(len(self.begins)))

    def widths(self, fold_case_bytes: np.ndarray) -> np.ndarray:
        """[S + 1] int64 running sum of the most bytes that each symbol may take."""
        return np.concatenate([[0], np.cumsum(fold_case_bytes[self.symbols])])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _most_bytes() -> np.ndarray:
    """[SYMBOLS] int64: the longest UTF-8 form among a symbol's letter cases."""
    code_points = np.arange(SYMBOLS)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    widths[RAW:] = 1
    for representative, characters in case_variants(True).items():
        widths[representative] = max(len(character.encode()) for character in characters)
    return widths


_Entries = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # key, low, high, bytes to look back


def _whole_character_splits(texts: _Texts, tokens: SortedTokens) -> _Entries:
    """Splits between two characters: text so far ``p[:k]``, next token starts with ``p[k:]``, for 1 <= k < len(p)."""
    longest = int(tokens.lengths.max(initial=0))
    count = np.minimum(texts.lengths - 1, longest)
    phrase = np.repeat(np.arange(len(texts.lengths)), count)
    nth = np.arange(len(phrase)) - np.repeat(np.cumsum(count) - count, count)
    begin, end = texts.begins[phrase], texts.begins[phrase] + texts.lengths[phrase]
    cut = end - 1 - nth
    found, position = _look_up(tokens, texts.hashes(cut, end, phrase))
    phrase, begin, cut, position = phrase[found], begin[found], cut[found], position[found]
    widths = texts.widths(_most_bytes())
    return (
        texts.hashes(begin, cut, phrase),
        tokens.prefix_low[position],
        tokens.prefix_high[position],
        widths[cut] - widths[begin],
    )


def _split_characters(texts: _Texts, tokens: SortedTokens, fold_case: bool) -> list[_Entries]:
    """Splits inside a character: the text so far ends with its first bytes, the next token starts with the others."""
    starts_raw = set(tokens.symbols[tokens.symbols[:, 0] >= RAW, 0].tolist()) if len(tokens.symbols) else set()
    if not starts_raw:
        return []
    variants = case_variants(fold_case)
    phrase_of = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
    widths = texts.widths(_most_bytes())
    order = np.argsort(texts.symbols, kind="stable")
    present, first = np.unique(texts.symbols[order], return_index=True)
    entries = []
    for symbol, positions in zip(present.tolist(), np.split(order, first[1:]), strict=True):
        for character in variants.get(symbol, (chr(symbol),)):
            encoded = character.encode()
            for cut in range(1, len(encoded)):
                head = np.array([RAW + byte for byte in encoded[:cut]])
                tail = np.array([RAW + byte for byte in encoded[cut:]])
                if int(tail[0]) not in starts_raw:
                    continue
                phrase = phrase_of[positions]
                begin, end = texts.begins[phrase], texts.begins[phrase] + texts.lengths[phrase]
                with np.errstate(over="ignore"):
                    rest = texts.hashes(positions + 1, end, phrase) + _horner(tail) * _power(end - positions - 1)
                    found, where = _look_up(tokens, rest)
                    before = texts.hashes(begin, positions, phrase) * powers(cut + 1)[cut] + _horner(head)
                entries.append(
                    (
                        before[found],
                        tokens.prefix_low[where[found]],
                        tokens.prefix_high[where[found]],
                        (widths[positions] - widths[begin] + cut)[found],
                    )
                )
    return entries


def _horner(symbols: np.ndarray) -> np.uint64:
    with np.errstate(over="ignore"):
        return (symbol_hashes()[symbols] * powers(len(symbols))[::-1]).sum(dtype=np.uint64)


def _power(exponents: np.ndarray) -> np.ndarray:
    return powers(MAX_PHRASE_CHARACTERS * 4)[exponents]


def _look_up(tokens: SortedTokens, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    position = np.minimum(np.searchsorted(tokens.prefix_keys, hashes), len(tokens.prefix_keys) - 1)
    return tokens.prefix_keys[position] == hashes, position


def _tokens_that_contain(texts: _Texts, tokens: SortedTokens, left_boundary: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of tokens with a whole phrase inside: banned always, and banned only after a word boundary."""
    always = np.zeros(len(tokens.token_ids), dtype=bool)
    after_boundary = always.copy()
    whole, lengths = texts.whole_hashes(), texts.lengths
    for length in np.unique(lengths).tolist():
        wanted = np.unique(whole[lengths == length])
        for start in range(int(tokens.lengths.max(initial=0)) - length + 1):
            rows = np.flatnonzero(tokens.lengths >= start + length)
            with np.errstate(over="ignore"):
                inside = tokens.prefix_hashes[rows, start + length]
                inside = inside - tokens.prefix_hashes[rows, start] * powers(length + 1)[length]
            hit = rows[_contains(wanted, inside)]
            if not left_boundary:
                always[hit] = True
            elif start == 0:
                after_boundary[hit] = True
            else:
                always[hit[~word_table()[tokens.symbols[hit, start - 1]]]] = True
    return np.flatnonzero(always), np.flatnonzero(after_boundary & ~always)


def _as_ranges(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending positions as maximal runs (low, high)."""
    if not len(positions):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(positions) > 1)
    return positions[np.concatenate([[0], breaks + 1])], positions[np.concatenate([breaks, [len(positions) - 1]])] + 1


def _content_digest(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
