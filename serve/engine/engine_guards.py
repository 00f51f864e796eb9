"""Everything of ours in one worker: the guards, their artifacts, and the slots that tie rows to plans.

The catalogue says which guards there are. Those that declare ``logits`` are made here by their factory; contrast and steering reach
into the network, so they have rooms of their own in the engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.tokenizers import cached_tokenizer_from_config

from guards.base_model import BaseModel
from guards.catalogue import GUARDS
from guards.kinds import resolve
from guards.suppression.guard import SuppressionGuard
from guards.types import ArtifactRef, AssistantLines, Plan
from serve.engine.artifacts import ArtifactCache
from serve.engine.context import Context
from serve.engine.contrast import ForkedContrast
from serve.engine.slots import TAG_DIGITS, SlotTable
from serve.engine.steering import SteeringInNetwork
from serve.protocol.artifacts import load_artifact
from serve.protocol.vocabulary import vocabulary_of
from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, PLAN_KEY


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
        self.slots = SlotTable(vllm_config.scheduler_config.max_num_seqs, model.max_model_len, self.vocabulary.special, self.device)
        self.tracked = False
        """Set by the tracker. Without one no plan would ever reach a row, so the API process refuses to start."""
        self.rows_of_batch: Tensor | None = None
        """V1 only, set by its tracker before every step: [num_reqs] int64, slot of each batch row, -1 = unguarded."""
        self.model: weakref.ReferenceType[nn.Module] | None = None
        """The guarded model, set by itself."""
        base = None if settings[BASE_KEY] is None else BaseModel.model_validate(settings[BASE_KEY])
        has_text = torch.from_numpy(self.vocabulary.lengths > 0).to(self.device)
        context = Context(self.vocabulary, has_text, self.device, base, self._the_model, vllm_config, self.slots)
        self.contrast, self.steering = ForkedContrast(context), SteeringInNetwork(context)
        self._guards: dict[str, Any] = {"steering": self.steering, "contrast": self.contrast}
        """By name, in the order in which logits pass through them: suppression has the last word, see `guards.catalogue.OWN`."""
        for kind in GUARDS.values():
            if kind.logits:
                self._guards[kind.name] = resolve(kind.logits)(context)
        suppression = self._guards["suppression"]
        assert isinstance(suppression, SuppressionGuard), "the catalogue says so"
        self.suppression = suppression
        directory = Path(settings[ARTIFACTS_KEY])
        self._artifacts = {
            kind.name: ArtifactCache[Any](
                partial(self._read, directory, kind.name),
                self._guards[kind.name].load,
            )
            for kind in GUARDS.values()
            if kind.files is not None and kind.name in self._guards
        }

    def load(self, plan: Plan) -> None:
        """Make sure that a plan's artifacts are loaded before its request's first row."""
        self.steering.admit(plan, self.ensure(plan.artifacts))

    def ensure(self, artifacts: Iterable[ArtifactRef]) -> dict[str, str]:
        """Load artifacts. Returns the failures: fingerprint -> reason."""
        wanted: dict[str, list[str]] = {}
        for guard, fingerprint in artifacts:
            wanted.setdefault(guard, []).append(fingerprint)
        failures: dict[str, str] = {}
        for guard, fingerprints in wanted.items():
            # Looked at only if something is loaded: this happens within a step, for every request that comes.
            failures |= self._artifacts[guard].ensure(fingerprints, self._in_use(guard))
        return failures

    def _in_use(self, guard: str) -> Iterator[str]:
        entry = GUARDS[guard].entry
        assert entry is not None, "a guard of the engine has entries"
        return (name for plan in self.slots.live_plans for name in plan.artifacts_of(entry))

    def _read(self, directory: Path, guard: str, fingerprint: str) -> Any:
        """Raises GuardError."""
        found = load_artifact(directory, ArtifactRef(guard, fingerprint))
        self._guards[guard].check(found)
        return found

    def _the_model(self) -> nn.Module:
        model = self.model() if self.model is not None else None
        assert model is not None, "the model is made before anything is loaded"
        return model

    def begin_steering(self, input_ids: Tensor | None, positions: Tensor, embeddings: Tensor | None) -> Tensor | None:
        """Before the base: [T, H] embeddings to start from, or None for its own."""
        if not self.steering.needed:
            return None
        return self.steering.begin(self.slots_of_tokens(len(positions)), input_ids, positions, embeddings)

    def apply(self, logits: Tensor, tags: Tensor, lines: AssistantLines | None = None) -> Tensor:
        """Run every logit guard over the rows that carried ``tags``. ``lines``: what assistants said about them."""
        if not self.slots.engaged:
            return logits
        if logits.dtype is torch.float16:
            logits = logits.float()  # its range has no room for the floor
        rows, plans = self.slots.rows(tags, self.suppression.window_tokens)
        rows = replace(rows, lines=lines)
        for guard in self._guards.values():
            logits = guard.apply(logits, rows, plans)
        return logits

    def tag_tokens(self, input_ids: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """V1: find each token's slot through the attention metadata of this step, and record the token.

        Raises:
            RuntimeError: the tracker did not run or disagrees with the batch. The engine stops rather than guess.
        """
        slots = self.slots_of_tokens(len(positions))
        if slots is None:
            return torch.zeros((len(positions), TAG_DIGITS), dtype=dtype, device=self.device)
        self.slots.record(slots, positions, input_ids)
        return self.slots.tags(slots, positions, dtype)

    def slots_of_tokens(self, tokens: int) -> Tensor | None:
        """V1: [T] int64 the slot of each token of this step, -1 = unguarded; None if nobody is guarded, or nothing is computed.

        Raises:
            RuntimeError: the tracker did not run or disagrees with the batch. The engine stops rather than guess.
        """
        metadata = get_forward_context().attn_metadata
        if not self.slots.engaged or metadata is None:
            return None
        if not isinstance(metadata, dict):
            raise RuntimeError("lethe does not support micro-batching (--enable-dbo); start without it")
        starts = next(iter(metadata.values())).query_start_loc.to(torch.int64)
        slot_of_row = self.rows_of_batch
        if slot_of_row is None or len(slot_of_row) != len(starts) - 1:
            raise RuntimeError(
                f"the batch has {len(starts) - 1} rows, lethe's tracker knows {None if slot_of_row is None else len(slot_of_row)}"
            )
        slots = torch.full((tokens,), -1, dtype=torch.int64, device=self.device)
        covered = torch.repeat_interleave(slot_of_row, starts.diff())
        slots[: len(covered)] = covered
        return slots


_guards: weakref.WeakValueDictionary[str, EngineGuards] = weakref.WeakValueDictionary()


def guards_of(vllm_config: VllmConfig) -> EngineGuards:
    """The engine's guards, made on first use. The model and the tracker of one engine must meet here."""
    guards = _guards.get(vllm_config.instance_id)
    if guards is None:
        guards = _guards[vllm_config.instance_id] = EngineGuards(vllm_config)
    return guards
