"""The guarded model: any of vLLM's generating models, with the guards inside ``forward`` and ``compute_logits``.

The class is made from the base's own class when it is asked for by name (``LetheLlamaForCausalLM`` is made from
``LlamaForCausalLM``), so the same few lines serve every family whose model takes these arguments (run: see the table of families in
guards/README.md). Weights, attention, LoRA and quantisation remain the base's business.

Covered: every logit that vLLM computes for a request, sampled or not. Not covered, and refused at start-up: execution paths that
bypass ``compute_logits`` (batch-sharded sampling).
"""

from __future__ import annotations

import importlib
import weakref
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.sequence import IntermediateTensors

from guards.types import AssistantLines
from serve.engine.engine_guards import EngineGuards, guards_of
from serve.engine.sites import mark
from serve.engine.slots import TAG_DIGITS
from serve.engine.stages import UNDONE, Undone
from serve.engine.tracker_v1 import tags_of_context
from serve.protocol.wire import GUARDED_PREFIX


class GuardedModel:
    """Mixed in before a base model class. Shapes: T tokens, H hidden size, R logits rows, V vocabulary."""

    requires_raw_input_tokens = True
    """Also multimodal models must get token ids beside embeddings, or their outputs could not be read."""
    lethe: EngineGuards
    modules: Any
    make_empty_intermediate_tensors: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.lethe = guards_of(vllm_config)
        self.lethe.model = weakref.ref(cast("nn.Module", self))
        if not vllm_config.model_config.enforce_eager:
            self.lethe.contrast.prepare()
            self.lethe.steering.prepare()
            mark(cast("nn.Module", self), vllm_config)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            like = torch.empty(0, dtype=vllm_config.model_config.dtype, device=self.lethe.device)
            self.lethe.steering.undone = Undone(like, vllm_config.scheduler_config.max_num_batched_tokens)
            self._make_empty = self.make_empty_intermediate_tensors
            self.make_empty_intermediate_tensors = self._make_empty_with_undone

    def _make_empty_with_undone(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        """Where vLLM puts what the stage before this one hands on."""
        empty: IntermediateTensors = self._make_empty(batch_size, dtype, device)
        return IntermediateTensors({**empty.tensors, UNDONE: torch.zeros(batch_size, 1, dtype=dtype, device=device)})

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        lethe_tags: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """[T, H + TAG_DIGITS]: the base's hidden states, each followed by the digits of its slot and position.

        The runner cuts rows out of this tensor itself, so a row cannot be mistaken for another.
        """
        if lethe_tags is None:  # V1: with V2, what is to be done was noted before the pass
            lethe_tags = tags_of_context(self.lethe, input_ids, positions)
            self.lethe.steering.begin(input_ids, positions)
        with self.lethe.steering.acting(inputs_embeds) as embeddings:
            hidden = super().forward(input_ids, positions, intermediate_tensors, embeddings, **kwargs)  # type: ignore[misc]
        before = None if intermediate_tensors is None else intermediate_tensors.tensors[UNDONE]
        if isinstance(hidden, IntermediateTensors):
            assert self.lethe.steering.undone is not None, "there are stages"
            return IntermediateTensors({**hidden.tensors, UNDONE: self.lethe.steering.undone.hand_on(len(lethe_tags), before)})
        if before is not None:
            lost = self.lethe.slots.lost_tags(1, lethe_tags.dtype)
            lethe_tags = torch.where(before > 0, lost, lethe_tags)
        return torch.cat([hidden, lethe_tags.to(hidden.dtype)], dim=-1)

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """[R, V] logits with every guard applied."""
        hidden, tags = hidden_states.split([hidden_states.shape[-1] - TAG_DIGITS, TAG_DIGITS], dim=-1)
        spoken = self.lethe.contrast.speak(tags, hidden)
        if spoken is not None:
            hidden = torch.cat([hidden, spoken.final])  # one pass through the head for both
        logits = super().compute_logits(hidden, *args, **kwargs)  # type: ignore[misc]
        if logits is None:
            return None
        lines = None
        if spoken is not None:
            logits, assistants = logits.split([len(tags), len(spoken.row)])
            lines = AssistantLines(spoken.row, spoken.entries, assistants)
        return self.lethe.apply(logits, tags, lines)

    def compute_logits_local(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("batch-sharded sampling would bypass lethe's guards; switch it off in vLLM's options")

    def get_top_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("local argmax would bypass lethe's guards; switch it off in vLLM's options")

    def get_model_state_cls(self) -> type:
        """Model Runner V2 asks the model for its per-request state: the base's own, with our tracker in front."""
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        from serve.engine.tracker_v2 import tracked

        inherited = getattr(super(), "get_model_state_cls", None)
        if inherited is not None:
            return tracked(inherited())
        unspecific = SimpleNamespace(modules=self.modules)  # what vLLM would choose for a model that does not say
        return tracked(resolve_model_state_cls(self.lethe.vllm_config, unspecific))


def guarded_class(base: type[nn.Module]) -> type[nn.Module]:
    """The guarded form of a base model class."""
    return type(GUARDED_PREFIX + base.__name__, (GuardedModel, base), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """Make ``Lethe<Architecture>`` on demand: vLLM's registry imports it from here by name."""
    if not name.startswith(GUARDED_PREFIX):
        raise AttributeError(name)
    registered = ModelRegistry.models.get(name.removeprefix(GUARDED_PREFIX))
    if registered is None:
        raise AttributeError(f"vLLM has no architecture {name.removeprefix(GUARDED_PREFIX)!r}")
    base = getattr(importlib.import_module(registered.module_name), registered.class_name)
    made = globals()[name] = guarded_class(base)
    return made
