"""Everything of ours in one worker: the guards, their artifacts, and the slots that tie rows to plans."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.tokenizers import cached_tokenizer_from_config

from guards.suppression.mask import SuppressionGuard
from guards.types import Plan
from serve.engine.artifacts import ArtifactCache
from serve.engine.slots import TAG_DIGITS, SlotTable
from serve.vocabulary import vocabulary_of
from serve.wire import ARTIFACTS_KEY, PLAN_KEY


class EngineGuards:
    """One per engine, see `guards_of`: where the model and the tracker of one engine meet."""

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
        if model.uses_mrope:
            raise ValueError(
                f"lethe does not support multi-axis positions (M-RoPE) yet, which {model.model} uses; serve another model"
            )
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
        if logits.dtype is torch.float16:
            logits = logits.float()  # its range has no room for the floor
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
