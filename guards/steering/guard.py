"""The last line of steering: rows of requests that should have been steered and were not may say nothing.

Steering itself happens inside the network, see `serve.engine.steer_hooks`. Covered here: artifacts that are not loaded, embeddings
that were not corrupted although their plan says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from guards.closing import close_rows_
from guards.types import Plan, Rows


class SteeringGuard:
    """A LogitsGuard.

    Args:
        has_text: [V] bool, whether a token is text that a reader would see.
        able: whether the network does for a plan what it says.
    """

    def __init__(self, has_text: Tensor, able: Callable[[Plan], bool]) -> None:
        self._has_text = has_text
        self._able = able

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Close rows, in place: [R, V]."""
        unable = [plan.changes_cache and not self._able(plan) for plan in plans]
        if any(unable):
            closed = rows.plan.new_tensor([*unable, False])[rows.plan]
            close_rows_(logits, closed.nonzero().squeeze(1), self._has_text)
        return logits
