"""The guarded model: any of vLLM's generating models, with the guards inside ``forward`` and ``compute_logits``.

The class is made from the base's own class when it is asked for by name (``LetheLlamaForCausalLM`` is made from
``LlamaForCausalLM``), so every family that vLLM can serve is covered by the same few lines. Weights, attention, LoRA,
quantisation and parallelism remain the base's business.

Covered: every logit that vLLM computes for a request, sampled or not. Not covered, and refused at start-up: speculative decoding,
and execution paths that bypass ``compute_logits`` (batch-sharded sampling).
"""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.registry import ModelRegistry
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_tokenizer_from_config

from guards.suppression.mask import SuppressionGuard
from guards.types import Plan
from serve.engine.artifacts import ArtifactCache
from serve.engine.slots import TAG_DIGITS, SlotTable
from serve.vocabulary import vocabulary_of
from serve.wire import ARTIFACTS_KEY, PLAN_KEY

PREFIX = "Lethe"
"""Put before a base architecture's name to ask for its guarded form."""


class EngineGuards:
    """Everything of ours in one worker: the guards, their artifacts and the slots. One per engine, see `guards_of`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "lethe cannot guard speculative decoding (drafted tokens would bypass the guards); "
                "start without --speculative-config"
            )
        settings = (vllm_config.additional_config or {}).get(PLAN_KEY)
        if settings is None:
            raise ValueError("a guarded model must be started by `lethe serve`: additional_config has no 'lethe' entry")
        self.vllm_config = vllm_config
        self.device = torch.device(vllm_config.device_config.device)
        self.vocabulary = vocabulary_of(cached_tokenizer_from_config(model), model.get_vocab_size())
        self.vocabulary.warm()
        self.suppression = SuppressionGuard(self.vocabulary, self.device)
        self.artifacts = ArtifactCache(Path(settings[ARTIFACTS_KEY]), self.suppression)
        self.slots = SlotTable(vllm_config.scheduler_config.max_num_seqs, model.max_model_len, self.vocabulary.special, self.device)
        self.tracked = False
        """Set by the tracker. Without one no plan would ever reach a row, so the API process refuses to start."""
        self.rows_of_batch: Tensor | None = None
        """V1 only, set by its tracker before every step: [num_reqs] int64, slot of each batch row, -1 = unguarded."""

    def load(self, plan: Plan) -> None:
        """Make sure that a plan's artifacts are loaded before its request's first row."""
        in_use = (name for live in self.slots.live_plans for name in live.suppression)
        self.artifacts.ensure(plan.suppression, in_use)

    def apply(self, logits: Tensor, tags: Tensor) -> Tensor:
        """Run every logit guard over the rows that carried ``tags``."""
        if not self.slots.engaged:
            return logits
        rows, plans = self.slots.rows(tags, self.suppression.window_tokens)
        return self.suppression.apply(logits, rows, plans)

    def tag_tokens(self, input_ids: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """V1: find each token's slot through the attention metadata of this step, and record the token.

        Raises:
            RuntimeError: the tracker did not run or disagrees with the batch. The engine stops rather than guess.
        """
        metadata = get_forward_context().attn_metadata
        if not self.slots.engaged or metadata is None:
            return torch.zeros((len(positions), TAG_DIGITS), dtype=dtype, device=self.device)
        if not isinstance(metadata, dict):
            raise RuntimeError("lethe does not support micro-batching (--enable-dbo); start without it")
        starts = next(iter(metadata.values())).query_start_loc.to(torch.int64)
        slot_of_row = self.rows_of_batch
        if slot_of_row is None or len(slot_of_row) != len(starts) - 1:
            raise RuntimeError(
                f"the batch has {len(starts) - 1} rows, lethe's tracker knows {None if slot_of_row is None else len(slot_of_row)}"
            )
        slots = torch.full((len(positions),), -1, dtype=torch.int64, device=self.device)
        covered = torch.repeat_interleave(slot_of_row, starts.diff())
        slots[: len(covered)] = covered
        self.slots.record(slots, positions, input_ids)
        return self.slots.tags(slots, positions, dtype)


_guards: weakref.WeakValueDictionary[str, EngineGuards] = weakref.WeakValueDictionary()


def guards_of(vllm_config: VllmConfig) -> EngineGuards:
    """The engine's guards, made on first use. The model and the tracker of one engine must meet here."""
    guards = _guards.get(vllm_config.instance_id)
    if guards is None:
        guards = _guards[vllm_config.instance_id] = EngineGuards(vllm_config)
    return guards


class GuardedModel:
    """Mixed in before a base model class. Shapes: T tokens, H hidden size, R logits rows, V vocabulary."""

    requires_raw_input_tokens = True
    """Also multimodal models must get token ids beside embeddings, or their outputs could not be read."""
    lethe: EngineGuards
    modules: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.lethe = guards_of(vllm_config)

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
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        if isinstance(hidden, IntermediateTensors):
            return hidden
        if lethe_tags is None:
            lethe_tags = self.lethe.tag_tokens(input_ids, positions, hidden.dtype)
        return torch.cat([hidden, lethe_tags], dim=-1)

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """[R, V] logits with every guard applied."""
        hidden, tags = hidden_states.split([hidden_states.shape[-1] - TAG_DIGITS, TAG_DIGITS], dim=-1)
        logits = super().compute_logits(hidden, *args, **kwargs)  # type: ignore[misc]
        return None if logits is None else self.lethe.apply(logits, tags)

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
    return type(PREFIX + base.__name__, (GuardedModel, base), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """Make ``Lethe<Architecture>`` on demand: vLLM's registry imports it from here by name."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    registered = ModelRegistry.models.get(name.removeprefix(PREFIX))
    if registered is None:
        raise AttributeError(f"vLLM has no architecture {name.removeprefix(PREFIX)!r}")
    base = getattr(importlib.import_module(registered.module_name), registered.class_name)
    made = globals()[name] = guarded_class(base)
    return made
