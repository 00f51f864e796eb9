"""Phrases compiled against a vocabulary: makes the artifact that the suppression guard runs on.

A phrase is about to be completed when the text so far ends with its first part ``q`` and the next token starts with the rest
``r``. So for every split of every phrase whose rest is the beginning of at least one token, the artifact stores
``hash(q) -> range of tokens that start with r`` (tokens are sorted, so it is one range). This is the byte automaton of
Aho and Corasick with its states addressed by content instead of by number: no failure links, no state to keep per request, and
a step costs the same for a hundred phrases as for a hundred thousand. Tokens that contain a whole phrase are banned always.

Where the text so far ends inside a character, which few steps do, the tokens that complete it are tried one by one: the artifact
also keeps the hashes of the phrases and of their *stems*, the phrases without their last symbols, to know when that is needed.

Exactness: equal symbols have equal hashes, so nothing that must be banned is ever missed. Two different texts may share a 64-bit
hash, which would ban a token needlessly, once in about 2**64 look-ups.

Not covered: see the package.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from guards.forget_set import MAX_PHRASE_CHARACTERS, ForgetSet, check_phrases
from guards.letters import is_unspaced
from guards.suppression.artifact import FORMAT, CompiledPart, CompiledPhrases, Ranges, contains
from guards.suppression.folding import (
    CONTEXTS,
    LEFT_BOUNDARY_KEY,
    MARK,
    MOST_SYMBOLS,
    WHITE,
    WORD,
    Folding,
    Match,
    powers,
    symbol_hashes,
)
from guards.suppression.spelling import spell
from guards.suppression.vocabulary import FoldedTokens, Vocabulary, context_key

_LONGEST = MAX_PHRASE_CHARACTERS * MOST_SYMBOLS


def phrases_fingerprint(
    phrases: Iterable[str], vocabulary: str, *, fold_case: bool = True, left_boundary: bool = False, match: Match = "folded"
) -> str:
    """The content address of compiled phrases: a sha256 of everything that the result depends on."""
    options = [fold_case, left_boundary, match]
    content = [FORMAT, unicodedata.unidata_version, vocabulary, *options, sorted(set(phrases))]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


class _Options(TypedDict):
    """How a set's phrases match, as the compiler takes it."""

    fold_case: bool
    left_boundary: bool
    match: Match


def _options(content: ForgetSet) -> _Options:
    return {"fold_case": not content.case_sensitive, "left_boundary": content.word_boundary, "match": content.match}


def fingerprint_of_set(content: ForgetSet, vocabulary: Vocabulary) -> str | None:
    """The content address of what `compile_set` makes; None for a set without phrases."""
    return phrases_fingerprint(content.phrases, vocabulary.fingerprint, **_options(content)) if content.phrases else None


def compile_set(content: ForgetSet, vocabulary: Vocabulary) -> CompiledPhrases:
    """A set's phrases, compiled as the set says how they match. Raises InvalidForgetSet, see `compile_phrases`."""
    return compile_phrases(content.phrases, vocabulary, **_options(content))


def compile_phrases(
    phrases: Sequence[str],
    vocabulary: Vocabulary,
    *,
    fold_case: bool = True,
    left_boundary: bool = False,
    match: Match = "folded",
) -> CompiledPhrases:
    """Compile phrases against a vocabulary. About a second for 10,000 phrases, mostly linear in their characters.

    Args:
        phrases: non-empty texts of at most MAX_PHRASE_CHARACTERS characters; white space around them does not count.
        fold_case: ban every letter case.
        left_boundary: ban only where the phrase starts a word, so that "Ron" leaves "electron" alone. Numbers match anywhere.
        match: "folded" or "exact", see `folding`.

    Raises:
        InvalidForgetSet: a phrase is empty, too long, not text, or nothing of it would count.
    """
    check_phrases(phrases)
    spelled = spell(sorted({phrase.strip() for phrase in phrases}), match, fold_case)
    return CompiledPhrases(
        fingerprint=phrases_fingerprint(
            phrases, vocabulary.fingerprint, fold_case=fold_case, left_boundary=left_boundary, match=match
        ),
        vocabulary=vocabulary.fingerprint,
        phrase_count=len(set(phrases)),
        parts=tuple(
            _compile(_Texts.of(found, left_boundary and by.match != "number"), vocabulary.folded(by))
            for by, found in spelled.items()
        ),
    )


