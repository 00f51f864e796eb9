"""The last line of steering: rows of requests that should have been steered and were not may say nothing.

Steering itself happens inside the network, see `serve.engine.steer_hooks`. Covered here: artifacts that are not loaded, embeddings
that were not corrupted although their plan says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guards.closing import RowCloser
from guards.types import Plan, Rows


class SteeringGuard:
    """A LogitsGuard.

    Args:
        unable: the guard that cannot do for a plan what it says; None if all is done.
    """

    def __init__(self, closer: RowCloser, unable: Callable[[Plan], str | None]) -> None:
        self._closer = closer
        self._unable = unable

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Close rows, in place: [R, V]."""
        unable = [self._unable(plan) if plan.changes_cache else None for plan in plans]
        for guard in filter(None, set(unable)):
            closed = torch.tensor([*(each == guard for each in unable), False], device=rows.plan.device)[rows.plan]
            self._closer.close_(logits, closed.nonzero().squeeze(1), guard)
        return logits
