"""The V1 model runner's tracker (CPU, and GPUs in eager mode): a logits processor that touches no client's logits.

vLLM tells processors about every request that enters, leaves or moves in the batch, before each forward pass. That is all that
is needed to know which batch row belongs to which slot. Only requests whose plan forces their tokens (`GuardedEngineClient.score`)
have theirs replaced, after vLLM has taken their log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from serve.engine.attention import PagedBatch
from serve.engine.engine_guards import EngineGuards, guards_of
from serve.engine.seeds import repair_seeds
from serve.engine.slots import TAG_DIGITS
from serve.protocol.wire import decode_plan


class TrackerV1(LogitsProcessor):
    """Keeps `EngineGuards.requests` true."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.guards = guards_of(vllm_config)
        self.guards.tracked = True
        if self.guards.device.type == "cpu":
            repair_seeds()
        self._slot_of_row = [-1] * (vllm_config.scheduler_config.max_num_seqs + 1)
        self.guards.requests = ()
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
            moving, displaced = self._slot_of_row[source], self._slot_of_row[target]
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
        self.guards.requests = tuple(self._slot_of_row[: batch_update.batch_size])

    def _vacate(self, row: int) -> None:
        self._forced.pop(row, None)
        slot = self._slot_of_row[row]
        if slot >= 0:
            self.guards.slots.release(slot)
            self._slot_of_row[row] = -1


def tags_of_context(guards: EngineGuards, input_ids: Tensor, positions: Tensor) -> Tensor:
    """[T, TAG_DIGITS] what the tokens' rows carry. V1 tells no model of its batch, but leaves its metadata in the context."""
    metadata, dtype = get_forward_context().attn_metadata, torch.float32
    if not guards.slots.engaged or metadata is None:  # nobody is guarded, or nothing is computed for anybody
        guards.step.clear()
        return torch.zeros((len(positions), TAG_DIGITS), dtype=dtype, device=guards.device)
    if not isinstance(metadata, dict):
        return guards.lose_track(len(positions), dtype, "it runs in micro-batches; start without --enable-dbo")
    starts = getattr(next(iter(metadata.values()), None), "query_start_loc", None)
    known = None if guards.requests is None else len(guards.requests)
    if starts is None and guards.runner is not None:  # a backend that does not keep it
        starts = guards.runner.query_start_loc.gpu[: guards.runner.input_batch.num_reqs + 1]
    if starts is None or guards.requests is None or known != len(starts) - 1:
        there = "an unknown number of" if starts is None else len(starts) - 1
        return guards.lose_track(len(positions), dtype, f"the batch has {there} requests, the tracker knows {known}")
    if guards.runner is not None:
        count, paged = len(guards.requests), guards.runner.input_batch.block_table
        tables = [paged[group].get_device_tensor(count) for group in range(len(guards.runner.attn_groups))]
        guards.step.pages = PagedBatch(guards.runner.attn_groups, tables, guards.runner.optimistic_seq_lens_cpu[:count])
    return guards.enter(guards.requests, starts, input_ids, positions, dtype)
