"""What a guard of the engine may know of it. Guards on logits need the first three (`guards.kinds.EngineContext`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig

from guards.base_model import BaseModel
from guards.closing import RowCloser
from guards.suppression.vocabulary import Vocabulary
from serve.engine.slots import SlotTable
from serve.engine.step import Step

NO_BASE = "the served model's directory has no config.json beside *.safetensors, or is of a kind that takes no assistants"


def is_alone(vllm_config: VllmConfig) -> bool:
    """Whether one process runs the whole model."""
    parallel = vllm_config.parallel_config
    return parallel.tensor_parallel_size == 1 and parallel.pipeline_parallel_size == 1


@dataclass(frozen=True, slots=True)
class Context:
    """One per engine."""

    vocabulary: Vocabulary
    closer: RowCloser
    device: torch.device
    base: BaseModel | None  # the served model as artifacts name it; None if it takes none that depend on its weights
    model: Callable[[], nn.Module]  # the guarded model, once it is made
    vllm_config: VllmConfig
    slots: SlotTable
    step: Step

    def stop_unless_alone(self) -> None:
        """Called where a failure is caught: raise it again where several processes run the model, each layer or some layers.

        One of them that goes on in another way than the others would leave them waiting for it, or say other tokens; and the last
        stage of a pipeline, which closes rows, does not know what failed in an earlier one.
        """
        if not is_alone(self.vllm_config):
            raise
