"""A tokenizer's vocabulary as symbols, sorted, so that "all tokens that start with this text" is one contiguous range."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from guards.errors import VocabularyMismatch
from guards.suppression.folding import ABSENT, decode_symbols, fold_table, powers, symbol_hashes, word_table


@dataclass(frozen=True)
class SortedTokens:
    """The tokens' folded symbols in sorted order, and every distinct prefix of a token with its range.

    All arrays are over tokens that have text. ``sorted`` means by symbols, so tokens that share a prefix are neighbours.
    """

    token_ids: np.ndarray  # [N] int64, in sorted order
    symbols: np.ndarray  # [N, L] int32, ABSENT after a token's end
    lengths: np.ndarray  # [N] int32, symbols per token
    prefix_hashes: np.ndarray  # [N, L + 1] uint64, hash of the first k symbols
    prefix_keys: np.ndarray  # [P] uint64, ascending: hash of each distinct non-empty prefix
    prefix_low: np.ndarray  # [P] int64, first sorted position that has the prefix
    prefix_high: np.ndarray  # [P] int64, one past the last


class Vocabulary:
    """Token id -> the bytes it adds to the text.

    Args:
        token_bytes: one entry per row of the model's output, V of them; ``b""`` for ids without text (padding rows).
        special_ids: ids that a detokenizer skips: they add nothing to the output, and end any match in a prompt.
    """

    def __init__(self, token_bytes: Sequence[bytes], special_ids: Sequence[int]) -> None:
        self.size = len(token_bytes)
        if self.size == 0:
            raise VocabularyMismatch("the vocabulary has no tokens; pass one bytes object per token id")
        self.special = np.zeros(self.size, dtype=bool)
        special = np.asarray(sorted(set(special_ids)), dtype=np.int64)
        if special.size and (special[0] < 0 or special[-1] >= self.size):
            raise VocabularyMismatch(f"special ids {special.tolist()} must lie in [0, {self.size})")
        self.special[special] = True
        texts = [b"" if self.special[i] else bytes(text) for i, text in enumerate(token_bytes)]
        self.lengths = np.fromiter(map(len, texts), dtype=np.int64, count=self.size)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]
        self.bytes = np.frombuffer(b"".join(texts), dtype=np.uint8)
        digest = hashlib.sha256(b"lethe vocabulary 1\0" + self.size.to_bytes(8, "little"))
        digest.update(self.lengths.tobytes() + self.special.tobytes() + self.bytes.tobytes())
        self.fingerprint = digest.hexdigest()

    def text_of(self, token_ids: Sequence[int]) -> bytes:
        """The bytes that these tokens add to a text."""
        return b"".join(self.bytes[self.starts[i] : self.starts[i] + self.lengths[i]].tobytes() for i in token_ids)

    def padded_bytes(self, token_ids: np.ndarray) -> np.ndarray:
        """[N, L] int64 bytes of the given tokens, ABSENT after each one's end; L is the longest of them."""
        lengths = self.lengths[token_ids]
        offsets = np.arange(lengths.max(initial=1))
        inside = offsets < lengths[:, None]
        values = self.bytes[np.where(inside, self.starts[token_ids][:, None] + offsets, 0)].astype(np.int64)
        return np.where(inside, values, ABSENT)

    @functools.cached_property
    def folded(self) -> SortedTokens:
        """The vocabulary with letter case folded."""
        return self._sort(fold_case=True)

    @functools.cached_property
    def unfolded(self) -> SortedTokens:
        """The vocabulary as it is, for phrases whose letter case matters."""
        return self._sort(fold_case=False)

    def warm(self) -> None:
        """Build the tables that everybody needs now, about two seconds, rather than when somebody waits."""
        word_table()
        assert self.folded

    def sorted_tokens(self, fold_case: bool) -> SortedTokens:
        return self.folded if fold_case else self.unfolded

    def _sort(self, fold_case: bool) -> SortedTokens:
        token_ids = np.flatnonzero(self.lengths > 0)
        text = torch.from_numpy(self.padded_bytes(token_ids))
        raw_symbols, kept = (part.numpy() for part in decode_symbols(text))
        # Close the gaps left by continuation bytes: kept symbols first, in order.
        order = np.argsort(~kept, axis=1, kind="stable")
        lengths = kept.sum(axis=1).astype(np.int32)
        width = int(lengths.max(initial=1))
        compact = np.take_along_axis(np.where(kept, raw_symbols, 0), order, axis=1)[:, :width]
        inside = np.arange(width) < lengths[:, None]
        symbols = np.where(inside, fold_table(fold_case)[compact], ABSENT).astype(np.int32)

        # Big-endian and shifted by one, so that byte strings sort as the symbols do and a shorter token comes first.
        rows = np.ascontiguousarray((symbols + 1).astype(">u4")).view(f"S{4 * width}").ravel()
        by_text = np.argsort(rows, kind="stable")
        token_ids, symbols, lengths = token_ids[by_text], symbols[by_text], lengths[by_text]

        hashes = np.zeros((len(token_ids), width + 1), dtype=np.uint64)
        base = powers(2)[1]
        with np.errstate(over="ignore"):
            for k in range(width):
                present = k < lengths
                step = hashes[:, k] * base + symbol_hashes()[np.where(present, symbols[:, k], 0)]
                hashes[:, k + 1] = np.where(present, step, hashes[:, k])

        same = symbols[1:] == symbols[:-1]
        common = np.where(same.all(axis=1), width, same.argmin(axis=1))  # symbols shared with the token before
        keys, lows, highs = [], [], []
        for k in range(1, width + 1):
            first_of_group = np.flatnonzero(np.concatenate([[True], common < k]))
            ends = np.append(first_of_group[1:], len(token_ids))
            long_enough = lengths[first_of_group] >= k
            lows.append(first_of_group[long_enough])
            highs.append(ends[long_enough])
            keys.append(hashes[lows[-1], k])
        all_keys = np.concatenate(keys)
        by_key = np.argsort(all_keys, kind="stable")
        return SortedTokens(
            token_ids=token_ids,
            symbols=symbols,
            lengths=lengths,
            prefix_hashes=hashes,
            prefix_keys=all_keys[by_key],
            prefix_low=np.concatenate(lows)[by_key],
            prefix_high=np.concatenate(highs)[by_key],
        )
