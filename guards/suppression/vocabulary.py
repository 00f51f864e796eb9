"""A tokenizer's vocabulary as symbols, sorted, so that "all tokens that start with this text" is one contiguous range."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from guards.errors import VocabularyMismatch
from guards.suppression.elements import ABSENT, BREAK, RAW, elements_of_bytes, join_bytes
from guards.suppression.folding import CONTEXTS, MARK, MOST_SYMBOLS, WHITE, Folding, folding, powers, symbol_hashes


@dataclass(frozen=True, eq=False)
class Forms:
    """What tokens are read as, F of them, as symbols."""

    token_ids: np.ndarray  # [F] int64
    symbols: np.ndarray  # [F, L] int32, ABSENT after the end
    lengths: np.ndarray  # [F] int64, symbols
    opens: np.ndarray  # [F, L] bool, whether a character starts with this symbol
    closes: np.ndarray  # [F, L] bool, whether a character ends with this symbol
    hashes: np.ndarray  # [F, L + 1] uint64, of the first k symbols

    @staticmethod
    def of(by: Folding, elements: np.ndarray, owner: np.ndarray) -> Forms:
        """Forms of texts that are given one after the other: [E] elements that count, and the token of each, ascending."""
        symbols, element = by.expand(elements)
        token_ids, row, lengths = np.unique(owner[element], return_inverse=True, return_counts=True)
        width = int(lengths.max(initial=1))
        place = np.arange(len(symbols)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        matrix = np.full((len(token_ids), width), ABSENT, dtype=np.int32)
        opens, closes = np.zeros(matrix.shape, dtype=bool), np.zeros(matrix.shape, dtype=bool)
        matrix[row, place] = symbols
        change = np.flatnonzero(np.diff(element, prepend=-1, append=-1))
        opens[row[change[:-1]], place[change[:-1]]] = True
        closes[row[change[1:] - 1], place[change[1:] - 1]] = True
        hashes = np.zeros((len(token_ids), width + 1), dtype=np.uint64)
        with np.errstate(over="ignore"):
            for k in range(width):
                step = hashes[:, k] * powers(2)[1] + symbol_hashes()[matrix[:, k]]
                hashes[:, k + 1] = np.where(k < lengths, step, hashes[:, k])
        return Forms(token_ids, matrix, lengths, opens, closes, hashes)

    def sorted(self) -> Forms:
        """In the order of their symbols, a shorter one first; where symbols are equal, a character that ends here first."""
        # Big-endian and shifted by one, so that byte strings sort as the symbols do.
        rows = np.ascontiguousarray((self._ranks() + 1).astype(">u4")).view(f"S{4 * self.symbols.shape[1]}").ravel()
        order = np.argsort(rows, kind="stable")
        return Forms(*(each[order] for each in (self.token_ids, self.symbols, self.lengths, self.opens, self.closes, self.hashes)))

    def prefixes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hash, first row and the one after the last of every prefix that ends with a character, if `sorted`."""
        ranks, width = self._ranks(), self.symbols.shape[1]
        same = ranks[1:] == ranks[:-1]
        common = np.where(same.all(axis=1), width, same.argmin(axis=1))  # symbols shared with the row before
        keys, lows, highs = [], [], []
        for k in range(1, width + 1):
            first = np.flatnonzero(np.concatenate([[True], common < k]))
            ends = np.append(first[1:], len(ranks))
            whole = self.closes[first, k - 1]
            keys.append(self.hashes[first[whole], k])
            lows.append(first[whole])
            highs.append(ends[whole])
        return np.concatenate(keys), np.concatenate(lows), np.concatenate(highs)

    def _ranks(self) -> np.ndarray:
        inside = self.symbols != ABSENT
        return np.where(inside, 2 * self.symbols + (inside & ~self.closes), -1)


