"""What vLLM is given as its logits processor: one name for both of its model runners, whichever it chooses to run.

On V1 it is the tracker (`serve.engine.tracker_v1`). On V2, where the model's own state is the tracker, it only makes requests say
what their plan forces (see `serve.generation.score`); vLLM takes the log-probabilities from the guarded logits, not from these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from serve.engine.tracker_v1 import TrackerV1
from serve.protocol.wire import decode_plan


class ForcedTokens(ProcessorV2):
    """V2: touches the logits of no request but those whose plan forces their tokens, which no client can ask for."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._states = req_states
        self._forced: dict[int, tuple[int, ...]] = {}  # the runner's own index of a request -> what it is made to say

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        plan = decode_plan(sampling_params.extra_args)
        self._forced.pop(req_idx, None)
        if plan is not None and plan.forced:
            self._forced[req_idx] = plan.forced
        return req_idx in self._forced

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        if self._forced.keys().isdisjoint(ctx.idx_mapping_np.tolist()):
            return logits
        # Rows, not requests: one whose tokens are drafted has several. Waiting for the device is no matter here.
        for row, (request, position) in enumerate(zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)):
            said = position + 1 - int(self._states.prompt_len.np[request])
            if request in self._forced and 0 <= said < len(self._forced[request]):
                logits[row] = -torch.inf
                logits[row, self._forced[request][said]] = 0.0
        return logits


class LetheProcessor(ProcessorV1, ProcessorV2):
    """Creates the processor of the runner in use: the two runners call it with different arguments."""

    def __new__(cls, vllm_config: VllmConfig, *runner: Any) -> Any:
        return ForcedTokens(vllm_config, *runner) if vllm_config.use_v2_model_runner else TrackerV1(vllm_config, *runner)
