"""Two CUDA graphs for each size: one without steering, so that nobody pays for it, and one with.

Model Runner V2 keeps graphs for each number of active LoRAs. Without LoRA (steering does not run beside it) that number is always
0. Here 1 stands for passes with steering. A pass whose steering graphs cannot do runs without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from serve.engine.engine_guards import guards_of
from serve.protocol.wire import PLAN_KEY


class GuardedGraphs(ModelCudaGraphManager):
    """The graphs of one engine's model."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, lora_capture_cases: list[int] | None = None, **kwargs: Any) -> None:
        guarded = PLAN_KEY in (vllm_config.additional_config or {})
        self._steering = guards_of(vllm_config).steering if guarded else None
        if self._steering is not None and self._steering.has_graphs:
            lora_capture_cases = [0, 1]  # has_graphs: no LoRA has a case of its own
        super().__init__(vllm_config, *args, lora_capture_cases=lora_capture_cases, **kwargs)

    def capture(self, *args: Any, lora_capture_hook: Callable[[int, int, int], None] | None = None, **kwargs: Any) -> None:
        steering = self._steering
        if steering is None or not steering.has_graphs:
            super().capture(*args, lora_capture_hook=lora_capture_hook, **kwargs)
            if steering is not None:
                steering.captured()  # another stage may have graphs, and waits for this one
            return

        def choose(case: int, _requests: int, _tokens: int) -> None:
            steering.capture(case > 0)

        try:
            super().capture(*args, lora_capture_hook=choose, **kwargs)
        finally:
            steering.capture(False)
        steering.captured()

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, num_active_loras: int, *args: Any, **kwargs: Any
    ) -> BatchExecutionDescriptor:
        if self._steering is not None:
            case = self._steering.graphs()
            if case is None:
                return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
            num_active_loras = case or num_active_loras
        return super().dispatch(num_reqs, num_tokens, uniform_token_count, num_active_loras, *args, **kwargs)


def keep_two_graphs() -> None:
    """Let vLLM's runner make these. It asks its own module for the class, so that is where it must be."""
    model_runner.ModelCudaGraphManager = GuardedGraphs  # type: ignore[misc, assignment]