def _compile(texts: _Texts, tokens: FoldedTokens) -> CompiledPart:
    keys, low, high, window = (np.concatenate(column) for column in zip(*_splits(texts, tokens), strict=True))
    order = np.lexsort((high, low, keys))
    keys, low, high = keys[order], low[order], high[order]
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[1:] != keys[:-1]) | (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    keys, low, high = keys[fresh], low[fresh], high[fresh]
    unique_keys, counts = np.unique(keys, return_counts=True)

    always, after_boundary = map(_as_ranges, _tokens_that_contain(texts, tokens))
    heads = np.array([len(always[0]), len(after_boundary[0])], dtype=np.int64)
    # A stem's rest may be all that the tokens add which complete a character; the empty stem is always there.
    rests = np.arange(1, tokens.most_completing + 1)
    phrase = np.repeat(np.arange(len(texts.lengths)), len(rests))
    rest = np.tile(rests, len(texts.lengths))
    phrase, rest = phrase[rest < texts.lengths[phrase]], rest[rest < texts.lengths[phrase]]
    end = texts.begins[phrase] + texts.lengths[phrase] - rest
    stems = texts.hashes(texts.begins[phrase], end, phrase, whole=True)
    longest_stem = int((texts.lengths[phrase] - rest).max(initial=0))
    return CompiledPart(
        match=tokens.by.match,
        fold_case=tokens.by.fold_case,
        window=max(int(window.max(initial=0)), longest_stem),
        keys=unique_keys,
        ranges=Ranges(
            starts=np.concatenate([[0], np.cumsum(np.concatenate([heads, counts]))]).astype(np.int64),
            low=np.concatenate([always[0], after_boundary[0], low]).astype(np.int32),
            high=np.concatenate([always[1], after_boundary[1], high]).astype(np.int32),
        ),
        stem_keys=np.unique(stems),
        phrase_keys=np.unique(texts.whole_hashes()),
        phrase_lengths=np.unique(texts.lengths).astype(np.int32),
    )


@dataclass(frozen=True)
class _Texts:
    """Distinct folded phrases, laid end to end, with running hash sums so that any part's hash is one subtraction."""

    symbols: np.ndarray  # [S] int32
    begins: np.ndarray  # [P] int64
    lengths: np.ndarray  # [P] int64
    sums: np.ndarray  # [S + 1] uint64, of hash(symbol) * base**-(position in phrase)
    offsets: np.ndarray  # [P] uint64, LEFT_BOUNDARY_KEY for phrases that may only start at a word boundary

    @staticmethod
    def of(spelled: Sequence[Sequence[np.ndarray]], left_boundary: bool) -> _Texts:
        distinct = sorted({symbols.tobytes() for spellings in spelled for symbols in spellings})
        parts = [np.frombuffer(part, dtype=np.int32) for part in distinct]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        begins = np.cumsum(lengths) - lengths
        symbols = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        position = np.arange(len(symbols)) - np.repeat(begins, lengths)
        with np.errstate(over="ignore"):
            terms = symbol_hashes()[symbols] * powers(_LONGEST, inverse=True)[position]
            sums = np.concatenate([[np.uint64(0)], np.cumsum(terms, dtype=np.uint64)])
        # What begins with white space begins after a word.
        bound = [left_boundary and not is_unspaced(chr(part[0])) and part[0] != ord(" ") for part in parts]
        offsets = np.where(bound, np.uint64(LEFT_BOUNDARY_KEY), np.uint64(0))
        return _Texts(symbols, begins, lengths, sums, offsets)

    def hashes(self, begin: np.ndarray, end: np.ndarray, phrase: np.ndarray, *, whole: bool = False) -> np.ndarray:
        """Hashes of ``symbols[begin:end]``, parts of the given phrases; 0 for an empty part.

        Args:
            whole: add what tells phrases apart that may only start at a word boundary. For parts from a phrase's beginning.
        """
        with np.errstate(over="ignore"):
            last = np.maximum(end - 1 - self.begins[phrase], 0)
            plain = (self.sums[end] - self.sums[begin]) * powers(_LONGEST)[last]
            return plain + self.offsets[phrase] if whole else plain

    def whole_hashes(self) -> np.ndarray:
        return self.hashes(self.begins, self.begins + self.lengths, np.arange(len(self.begins)), whole=True)

    def contexts(self, by: Folding, cut: np.ndarray, begin: np.ndarray) -> dict[int, np.ndarray]:
        """For each context, whether the part that ends before ``cut`` is one: [N] bool."""
        bits = by.bits[self.symbols]
        place = np.where((bits & MARK) == 0, np.arange(len(bits)), -1)
        base = np.maximum.accumulate(place)[cut - 1] if len(cut) else cut
        base_bits = np.where(base >= begin, bits[base], 0)
        last = bits[cut - 1]
        return {context: ((last if context == WHITE else base_bits) & context) != 0 for context in CONTEXTS}


_Entries = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # key, low, high, symbols to look back


def _splits(texts: _Texts, tokens: FoldedTokens) -> list[_Entries]:
    """Text so far ``p[:k]``, next token starts with ``p[k:]``, for 1 <= k < len(p)."""
    longest = int(tokens.plain.lengths.max(initial=0))
    count = np.minimum(texts.lengths - 1, longest)
    phrase = np.repeat(np.arange(len(texts.lengths)), count)
    nth = np.arange(len(phrase)) - np.repeat(np.cumsum(count) - count, count)
    begin, end = texts.begins[phrase], texts.begins[phrase] + texts.lengths[phrase]
    cut = end - 1 - nth
    rest = texts.hashes(cut, end, phrase)
    chosen = [(np.ones(len(cut), dtype=bool), np.uint64(0))]
    chosen += [(here, context_key(context)) for context, here in texts.contexts(tokens.by, cut, begin).items()]
    entries = []
    for here, key in chosen:
        with np.errstate(over="ignore"):
            which, position = _look_up(tokens.prefix_keys, rest[here] + key)
        own_phrase, own_begin, own_cut = (each[here][which] for each in (phrase, begin, cut))
        entries.append(
            (
                texts.hashes(own_begin, own_cut, own_phrase, whole=True),
                tokens.prefix_low[position],
                tokens.prefix_high[position],
                own_cut - own_begin,
            )
        )
    return entries


def _look_up(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every match, pairwise: index into ``values``, index into ``ascending``."""
    first = np.searchsorted(ascending, values)
    count = np.searchsorted(ascending, values, side="right") - first
    which = np.repeat(np.arange(len(values)), count)
    return which, first[which] + np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)


def _tokens_that_contain(texts: _Texts, tokens: FoldedTokens) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens with a whole phrase inside: banned always, and banned only after a word boundary."""
    plain, by = tokens.plain, tokens.by
    always = np.zeros(len(plain.token_ids), dtype=bool)
    after_boundary = always.copy()
    bits = by.bits[plain.symbols]
    for length in np.unique(texts.lengths).tolist():
        of_length = texts.lengths == length
        wanted = np.unique(texts.whole_hashes()[of_length])
        for start in range(int(plain.lengths.max(initial=0)) - length + 1):
            rows = np.flatnonzero(plain.lengths >= start + length)
            rows = rows[plain.opens[rows, start] & plain.closes[rows, start + length - 1]]
            with np.errstate(over="ignore"):
                inside = plain.hashes[rows, start + length]
                inside = inside - plain.hashes[rows, start] * powers(length + 1)[length]
                bound = rows[contains(wanted, inside + np.uint64(LEFT_BOUNDARY_KEY))]
            always[rows[contains(wanted, inside)]] = True
            alone, in_word = _before(bits[bound, :start])
            after_boundary[bound[alone]] = True
            always[bound[~alone & ~in_word]] = True
    return np.flatnonzero(always), np.flatnonzero(after_boundary & ~always)


def _before(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For [N, L] bits of what stands before in a token: [N] bool, is there no letter, so that the text before the token decides
    (accents belong to its last letter)? And does a word go on?"""
    letter = (bits & MARK) == 0
    if not bits.shape[1]:
        return np.ones(len(bits), dtype=bool), np.zeros(len(bits), dtype=bool)
    last = bits.shape[1] - 1 - letter[:, ::-1].argmax(axis=1)
    return ~letter.any(axis=1), (bits[np.arange(len(bits)), last] & WORD) != 0


def _as_ranges(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending positions as maximal runs (low, high)."""
    if not len(positions):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(positions) > 1)
    return positions[np.concatenate([[0], breaks + 1])], positions[np.concatenate([breaks, [len(positions) - 1]])] + 1
