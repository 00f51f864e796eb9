"""The step: which tokens would complete a phrase, row by row, and pushing their logits to the floor.

Every step is computed from the last tokens of each row and nothing else, so preemption, reordering, prefix caching, rollback
and asynchronous scheduling have no state to corrupt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guards.closing import close_rows_, lower_
from guards.errors import VocabularyMismatch
from guards.suppression.automaton import CompiledPhrases
from guards.suppression.folding import (
    ABSENT,
    LEFT_BOUNDARY_KEY,
    decode_symbols,
    fold_table,
    powers,
    symbol_hashes,
    word_table,
)
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, UNKNOWN, Plan, Rows

SPARE_TOKENS = 16
"""How many tokens without text (special tokens inside an output) a window may hold before it counts as starved."""


@dataclass(frozen=True)
class _PhraseTable:
    """All loaded artifacts of one folding, merged: a step's cost does not depend on how many there are.

    Entry ``i`` of the ragged ``range_*`` lists belongs to artifact ``owner[i]``; entries from ``2 * num_artifacts`` on are
    those of ``keys``, the ones before are each artifact's tokens banned always and after a word boundary.
    """

    slots: dict[str, int]  # fingerprint -> artifact number
    window_bytes: int
    keys: Tensor  # [N] int64 ascending
    sieve: Tensor  # [2**b] bool, False where no key has these low bits
    owner: Tensor  # [2 * A + N] int64
    range_starts: Tensor  # [2 * A + N + 1] int64
    range_low: Tensor  # [M] int64
    range_high: Tensor  # [M] int64
    token_ids: Tensor  # [T] int64, token at each sorted position
    symbol_hash: Tensor  # [SYMBOLS] int64, of the folded symbol
    powers: Tensor  # [window_bytes + 1] int64

    @staticmethod
    def merge(artifacts: Sequence[CompiledPhrases], vocabulary: Vocabulary, device: torch.device) -> _PhraseTable:
        fold_case = artifacts[0].fold_case
        keys = np.concatenate([artifact.keys for artifact in artifacts]).view(np.int64)
        low = np.concatenate([artifact.ranges.low for artifact in artifacts]).astype(np.int64)
        high = np.concatenate([artifact.ranges.high for artifact in artifacts]).astype(np.int64)
        shift = np.cumsum([0] + [len(artifact.ranges.low) for artifact in artifacts])
        begin = [artifact.ranges.starts[:-1] + shift[i] for i, artifact in enumerate(artifacts)]
        end = [artifact.ranges.starts[1:] + shift[i] for i, artifact in enumerate(artifacts)]
        owner = [np.full(len(part), i, dtype=np.int64) for i, part in enumerate(begin)]
        order = np.argsort(keys, kind="stable")
        begins, ends, owners = (
            np.concatenate([*(part[:2] for part in parts), np.concatenate([part[2:] for part in parts])[order]])
            for parts in (begin, end, owner)
        )
        counts = ends - begins
        gather = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())

        bits = max(10, int(np.ceil(np.log2(max(1, len(keys)) * 16))))
        sieve = np.zeros(1 << bits, dtype=bool)
        sieve[keys & ((1 << bits) - 1)] = True
        window = max(artifact.window_bytes for artifact in artifacts)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return _PhraseTable(
            slots={artifact.fingerprint: i for i, artifact in enumerate(artifacts)},
            window_bytes=window,
            keys=on_device(keys[order]),
            sieve=on_device(sieve),
            owner=on_device(owners),
            range_starts=on_device(np.concatenate([[0], np.cumsum(counts)])),
            range_low=on_device(low[gather]),
            range_high=on_device(high[gather]),
            token_ids=on_device(vocabulary.sorted_tokens(fold_case).token_ids),
            symbol_hash=on_device(symbol_hashes()[fold_table(fold_case)].view(np.int64)),
            powers=on_device(powers(window + 1).view(np.int64)),
        )

    def banned(self, text: Tensor, member: Tensor, is_word: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that would complete a phrase.

        Args:
            text: [R, B] int64, each row's last bytes, right-aligned, ABSENT before them.
            member: [R, A] bool, which artifacts apply to the row.
            is_word: [SYMBOLS] bool.

        Returns:
            Row numbers and token ids, pairwise, with repetitions.
        """
        symbols, kept = decode_symbols(text)
        # Length and hash of the row's end from each position on: sums from the right.
        length = kept.flip(1).cumsum(1).flip(1)
        terms = self.symbol_hash[torch.where(kept, symbols, 0)] * self.powers[(length - 1).clamp(min=0)]
        hashes = torch.where(kept, terms, 0).flip(1).cumsum(1).flip(1)

        # A word boundary lies before a position when the symbol before it is not part of a word, or there is none.
        word = kept & is_word[torch.where(kept, symbols, 0)]
        symbol_before = torch.nn.functional.pad(_carry_right(word, kept), (1, 0))[:, :-1]
        wanted = torch.stack([hashes, hashes + LEFT_BOUNDARY_KEY])  # [2, R, B]
        sieved = self.sieve[wanted & (len(self.sieve) - 1)] & torch.stack([kept, kept & ~symbol_before])
        kind, row, column = sieved.nonzero(as_tuple=True)
        value = wanted[kind, row, column]
        first = torch.searchsorted(self.keys, value)
        matches = torch.searchsorted(self.keys, value, right=True) - first
        row, entry = _expand(row, first, matches)
        entry += 2 * len(self.slots)
        mine = member[row, self.owner[entry]]
        row, entry = row[mine], entry[mine]

        head_row, head_artifact = member.nonzero(as_tuple=True)
        at_boundary = ~_carry_right(word, kept)[:, -1]
        boundary_row, boundary_artifact = (member & at_boundary[:, None]).nonzero(as_tuple=True)
        row = torch.cat([head_row, boundary_row, row])
        entry = torch.cat([2 * head_artifact, 2 * boundary_artifact + 1, entry])

        begin = self.range_starts[entry]
        row, position = _expand(row, begin, self.range_starts[entry + 1] - begin)
        low = self.range_low[position]
        row, position = _expand(row, low, self.range_high[position] - low)
        return row, self.token_ids[position]


