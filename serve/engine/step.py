"""The step: what is known of the forward pass that is under way. Written by the runner's tracker, read by whatever acts in it.

The host knows from the runner's own lists which requests are in the batch; where their tokens are stays on the device. So no
guard has to wait for the device to learn which rows concern it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.engine.attention import PagedBatch


class Step:
    """One per engine, written anew before each forward pass. Shapes: T tokens (with padding), N requests."""

    def __init__(self) -> None:
        self.pages: PagedBatch | None = None
        """Where the keys and values are; None if the runner has not said. Written before `begin`, and not cleared: it is read only
        for requests of the pass."""
        self.clear()

    def clear(self) -> None:
        """Before a pass that computes nothing for anybody, or in which nobody is guarded."""
        self.requests: Sequence[int] = ()
        """[N] slot of each request in the batch, in the order of the batch; -1 = unguarded."""
        self.starts: Tensor | None = None
        """[N] int64, the first token of each request in this pass."""
        self.offsets: Tensor | None = None
        """[N] int64, that token's position in its request."""
        self.rotary: Tensor | None = None
        """[D, T], the positions that layers are given, where they are others than those in a request (M-RoPE); else None."""
        self.slots: Tensor | None = None
        """[T] int64, the slot of each token, -1 = unguarded; None if nobody is guarded."""
        self._sampled = False

    def begin(self, requests: Sequence[int], starts: Tensor, positions: Tensor) -> Tensor:
        """Before a pass with guarded requests.

        Args:
            requests: see above. starts: [N + 1], the last is the number of tokens. positions: [T].

        Returns:
            [T] int64, the slot of each token.
        """
        self.clear()
        starts = starts.to(torch.int64)
        slot_of_request = torch.tensor(requests, dtype=torch.int64, device=positions.device)
        # Tokens of padding come after the last request's and are nobody's.
        owner = torch.searchsorted(starts[1:], torch.arange(len(positions), device=positions.device), right=True)
        self.slots = torch.cat([slot_of_request, slot_of_request.new_full((1,), -1)])[owner]
        self.requests, self.starts = requests, starts[:-1]
        self.offsets = positions[self.starts].to(torch.int64)
        return self.slots

    def requests_of_rows(self, rows: int) -> Sequence[int] | None:
        """The number in the batch of the request of each row of logits, without asking the device; None if it must be asked.

        The first rows after a pass are those of the requests' last tokens, one each.
        """
        first, self._sampled = not self._sampled, True
        return range(rows) if first and rows == len(self.requests) else None
