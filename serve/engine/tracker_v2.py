"""Model Runner V2's tracker (GPUs with Triton): a ModelState that fills the rows' tags before the forward pass.

``forward`` may be replayed from a CUDA graph without any Python, so nothing is decided there: tags are written into one persistent
buffer of fixed address, and the output is as wide with guards engaged as without.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from serve.engine.attention import PagedBatch
from serve.engine.engine_guards import EngineGuards
from serve.engine.graphs_v2 import keep_two_graphs
from serve.engine.slots import TAG_DIGITS
from serve.protocol.wire import decode_plan

TAGS = "lethe_tags"
"""The keyword under which ``GuardedModel.forward`` takes the tags."""


class TrackerV2:
    """Mixed in before the model's own state class, see `tracked`."""

    guards: EngineGuards

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        self._track(
            cast("EngineGuards", model.lethe),
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.dtype,
            device,
        )

    def _track(self, guards: EngineGuards, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.guards = guards
        self.guards.tracked = True
        keep_two_graphs()
        self._slot_of: dict[str, int] = {}
        self._tags = torch.zeros((max_tokens, TAG_DIGITS), dtype=dtype, device=device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self._release(new_req_data.req_id)
        params = new_req_data.sampling_params
        plan = decode_plan(params.extra_args if params is not None else None)
        if plan is not None and plan.engages:
            prompt, known = new_req_data.prompt_token_ids, new_req_data.prefill_token_ids or []
            self.guards.load(plan)
            output = known[len(prompt) :] if prompt is not None else []
            self._slot_of[new_req_data.req_id] = self.guards.slots.admit(plan, prompt, output)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)  # type: ignore[misc]
        self._release(req_id)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        lengths = input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs]
        self.guards.step.pages = PagedBatch(attn_groups, block_tables, lengths)
        made: dict[str, Any] = super().prepare_attn(  # type: ignore[misc]
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
        )
        return made

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]
        tags = self._tags[: input_batch.num_tokens_after_padding]
        if self.guards.slots.engaged:
            # By request id: the ids of dummy batches are nobody's, so they can touch no slot.
            requests = tuple(self._slot_of.get(req_id, -1) for req_id in input_batch.req_ids)
            starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
            ids, positions = (each[: len(tags)] for each in (input_batch.input_ids, input_batch.positions))
            tags.copy_(self.guards.enter(requests, starts, ids, positions, tags.dtype))
            self.guards.step.rotary = inputs.get("positions")
        else:
            self.guards.step.clear()
            tags.zero_()
        self.guards.steering.begin(input_batch.input_ids[: len(tags)], input_batch.positions[: len(tags)])
        return {**inputs, TAGS: tags}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]
        self.guards.steering.clear()
        return {**inputs, TAGS: self._tags[:num_tokens]}

    def _release(self, req_id: str) -> None:
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self.guards.slots.release(slot)


def tracked(base: type[ModelState]) -> type[ModelState]:
    """The model's own state class, with the tracker in front."""
    return type(f"Tracked{base.__name__}", (TrackerV2, base), {})
