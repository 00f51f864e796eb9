"""Everything of ours in one worker: the guards, their artifacts, and the slots that tie rows to plans.

The catalogue says which guards there are. Those that declare ``logits`` are made here by their factory; contrast and steering reach
into the network, so they have rooms of their own in the engine.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.tokenizers import cached_tokenizer_from_config

from guards.base_model import BaseModel
from guards.catalogue import GUARDS
from guards.closing import RowCloser
from guards.contrastive.declaration import Contrast
from guards.kinds import resolve
from guards.steering.declaration import Corrupt, Steer
from guards.suppression.guard import SuppressionGuard
from guards.types import ArtifactRef, AssistantLines, Plan
from serve.engine.artifacts import ArtifactCache
from serve.engine.context import Context
from serve.engine.contrast import ForkedContrast
from serve.engine.slots import SlotTable
from serve.engine.steering import SteeringInNetwork
from serve.engine.step import Step
from serve.protocol.artifacts import load_artifact
from serve.protocol.engine_rules import refuse_unguarded
from serve.protocol.vocabulary import vocabulary_of
from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, PLAN_KEY

logger = logging.getLogger(__name__)


class EngineGuards:
    """One per engine, see `guards_of`: where the model and the tracker of one engine meet."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        refuse_unguarded(vllm_config)
        settings = (vllm_config.additional_config or {}).get(PLAN_KEY)
        if settings is None:
            raise ValueError("a guarded model must be started by `lethe serve`: additional_config has no 'lethe' entry")
        self.vllm_config = vllm_config
        self.device = torch.device(vllm_config.device_config.device)
        self.vocabulary = vocabulary_of(cached_tokenizer_from_config(model), model.get_vocab_size())
        self.vocabulary.warm()
        self.slots = SlotTable(vllm_config.scheduler_config.max_num_seqs, model.max_model_len, self.vocabulary.special, self.device)
        self.step = Step()
        self.tracked = False
        """Set by the tracker. Without one no plan would ever reach a row, so the API process refuses to start."""
        self.requests: Sequence[int] | None = None
        """V1 only, set by its tracker before every step: see `Step.requests`."""
        self.runner: Any = None
        """V1 only: the model runner, which keeps the block tables; set when the worker is first asked for anything."""
        self.model: weakref.ReferenceType[nn.Module] | None = None
        """The guarded model, set by itself."""
        base = None if settings[BASE_KEY] is None else BaseModel.model_validate(settings[BASE_KEY])
        self.closer = RowCloser(torch.from_numpy(self.vocabulary.lengths > 0).to(self.device))
        context = Context(self.vocabulary, self.closer, self.device, base, self._the_model, vllm_config, self.slots, self.step)
        self._context = context
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
                _agree,
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

    def unable(self) -> dict[str, str]:
        """Guards that cannot act on this model or engine, and why."""
        steering = self.steering.unable()
        reasons = {Contrast.guard: self.contrast.unable(), Steer.guard: steering, Corrupt.guard: steering}
        return {guard: reason for guard, reason in reasons.items() if reason is not None}

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

    def enter(self, requests: Sequence[int], starts: Tensor, input_ids: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Before the base, with guarded requests in the batch: note whose each token is, and what is said so far.

        Args:
            requests, starts, positions: see `Step.begin`. input_ids: [T].

        Returns:
            [T, TAG_DIGITS] what the tokens' rows carry.
        """
        try:
            slots = self.step.begin(requests, starts, positions)
            self.slots.record(slots, positions, input_ids)
            return self.slots.tags(slots, positions, dtype)
        except Exception as error:
            logger.exception("lethe: a step's tokens cannot be noted")
            self._context.stop_unless_alone()
            return self.lose_track(len(positions), dtype, str(error))

    def lose_track(self, tokens: int, dtype: torch.dtype, reason: str) -> Tensor:
        """For a step whose tokens cannot be assigned to requests: [T, TAG_DIGITS] tags that close all of its rows."""
        logger.error("lethe: the rows of a step cannot be assigned to requests, so all are closed: %s", reason)
        self.step.clear()
        self.steering.spoil(self.slots.live_plans)
        self.slots.lose()
        return self.slots.lost_tags(tokens, dtype)

    def apply(self, logits: Tensor, tags: Tensor, lines: AssistantLines | None = None) -> Tensor:
        """Run every logit guard over the rows that carried ``tags``. ``lines``: what assistants said about them.

        If a guard fails, the rows that it was to guard are closed and counted, and the engine goes on.
        """
        if not self.slots.engaged:
            return logits
        if logits.dtype is torch.float16:
            logits = logits.float()  # its range has no room for the floor
        try:
            rows, plans = self.slots.rows(tags, self.suppression.window_tokens)
            rows = replace(rows, lines=lines)
        except Exception:
            logger.exception("lethe: a step's rows cannot be read; all of them are closed")
            self._context.stop_unless_alone()
            self.closer.close_(logits, torch.arange(len(logits), device=logits.device), "engine")
            return logits
        for name, guard in self._guards.items():
            try:
                changed = guard.apply(logits, rows, plans)
                if changed.shape != logits.shape:
                    raise ValueError(f"it made logits of {list(changed.shape)} out of {list(logits.shape)}")
                logits = changed
            except Exception:
                logger.exception("lethe: guard %s failed; the rows that it was to guard are closed", name)
                self._context.stop_unless_alone()
                wanted = [any(each in _ENTRIES_OF.get(name, (name,)) for each in plan.guards) for plan in plans]
                closed = torch.tensor([*wanted, False], device=rows.plan.device)[rows.plan]
                self.closer.close_(logits, closed.nonzero().squeeze(1), name)
        self.closer.close_(logits, self.slots.lost(tags), "engine")
        return logits


def _agree(worked: Sequence[bool]) -> list[bool]:
    """What worked in every process that shares the model's layers. All must act alike, or some would wait for the others.

    Stages of a pipeline do not vote, see `serve.engine.stages`.
    """
    group = get_tp_group()
    votes = torch.tensor(worked, dtype=torch.int32)
    if group.world_size > 1:
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return votes.bool().tolist()


_ENTRIES_OF = {"steering": (Steer.guard, Corrupt.guard)}
"""Guards of the engine that act for entries of another name than their own."""

_guards: weakref.WeakValueDictionary[str, EngineGuards] = weakref.WeakValueDictionary()


def guards_of(vllm_config: VllmConfig) -> EngineGuards:
    """The engine's guards, made on first use. The model and the tracker of one engine must meet here."""
    guards = _guards.get(vllm_config.instance_id)
    if guards is None:
        guards = _guards[vllm_config.instance_id] = EngineGuards(vllm_config)
    return guards
