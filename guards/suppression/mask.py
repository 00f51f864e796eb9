"""The step: which tokens would complete a phrase, row by row.

Every step is computed from the last tokens of each row and nothing else, so preemption, reordering, prefix caching, rollback
and asynchronous scheduling have no state to corrupt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guards.suppression.artifact import CompiledPart
from guards.suppression.elements import ABSENT, RAW, join_bytes, waiting_bytes
from guards.suppression.folding import LEFT_BOUNDARY_KEY, MOST_SYMBOLS, Folding, FoldingTables, powers
from guards.suppression.vocabulary import FoldedTokens, Vocabulary
from guards.types import BOUNDARY, UNKNOWN

SPARE_TOKENS = 16
"""How many tokens without text (special tokens inside an output) a window may hold before it counts as starved."""
SPARE_ELEMENTS = 16
"""How many elements more than symbols a step looks at first: bytes of half characters, and what drops out."""
FARTHEST = 256
"""How many more it looks at where that was not enough: a longer run of white space or invisible characters starves the window."""
KEPT_COMPLETIONS = 4_096
"""Of first bytes of characters; there are no more that text in one language uses."""
_MOST_BYTES = 4
"""Of one character, each of which may be a token and so an element of its own."""


@dataclass(frozen=True, eq=False)
class _Read:
    """The ends of some rows as symbols, R rows of L positions."""

    elements: Tensor  # [R, L] int64 as the tokens have them, right-aligned, ABSENT before them
    joined: Tensor  # [R, L] int64, bytes put together
    kept: Tensor  # [R, L] bool, an element that counts starts here
    hashes: Tensor  # [R, L] int64, of the row's end from this position on
    lengths: Tensor  # [R, L] int64, its symbols
    in_word: Tensor  # [R, L + 1] bool, whether a word goes on over this position; the last column is the row's end

    def of(self, rows: Tensor) -> _Read:
        """Some rows only: [R] bool."""
        columns = (self.elements, self.joined, self.kept, self.hashes, self.lengths, self.in_word)
        return _Read(*(column[rows] for column in columns))


@dataclass(frozen=True, eq=False)
class _Completions:
    """What may follow the first bytes of a character: the ends of forms, E of them."""

    rests: Tensor  # [E] int64, hash of a form up to here
    weights: Tensor  # [E] int64, what moves a stem's hash before that
    token_ids: Tensor  # [E] int64
    alone: bool  # whether any is a phrase by itself


@dataclass(frozen=True, eq=False)
class PhraseTable:
    """All loaded artifacts' parts of one folding, merged: a step's cost does not depend on how many there are.

    Entry ``i`` of the ragged ``range_*`` lists belongs to artifact ``owner[i]``; entries from ``2 * num_artifacts`` on are
    those of ``keys``, the ones before are each artifact's tokens banned always and after a word boundary.
    """

    slots: dict[str, int]  # fingerprint -> artifact number
    by: FoldingTables
    tokens: FoldedTokens
    window: int  # symbols
    keys: Tensor  # [N] int64 ascending
    sieve: Tensor  # [2**b] bool, False where no key has these low bits
    owner: Tensor  # [2 * A + N] int64
    range_starts: Tensor  # [2 * A + N + 1] int64
    range_low: Tensor  # [M] int64
    range_high: Tensor  # [M] int64
    stem_sieve: Tensor  # [2**b] bool, the same for stems
    stem_keys: Tensor  # [S] int64 ascending
    phrase_keys: Tensor  # [P] int64 ascending, with repetitions
    phrase_owner: Tensor  # [P] int64
    token_ids: Tensor  # [T] int64, token of each row of the sorted vocabulary
    elements: Tensor  # [E + 1] int64, all tokens' elements
    element_ends: Tensor  # [V + 1] int64 into ``elements``; the last is for BOUNDARY
    element_counts: Tensor  # [V + 1] int64
    blank: Tensor  # [V + 1] bool, tokens that are white space only
    powers: Tensor  # [P] int64, for all symbols that a step may look at
    completions: dict[tuple[bytes, int], _Completions]  # (first bytes, context) -> what may follow, as far as it was needed

    @staticmethod
    def merge(by: Folding, parts: Sequence[tuple[str, CompiledPart]], vocabulary: Vocabulary, device: torch.device) -> PhraseTable:
        tokens = vocabulary.folded(by)
        keys = np.concatenate([part.keys for _, part in parts]).view(np.int64)
        low = np.concatenate([part.ranges.low for _, part in parts]).astype(np.int64)
        high = np.concatenate([part.ranges.high for _, part in parts]).astype(np.int64)
        shift = np.cumsum([0] + [len(part.ranges.low) for _, part in parts])
        begin = [part.ranges.starts[:-1] + shift[i] for i, (_, part) in enumerate(parts)]
        end = [part.ranges.starts[1:] + shift[i] for i, (_, part) in enumerate(parts)]
        owner = [np.full(len(each), i, dtype=np.int64) for i, each in enumerate(begin)]
        order = np.argsort(keys, kind="stable")
        begins, ends, owners = (
            np.concatenate([*(each[:2] for each in lists), np.concatenate([each[2:] for each in lists])[order]])
            for lists in (begin, end, owner)
        )
        counts = ends - begins
        gather = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        stems = np.unique(np.concatenate([part.stem_keys for _, part in parts])).view(np.int64)
        phrases = np.concatenate([part.phrase_keys for _, part in parts]).view(np.int64)
        phrase_order = np.argsort(phrases, kind="stable")
        phrase_owner = np.repeat(np.arange(len(parts)), [len(part.phrase_keys) for _, part in parts])
        window = max(part.window for _, part in parts)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return PhraseTable(
            slots={fingerprint: i for i, (fingerprint, _) in enumerate(parts)},
            by=by.on(device),
            tokens=tokens,
            window=window,
            keys=on_device(keys[order]),
            sieve=on_device(_sieve(keys)),
            owner=on_device(owners),
            range_starts=on_device(np.concatenate([[0], np.cumsum(counts)])),
            range_low=on_device(low[gather]),
            range_high=on_device(high[gather]),
            stem_sieve=on_device(_sieve(stems)),
            stem_keys=on_device(np.sort(stems)),
            phrase_keys=on_device(phrases[phrase_order]),
            phrase_owner=on_device(phrase_owner[phrase_order]),
            token_ids=on_device(tokens.token_ids),
            elements=on_device(np.append(tokens.elements, 0)),
            # One more row, all zero, for BOUNDARY (index -1).
            element_ends=on_device(np.append(tokens.starts[1:], 0)),
            element_counts=on_device(np.append(np.diff(tokens.starts), 0)),
            blank=on_device(np.append(tokens.blank, False)),
            powers=on_device(powers(MOST_SYMBOLS * window_widths(window)[-1] + 1).view(np.int64)),
            completions={},
        )

    def banned(self, suffix: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that would complete a phrase.

        Args:
            suffix: [R, W] int64 token ids, oldest first, as in `Rows`.
            member: [R, A] bool, which artifacts apply to the row.

        Returns:
            Row numbers and token ids, pairwise, with repetitions; and [R] bool, rows that cannot be read far enough.
        """
        rows = torch.arange(len(suffix), device=suffix.device)
        closed = torch.zeros(len(suffix), dtype=torch.bool, device=suffix.device)
        found_rows, found_tokens = [], []
        widths = window_widths(self.window)
        for width in widths:
            text, more, unknown = self._read(suffix[rows], width)
            closed[rows[unknown]] = True
            starved = more & (text.lengths[:, 0] < _wanted(self.window))
            last = width == widths[-1] or not bool(starved.any())
            done = rows if last else rows[~starved]
            if len(done):
                row, token = self._complete(text if last else text.of(~starved), member[done])
                found_rows.append(done[row])
                found_tokens.append(token)
            rows = rows[starved]
            if last:
                break
        # Digits farther apart than the widest window do not count as one number, so those rows need not be closed.
        closed[rows] |= self.by.match != "number"
        return torch.cat(found_rows), torch.cat(found_tokens), closed

    def _read(self, suffix: Tensor, width: int) -> tuple[_Read, Tensor, Tensor]:
        """The last ``width`` elements of each row; whether there is more text; and whether one of its tokens is unknown."""
        newest_first = suffix[:, -(width + SPARE_TOKENS) :].flip(1)
        after_boundary = (newest_first == BOUNDARY).cumsum(1) == 0
        unknown = (after_boundary & (newest_first == UNKNOWN)).any(1)
        newest_first = torch.where(after_boundary & (newest_first >= 0), newest_first, BOUNDARY)
        counts = self.element_counts[newest_first]
        # Of white space token after token, the first is enough.
        blank = self.blank[newest_first]
        counts[:, :-1] = torch.where(blank[:, :-1] & blank[:, 1:], 0, counts[:, :-1])
        reach = counts.cumsum(1)  # elements from the end of the row to each token's start
        distance = torch.arange(width, device=suffix.device).expand(len(suffix), width).contiguous()
        nth = torch.searchsorted(reach, distance, right=True)
        inside = nth < newest_first.shape[1]
        nth = nth.clamp(max=newest_first.shape[1] - 1)
        into = distance - (reach.gather(1, nth) - counts.gather(1, nth))
        place = self.element_ends[newest_first.gather(1, nth)] - 1 - into
        elements = torch.where(inside, self.elements[place.clamp(min=0)], ABSENT).flip(1)
        return self._fold(elements), after_boundary[:, -1] | (reach[:, -1] > width), unknown

    def _fold(self, elements: Tensor) -> _Read:
        joined, there = elements, elements != ABSENT
        if bool((elements >= RAW).any()):
            joined, there = join_bytes(elements)
        kept = self.by.kept(joined, there)
        known = torch.where(kept, joined, 0)
        counts = torch.where(kept, self.by.counts[known], 0)
        # Sums from the right: symbols from each position on, and their hash.
        lengths = counts.flip(1).cumsum(1).flip(1)
        terms = torch.where(kept, self.by.hashes[known] * self.powers[lengths - counts], 0)
        in_word = torch.nn.functional.pad(self.by.words(joined, kept), (1, 0))
        return _Read(elements, joined, kept, terms.flip(1).cumsum(1).flip(1), lengths, in_word)

    def _complete(self, text: _Read, member: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers and token ids, pairwise: tokens that complete a phrase after this text."""
        kind, row, column = self._possible(text, self.sieve)
        value = text.hashes[row, column] + kind * LEFT_BOUNDARY_KEY
        first = torch.searchsorted(self.keys, value)
        matches = torch.searchsorted(self.keys, value, right=True) - first
        row, entry = _expand(row, first, matches)
        entry += 2 * len(self.slots)
        mine = member[row, self.owner[entry]]
        row, entry = row[mine], entry[mine]

        head_row, head_artifact = member.nonzero(as_tuple=True)
        boundary_row, boundary_artifact = (member & ~text.in_word[:, -1:]).nonzero(as_tuple=True)
        row = torch.cat([head_row, boundary_row, row])
        entry = torch.cat([2 * head_artifact, 2 * boundary_artifact + 1, entry])

        begin = self.range_starts[entry]
        row, position = _expand(row, begin, self.range_starts[entry + 1] - begin)
        low = self.range_low[position]
        row, position = _expand(row, low, self.range_high[position] - low)
        token = self.token_ids[position]

        split = (text.elements[:, -1] >= RAW).nonzero().squeeze(1)
        if len(split) and len(self.tokens.completing):
            split_row, split_token = self._complete_characters(text.elements[split], member[split])
            row, token = torch.cat([row, split[split_row]]), torch.cat([token, split_token])
        return row, token

    @staticmethod
    def _possible(text: _Read, sieve: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the sieve lets a part of a phrase begin: 0, or 1 for one that may only start a word; row; position."""
        hashes = torch.stack([text.hashes, text.hashes + LEFT_BOUNDARY_KEY])  # [2, R, L]
        starts = torch.stack([text.kept, text.kept & ~text.in_word[:, :-1]])
        kind, row, column = (sieve[hashes & (len(sieve) - 1)] & starts).nonzero(as_tuple=True)
        return kind, row, column

    def _complete_characters(self, elements: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """The same for rows that end inside a character, by trying every token that completes it."""
        ends = [[each - RAW for each in row if each >= RAW] for row in elements[:, -3:].tolist()]
        heads = [waiting_bytes(end) for end in ends]
        before = torch.stack(
            [
                torch.cat([row.new_full((len(head),), ABSENT), row[: len(row) - len(head)]])
                for row, head in zip(elements, heads, strict=True)
            ]
        )
        text = self._fold(before)
        kind, row, column = self._possible(text, self.stem_sieve)
        real = _contains(self.stem_keys, text.hashes[row, column] + kind * LEFT_BOUNDARY_KEY)
        kind, row, column = kind[real], row[real], column[real]
        stems: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for each, its_row, hashed in zip(kind, row.tolist(), text.hashes[row, column], strict=True):
            stems.setdefault(its_row, []).append((hashed, each * LEFT_BOUNDARY_KEY))
        rows, tokens = [], []
        for number, (head, context) in enumerate(zip(heads, self.by.contexts(text.joined, text.kept).tolist(), strict=True)):
            if not head:
                continue
            completions = self._completions(head, context)
            if number not in stems and not completions.alone:
                continue
            # The empty stem: a phrase that begins with this character.
            nothing = torch.zeros((), dtype=torch.int64, device=elements.device)
            its_stems = [*stems.get(number, []), (nothing, nothing)]
            if not bool(text.in_word[number, -1]):
                its_stems.append((nothing, nothing + LEFT_BOUNDARY_KEY))
            found = self._after_stems(its_stems, completions, member[number])
            rows.append(torch.full_like(found, number))
            tokens.append(found)
        none = torch.zeros(0, dtype=torch.int64, device=elements.device)
        return torch.cat([none, *rows]), torch.cat([none, *tokens])

    def _completions(self, head: bytes, context: int) -> _Completions:
        known = self.completions.get((head, context))
        if known is None:
            forms = self.tokens.completed(head, context)
            form, last = np.nonzero(forms.closes)
            rests = torch.from_numpy(forms.hashes.view(np.int64)[form, last + 1]).to(self.keys.device)
            alone = _contains(self.phrase_keys, torch.cat([rests, rests + LEFT_BOUNDARY_KEY])).any()
            weights = self.powers[torch.from_numpy(last + 1).to(self.keys.device)]
            token_ids = torch.from_numpy(forms.token_ids[form]).to(self.keys.device)
            if len(self.completions) >= KEPT_COMPLETIONS:
                self.completions.clear()
            known = self.completions[head, context] = _Completions(rests, weights, token_ids, bool(alone))
        return known

    def _after_stems(self, stems: Sequence[tuple[Tensor, Tensor]], completions: _Completions, member: Tensor) -> Tensor:
        """Token ids of completions that make a phrase of a stem: (hash of a stem, what is added to the phrase's), [A] members."""
        hashes, offsets = (torch.stack(column) for column in zip(*stems, strict=True))
        whole = (hashes[:, None] * completions.weights + completions.rests + offsets[:, None]).flatten()
        first = torch.searchsorted(self.phrase_keys, whole)
        count = torch.searchsorted(self.phrase_keys, whole, right=True) - first
        which, entry = _expand(torch.arange(len(whole), device=whole.device), first, count)
        mine = which[member[self.phrase_owner[entry]]]
        return completions.token_ids[mine % max(1, len(completions.token_ids))].unique()


def _sieve(keys: np.ndarray) -> np.ndarray:
    """[2**b] bool: False where no key has these low bits."""
    bits = max(10, int(np.ceil(np.log2(max(1, len(keys)) * 16))))
    sieve = np.zeros(1 << bits, dtype=bool)
    sieve[keys & ((1 << bits) - 1)] = True
    return sieve


def _wanted(window: int) -> int:
    """Symbols to read: also the letter before a phrase, and the first bytes of a character after it."""
    return window + _MOST_BYTES


def window_widths(window: int) -> tuple[int, ...]:
    """How many elements a step looks at to find so many symbols, until it has found them."""
    whole = _MOST_BYTES * _wanted(window)
    return _wanted(window) + SPARE_ELEMENTS, whole + SPARE_ELEMENTS, whole + FARTHEST


def _contains(ascending: Tensor, values: Tensor) -> Tensor:
    if not len(ascending):
        return torch.zeros_like(values, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)] == values


def _expand(row: Tensor, begin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each (row, begin, count) by (row, begin), (row, begin + 1), … count times."""
    repeated = torch.repeat_interleave(torch.arange(len(row), device=row.device), count)
    nth = torch.arange(len(repeated), device=row.device) - (count.cumsum(0) - count)[repeated]
    return row[repeated], begin[repeated] + nth
