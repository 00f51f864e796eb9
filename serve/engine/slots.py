"""Slots: where a guarded request's plan and token history wait for its rows.

A slot is held from admission to the end of a request (or its preemption), whatever happens to its row in the batch. The history
is written as tokens pass through the forward pass, on the device and in order, so it never contains the placeholders that
asynchronous scheduling leaves in the scheduler's own lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from guards.suppression.declaration import Suppress
from guards.types import BOUNDARY, UNKNOWN, Plan, Rows

TAG_DIGITS = 5
"""Columns that a row carries: two digits of slot + 1 (0 = unguarded) and three of position, base 256, exact in bfloat16."""


class SlotTable:
    """Plans and token histories of the guarded requests in the batch.

    Args:
        max_requests: how many requests the engine may hold in one batch.
        max_tokens: the longest sequence.
        special: [V] bool, tokens that end a match where they stand in a prompt.
    """

    def __init__(self, max_requests: int, max_tokens: int, special: np.ndarray, device: torch.device) -> None:
        if max_requests + 1 >= 256**2 or max_tokens >= 256**3:
            raise ValueError(f"{max_requests} requests of {max_tokens} tokens do not fit the digits that rows carry")
        self.device = device
        self.plans: list[Plan | None] = [None] * max_requests
        self._free = list(range(max_requests - 1, -1, -1))
        self._special = special
        self._history = torch.zeros((max_requests + 1, max_tokens), dtype=torch.int32, device=device)
        self._recorded_from = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self._engaged = 0

    @property
    def engaged(self) -> bool:
        """Whether any request in the batch is guarded."""
        return self._engaged > 0

    def plan(self, slot: int) -> Plan:
        """The plan of a taken slot."""
        plan = self.plans[slot]
        assert plan is not None, f"slot {slot} is free"
        return plan

    @property
    def live_plans(self) -> list[Plan]:
        return [plan for plan in self.plans if plan is not None]

    def admit(self, plan: Plan, prompt: Sequence[int] | None, output: Sequence[int]) -> int:
        """Take a slot for a request that enters the batch, new or resumed.

        Args:
            prompt: its prompt's token ids; None when it came as embeddings, whose text nobody knows.
            output: tokens generated before a preemption; ids < 0 are not known yet.
        """
        slot = self._free.pop()
        self._engaged += 1
        if prompt is None:
            # Text that cannot be read cannot be guarded.
            plan, prompt = _closing(plan), []
        known = np.asarray([*prompt, *output], dtype=np.int32)
        prompt_end = len(prompt)
        in_prompt = np.arange(len(known)) < (prompt_end if plan.output_start is None else plan.output_start)
        # vLLM fills an unknown token with a negative number; it must read as unknown, never as a boundary.
        known = np.where(known < 0, UNKNOWN, np.where(in_prompt & self._special[np.maximum(known, 0)], BOUNDARY, known))
        row = self._history[slot]
        row.fill_(UNKNOWN)
        row[: len(known)] = torch.from_numpy(known.astype(np.int32)).to(self.device)
        self._recorded_from[slot] = prompt_end
        self.plans[slot] = plan
        return slot

    def lose(self) -> None:
        """Close all requests: their histories lack the tokens of a step, so nothing more can be guarded."""
        self.plans = [None if plan is None else _closing(plan) for plan in self.plans]

    def release(self, slot: int) -> None:
        self.plans[slot] = None
        self._free.append(slot)
        self._engaged -= 1

    def record(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write the output tokens that are about to be computed into their requests' histories.

        Args:
            slots: [T] int64, -1 = unguarded; positions, token_ids: [T].
        """
        output = (slots >= 0) & (positions >= self._recorded_from[slots.clamp(min=0)])
        # Selecting output tokens would wait for the device: all are written, the others to the last row, which is never read.
        row = torch.where(output, slots, len(self.plans))
        self._history[row, positions] = torch.where(token_ids < 0, UNKNOWN, token_ids).to(torch.int32)

    def tags(self, slots: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, TAG_DIGITS] digits for the rows to carry."""
        number = torch.where(slots >= 0, slots + 1, 0)
        position = torch.where(slots >= 0, positions, 0)
        digits = [number >> 8, number & 255, position >> 16, (position >> 8) & 255, position & 255]
        return torch.stack(digits, dim=-1).to(dtype)

    @staticmethod
    def read(tags: Tensor) -> tuple[Tensor, Tensor]:
        """Slot (-1 = unguarded) and position of the rows that carried ``tags``: [R] int64 each."""
        digits = tags.to(torch.int64)
        slot = digits[:, 0] * 256 + digits[:, 1] - 1
        return slot, (digits[:, 2] * 256 + digits[:, 3]) * 256 + digits[:, 4]

    def lost_tags(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """[T, TAG_DIGITS] for tokens that cannot be assigned to requests: a slot that does not exist."""
        slots = torch.full((tokens,), len(self.plans), dtype=torch.int64, device=self.device)
        return self.tags(slots, torch.zeros_like(slots), dtype)

    def rows(self, tags: Tensor, window: int) -> tuple[Rows, list[Plan]]:
        """The layout of the rows that carried ``tags``: [R, TAG_DIGITS]. Lost rows are unguarded here, see `lost`."""
        slot, position = self.read(tags)
        index = position[:, None] + torch.arange(1 - window, 1, device=self.device)
        known = slot.clamp(min=0, max=len(self.plans) - 1)
        suffix = self._history[known[:, None], index.clamp(min=0)].to(torch.int64)
        suffix = torch.where(index < 0, BOUNDARY, suffix)
        numbers: dict[int, int] = {}
        plans: list[Plan] = []
        for i, plan in enumerate(self.plans):
            if plan is not None:
                numbers[i] = len(plans)
                plans.append(plan)
        plan_of = torch.full((len(self.plans) + 2,), -1, dtype=torch.int64)  # the last is for -1, the one before for lost rows
        plan_of[list(numbers)] = torch.tensor(list(numbers.values()), dtype=torch.int64)
        return Rows(plan=plan_of.to(self.device)[slot], suffix=suffix), plans

    def lost(self, tags: Tensor) -> Tensor:
        """[N] int64, the rows of which nobody knows whose they are, see `lost_tags`."""
        return (self.read(tags)[0] == len(self.plans)).nonzero().squeeze(1)


def _closing(plan: Plan) -> Plan:
    """A plan that names an artifact that no one has, which closes its rows."""
    return Plan(plan.revision, plan.policy, (Suppress("text-that-cannot-be-read"),))