@dataclass(frozen=True, eq=False)
class FoldedTokens:
    """A vocabulary under one folding: tokens that have symbols, sorted, and every prefix of one.

    What drops out of a text depends on what stands before it: a token that begins with white space, or with an accent, begins
    with something else after white space or after a Greek letter. Such tokens have one more row for each such context, after
    the others, and their prefixes' hashes have `context_key` added there.
    """

    by: Folding
    plain: Forms  # sorted, with nothing before them
    token_ids: np.ndarray  # [N] int64, the token of each row: first those of ``plain``
    prefix_keys: np.ndarray  # [P] uint64, ascending; twice where a letter with its accent is one character or two
    prefix_low: np.ndarray  # [P] int64, first row
    prefix_high: np.ndarray  # [P] int64, one past the last
    elements: np.ndarray  # [E] int64, what the tokens are read as, one after the other, without what never counts
    starts: np.ndarray  # [V + 1] int64 into ``elements``
    blank: np.ndarray  # [V] bool, whether a token is nothing but white space
    completing: np.ndarray  # [C] int64, tokens that begin in mid-character
    most_completing: int  # symbols that one of these can add, with the character that it completes

    @staticmethod
    def of(by: Folding, elements: np.ndarray, owner: np.ndarray, size: int) -> FoldedTokens:
        """Fold all tokens, given one after the other as [E] elements and the token of each."""
        kept = by.kept(elements, owner)
        elements, owner = elements[kept], owner[kept]
        starts = np.searchsorted(owner, np.arange(size + 1))
        plain = Forms.of(by, elements, owner).sorted()
        parts, token_ids, shift = [plain.prefixes()], [plain.token_ids], len(plain.token_ids)
        first = elements[np.minimum(starts[:-1], len(elements) - 1)] if len(elements) else np.zeros(size, dtype=np.int64)
        some = starts[1:] > starts[:-1]
        for context, (before, dropped) in CONTEXTS.items():
            # Accents before one that drops out let the context reach it.
            changing = (some & ((by.bits[first] & (dropped | (0 if context == WHITE else MARK))) != 0))[owner]
            left = by.kept(elements[changing], owner[changing], before)
            if not left.all() and left.any():
                forms = Forms.of(by, elements[changing][left], owner[changing][left]).sorted()
                keys, low, high = forms.prefixes()
                with np.errstate(over="ignore"):
                    parts.append((keys + context_key(context), low + shift, high + shift))
                token_ids.append(forms.token_ids)
                shift += len(forms.token_ids)
        keys, low, high = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        completing = np.flatnonzero(some & (first >= RAW + 0x80) & (first < RAW + 0xC0))
        longest = int(plain.lengths[np.isin(plain.token_ids, completing)].max(initial=0))
        return FoldedTokens(
            by=by,
            plain=plain,
            token_ids=np.concatenate(token_ids),
            prefix_keys=keys[order],
            prefix_low=low[order],
            prefix_high=high[order],
            elements=elements,
            starts=starts,
            blank=(np.diff(starts) == 1) & ((by.bits[first] & WHITE) != 0),
            completing=completing,
            most_completing=longest - 1 + MOST_SYMBOLS if longest else 0,
        )

    def elements_of(self, token: int) -> np.ndarray:
        return self.elements[self.starts[token] : self.starts[token + 1]]

    def completed(self, waiting: bytes, context: int) -> Forms:
        """What the tokens are read as that complete a character of which ``waiting`` has been said, the character included.

        Args:
            context: a key of `CONTEXTS`: what stands before the character; 0 for nothing.
        """
        head = [RAW + byte for byte in waiting]
        longest = max((len(self.elements_of(token)) for token in self.completing.tolist()), default=0)
        rows = np.full((len(self.completing), len(head) + longest), ABSENT, dtype=np.int64)
        for row, token in zip(rows, self.completing.tolist(), strict=True):
            own = self.elements_of(token)
            row[: len(head) + len(own)] = [*head, *own]
        elements, there = join_bytes(torch.from_numpy(rows))
        whole = elements[:, 0] < RAW if len(rows) else torch.zeros(0, dtype=torch.bool)
        elements, there = elements[whole], there[whole]
        owner = np.repeat(self.completing[whole.numpy()], there.sum(1).numpy())
        flat = elements[there].numpy()
        kept = self.by.kept(flat, owner, CONTEXTS[context][0] if context else BREAK)
        return Forms.of(self.by, flat[kept], owner[kept])


def context_key(context: int) -> np.uint64:
    """Added to the hashes of prefixes that tokens have only in a context, a key of `CONTEXTS`."""
    return symbol_hashes()[RAW + context]


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
        self._folded: dict[str, FoldedTokens] = {}

    def text_of(self, token_ids: Sequence[int]) -> bytes:
        """The bytes that these tokens add to a text."""
        return b"".join(self.bytes[self.starts[i] : self.starts[i] + self.lengths[i]].tobytes() for i in token_ids)

    def folded(self, by: Folding) -> FoldedTokens:
        """The tokens under a folding, made once: about a second for 50,000 tokens."""
        if by.name not in self._folded:
            self._folded[by.name] = FoldedTokens.of(by, *self._elements, self.size)
        return self._folded[by.name]

    def warm(self) -> None:
        """Make the tables that everybody needs now, a few seconds, rather than when somebody waits."""
        for match in ("folded", "number"):
            self.folded(folding(match, True))

    @functools.cached_property
    def _elements(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens' elements one after the other, and the token of each: [E] int64 both."""
        # In one long row, with a gap after each token: no character is put together across two.
        owner = np.repeat(np.arange(self.size), self.lengths + 1)
        row = np.full(len(owner), ABSENT, dtype=np.int64)
        inside = np.ones(len(owner), dtype=bool)
        inside[np.cumsum(self.lengths + 1) - 1] = False
        row[inside] = self.bytes
        elements, there = join_bytes(elements_of_bytes(torch.from_numpy(row)[None]))
        return elements[0, there[0]].numpy(), owner[there[0].numpy()]
