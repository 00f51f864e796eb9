"""The V1 model runner's tracker (CPU, and GPUs in eager mode): a logits processor that touches no client's logits.

vLLM tells processors about every request that enters, leaves or moves in the batch, before each forward pass. That is all that
is needed to know which batch row belongs to which slot. Only requests whose plan forces their tokens (`GuardedEngineClient.score`)
have theirs replaced, after vLLM has taken their log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from serve.engine.engine_guards import guards_of
from serve.engine.seeds import repair_seeds
from serve.protocol.wire import decode_plan


class TrackerV1(LogitsProcessor):
    """Keeps `EngineGuards.rows_of_batch` true."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.guards = guards_of(vllm_config)
        self.guards.tracked = True
        if self.guards.device.type == "cpu":
            repair_seeds()
        self._slot_of_row = torch.full((vllm_config.scheduler_config.max_num_seqs + 1,), -1, dtype=torch.int64)
        self.guards.rows_of_batch = self._slot_of_row[:0].to(self.guards.device)
        self._forced: dict[int, tuple[tuple[int, ...], list[int]]] = {}  # row -> what it is made to say, what it has said

    def is_argmax_invariant(self) -> bool:
        # "True" would let vLLM skip this processor when every request samples greedily.
        return False

    def apply(self, logits: Tensor) -> Tensor:
        for row, (tokens, output) in self._forced.items():
            if row < len(logits) and len(output) < len(tokens):
                logits[row] = -torch.inf
                logits[row, tokens[len(output)]] = 0.0
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._vacate(row)
        for row, params, prompt, output in batch_update.added:
            self._vacate(row)
            plan = decode_plan(params.extra_args)
            if plan is not None and plan.forced:
                self._forced[row] = plan.forced, output
            if plan is not None and plan.engages:
                self.guards.load(plan)
                self._slot_of_row[row] = self.guards.slots.admit(plan, prompt, output)
        for source, target, direction in batch_update.moved:
            moving, displaced = int(self._slot_of_row[source]), int(self._slot_of_row[target])
            if direction is MoveDirectionality.SWAP:
                self._slot_of_row[source] = displaced
            else:
                self._vacate(target)
                self._slot_of_row[source] = -1
            self._slot_of_row[target] = moving
            there = self._forced.pop(target, None)
            if (here := self._forced.pop(source, None)) is not None:
                self._forced[target] = here
            if there is not None and direction is MoveDirectionality.SWAP:
                self._forced[source] = there
        self.guards.rows_of_batch = self._slot_of_row[: batch_update.batch_size].to(self.guards.device, copy=True)

    def _vacate(self, row: int) -> None:
        self._forced.pop(row, None)
        slot = int(self._slot_of_row[row])
        if slot >= 0:
            self.guards.slots.release(slot)
            self._slot_of_row[row] = -1