def _expand(row: Tensor, begin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each (row, begin, count) by (row, begin), (row, begin + 1), … count times."""
    repeated = torch.repeat_interleave(torch.arange(len(row), device=row.device), count)
    nth = torch.arange(len(repeated), device=row.device) - (count.cumsum(0) - count)[repeated]
    return row[repeated], begin[repeated] + nth


def _carry_right(value: Tensor, known: Tensor) -> Tensor:
    """[R, B] bool: at each position the value at the last known position at or before it; False if there is none."""
    position = torch.where(known, torch.arange(known.shape[1], device=known.device), -1).cummax(1).values
    return value.gather(1, position.clamp(min=0)) & (position >= 0)


class SuppressionGuard:
    """Keeps phrases out of what is sampled. A LogitsGuard.

    Covered and not covered: see the package. A row whose plan names an artifact that is not loaded, or whose window is
    starved (too many tokens without text to see far enough back) or holds an unknown token, may only produce tokens without
    text: it fails closed.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self._artifacts: dict[str, CompiledPhrases] = {}
        self._tables: list[_PhraseTable] = []
        self._is_word = torch.from_numpy(word_table()).to(device)
        self._bytes = torch.from_numpy(np.append(vocabulary.bytes, 0).astype(np.int64)).to(device)
        # One more row, all zero, for BOUNDARY (index -1).
        self._lengths = torch.from_numpy(np.append(vocabulary.lengths, 0)).to(device)
        self._ends = torch.from_numpy(np.append(vocabulary.starts + vocabulary.lengths, 0)).to(device)
        self._has_text = self._lengths[:-1] > 0

    @property
    def loaded(self) -> frozenset[str]:
        """Fingerprints of the artifacts that plans may name."""
        return frozenset(self._artifacts)

    @property
    def window_tokens(self) -> int:
        """How many token ids ``Rows.suffix`` must hold."""
        return max((table.window_bytes for table in self._tables), default=0) + SPARE_TOKENS

    def check(self, artifact: CompiledPhrases) -> None:
        """Raise VocabularyMismatch if the artifact was compiled for another tokenizer."""
        if artifact.vocabulary != self.vocabulary.fingerprint:
            raise VocabularyMismatch(
                f"artifact {artifact.fingerprint[:12]} was compiled for vocabulary {artifact.vocabulary[:12]}, "
                f"this model has {self.vocabulary.fingerprint[:12]}; build the forget set again on this server, "
                "and give every served model a LETHE_STATE_DIR of its own"
            )

    def load(self, artifacts: Sequence[CompiledPhrases]) -> None:
        """Make exactly these artifacts the loaded ones.

        Raises:
            VocabularyMismatch: one was compiled for another tokenizer. Nothing changes then.
        """
        for artifact in artifacts:
            self.check(artifact)
        tables = []
        for fold_case in (True, False):
            group = [artifact for artifact in artifacts if artifact.fold_case is fold_case]
            if group:
                tables.append(_PhraseTable.merge(group, self.vocabulary, self.device))
        self._artifacts = {artifact.fingerprint: artifact for artifact in artifacts}
        self._tables = tables

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Push banned tokens to the floor, in place.

        Args:
            logits: [R, V] float, before temperature and masks. ``-inf`` stays ``-inf``.
            rows: the step's layout; ``suffix`` holds at least `window_tokens` ids.
            plans: what ``rows.plan`` points into.
        """
        if logits.shape[1] != self.vocabulary.size:
            raise VocabularyMismatch(f"logits have {logits.shape[1]} columns, the vocabulary {self.vocabulary.size} tokens")
        engaged_plans = torch.tensor([bool(plan.suppression) for plan in plans] + [False], device=self.device)
        engaged = engaged_plans[rows.plan].nonzero().squeeze(1)
        if not len(engaged):
            return logits
        plan, suffix = rows.plan[engaged], rows.suffix[engaged]
        closed = torch.tensor([not self.loaded.issuperset(plan.suppression) for plan in plans], device=self.device)[plan]
        for table in self._tables:
            text, starved = self._text(suffix, table.window_bytes)
            closed = closed | starved
            member = torch.zeros(len(plans), len(table.slots), dtype=torch.bool)
            for i, each in enumerate(plans):
                member[i, [table.slots[name] for name in each.suppression if name in table.slots]] = True
            row, token = table.banned(text, member.to(self.device)[plan], self._is_word)
            lower_(logits, engaged[row], token)
        if closed.any():
            close_rows_(logits, engaged[closed], self._has_text)
        return logits

    def _text(self, suffix: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The last ``width`` bytes of each row, right-aligned, ABSENT before them; and which rows are starved."""
        newest_first = suffix.flip(1)
        after_boundary = (newest_first == BOUNDARY).cumsum(1) == 0
        unknown = (after_boundary & (newest_first == UNKNOWN)).any(1)
        newest_first = torch.where(after_boundary & (newest_first >= 0), newest_first, BOUNDARY)
        reach = self._lengths[newest_first].cumsum(1)  # bytes from the end of the row to each token's start
        distance = torch.arange(width, device=self.device).expand(len(suffix), width).contiguous()
        nth = torch.searchsorted(reach, distance, right=True)
        inside = nth < suffix.shape[1]
        nth = nth.clamp(max=suffix.shape[1] - 1)
        token = newest_first.gather(1, nth)
        into = distance - (reach.gather(1, nth) - self._lengths[token])
        text = torch.where(inside, self._bytes[(self._ends[token] - 1 - into).clamp(min=0)], ABSENT)
        starved = after_boundary[:, -1] & (reach[:, -1] < width)
        return text.flip(1), starved | unknown
