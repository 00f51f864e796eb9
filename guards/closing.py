"""How a guard takes tokens away, and how it closes a row that it cannot guard. In-place tensor arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def floor_of(logits: Tensor) -> float:
    """The value for banned tokens: so low that no temperature, bias or penalty lifts it, and far enough from the dtype's minimum
    that none of them makes it infinite: a row without a finite value (a grammar sets the rest to ``-inf``) would become NaN.

    float16 has no such value; the engine then computes in float32, to which vLLM's sampler converts in any case.
    """
    return max(-1e30, torch.finfo(logits.dtype).min / 4)


def lower_(logits: Tensor, row: Tensor, token: Tensor) -> None:
    """Push tokens to the floor, pairwise: row [N] int64, token [N] int64."""
    logits[row, token] = logits[row, token].clamp(max=floor_of(logits))


class RowCloser:
    """Closes rows that a guard cannot guard, and counts them by guard. One per engine.

    Args:
        has_text: [V] bool on the engine's device, whether a token is text that a reader would see.
    """

    def __init__(self, has_text: Tensor) -> None:
        self.has_text = has_text
        self.counts: dict[str, int] = {}
        """Rows closed since the start, by guard."""

    def close_(self, logits: Tensor, rows: Tensor, guard: str) -> None:
        """Leave rows nothing but tokens without text.

        Args:
            logits: [R, V] float.
            rows: [N] int64.
            guard: who could not guard them.
        """
        if not len(rows):
            return
        closed = logits[rows]
        low = closed.clamp(max=floor_of(logits))
        # If the columns do not match the vocabulary, it is not known which are text, so all are closed.
        logits[rows] = low if logits.shape[1] != len(self.has_text) else torch.where(self.has_text, low, closed)
        self.counts[guard] = self.counts.get(guard, 0) + len(rows)
