"""Attention of the fork: one query for each line over keys and values that the base has written, in whatever backend serves.

The metadata is made by the backend's own builder, from what vLLM gives every builder: a batch of decoding requests, one for each
line, with the block tables of the requests that the lines belong to. So no backend is known here by name.

Covered: backends with paged keys and values, full or with a window, and several groups of them. Not covered: layers that carry a
state instead (Mamba and its like), and decode context parallelism, which splits a request's keys.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

NO_SLOT = -1
"""vLLM's mark for a token whose key and value are written nowhere."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Where the lines of a run of the fork stand, P of them: one for each pair of a row and an assistant."""

    token: Tensor  # [P] int64, index among the tokens of the pass
    position: Tensor  # [P] int64, its position in its request
    request: Tensor  # [P] int64, number in the batch
    lengths: Tensor  # [P] int32 on the host: position + 1, or more where the host does not know exactly
    rotary: Tensor  # [P] or [D, P], the positions that layers are given: on several axes where images have some (M-RoPE)

    def part(self, start: int, stop: int) -> Lines:
        """Some of them."""
        fields = (self.token, self.position, self.request, self.lengths, self.rotary)
        return Lines(*(each[..., start:stop] for each in fields))


class _Group(Protocol):
    """vLLM's AttentionGroup: layers that share a builder and block tables."""

    layer_names: Sequence[str]

    def build_metadata(self, common_attn_metadata: CommonAttentionMetadata) -> Any: ...


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where a pass finds the keys and values of its requests, N of them, in G groups of layers."""

    groups: Sequence[Sequence[_Group]]  # [G]
    block_tables: Sequence[Tensor]  # [G] of [N, B] int32
    lengths: Tensor  # [N] int32 on the host, tokens of each request after this pass

    def metadata(self, layers: Collection[str], lines: Lines) -> dict[str, Any]:
        """A decode batch of one query for each line, for these layers, by name. Raises KeyError for a layer without pages."""
        count, device = len(lines.lengths), lines.token.device
        starts = torch.arange(count + 1, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=(lines.position + 1).to(torch.int32),
            seq_lens_cpu_upper_bound=lines.lengths,
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=int(lines.lengths.max()),
            block_table_tensor=self.block_tables[0],
            slot_mapping=torch.full((count,), NO_SLOT, dtype=torch.int64, device=device),
            is_prefilling=torch.zeros(count, dtype=torch.bool),
            positions=lines.position,
        )
        found: dict[str, Any] = {}
        for groups, table in zip(self.groups, self.block_tables, strict=True):
            for group in groups:
                if mine := set(layers).intersection(group.layer_names):
                    made = group.build_metadata(common.replace(block_table_tensor=table[lines.request].contiguous()))
                    found |= dict.fromkeys(mine, made)
        if missing := set(layers) - found.keys():
            raise KeyError(f"{min(missing)} has no keys and values in pages")
        return found
