"""Everything of ours in one worker: the guards, their artifacts, and the slots that tie rows to plans."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.tokenizers import cached_tokenizer_from_config

from guards.base_model import BaseModel
from guards.contrastive.assistant import Assistant
from guards.contrastive.guard import ContrastGuard
from guards.errors import InvalidArtifact
from guards.steering.artifact import Steering
from guards.steering.guard import SteeringGuard
from guards.suppression.automaton import CompiledPhrases
from guards.suppression.mask import SuppressionGuard
from guards.types import AssistantLines, Plan
from serve.engine.artifacts import ArtifactCache
from serve.engine.fork import LateFork, Unforkable
from serve.engine.slots import TAG_DIGITS, SlotTable
from serve.engine.steer import Steerer
from serve.protocol.vocabulary import vocabulary_of
from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, PLAN_KEY, load_assistant, load_phrases, load_steering, steering_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Expected:
    """For whom assistants must speak in this step, P lines; an assistant's lines stand together."""

    assistants: tuple[str, ...]
    request: Tensor  # [P] int64, number in the batch
    slot: Tensor  # [P] int64
    nth: Tensor  # [P] int64, which entry of the plan's contrast
    last: Tensor  # [P] int64, the request's last token in this step
    bare: tuple[bool, ...]  # [P] whether the base computes for it what it computes for anybody


@dataclass(frozen=True, slots=True)
class _Spoken:
    """What the assistants said in this step, P lines."""

    slot: Tensor  # [P] int64
    position: Tensor  # [P] int64
    nth: Tensor  # [P] int64, which entry of the plan's contrast
    final: Tensor  # [P, H] hidden states, ready for the head


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
        has_text = torch.from_numpy(self.vocabulary.lengths > 0).to(self.device)
        self.contrast = ContrastGuard(has_text)
        self._never_steered: set[str] = set()
        self.unsteered = SteeringGuard(has_text, self._is_steered)
        directory = self._directory = Path(settings[ARTIFACTS_KEY])
        self._base = None if settings[BASE_KEY] is None else BaseModel.model_validate(settings[BASE_KEY])

        def read_phrases(fingerprint: str) -> CompiledPhrases:
            phrases = load_phrases(directory, fingerprint)
            self.suppression.check(phrases)
            return phrases

        def read_assistant(fingerprint: str) -> Assistant:
            assistant = load_assistant(directory, fingerprint)
            if self._base is None:
                raise InvalidArtifact(f"the served model takes no assistants, so {fingerprint[:12]} cannot be loaded")
            assistant.check(self._base)
            self._the_fork().check(assistant)
            return assistant

        def load_assistants(assistants: Mapping[str, Assistant]) -> None:
            self._the_fork().load(assistants)
            self.contrast.load(assistants)

        def read_steering(fingerprint: str) -> Steering:
            steering = load_steering(directory, fingerprint)
            if self._base is None:
                raise InvalidArtifact(f"the served model cannot be steered, so {fingerprint[:12]} cannot be loaded")
            steering.check(self._base)
            self._the_steerer().check(steering)
            return steering

        self.steering = ArtifactCache[Steering](read_steering, lambda loaded: self._the_steerer().load(loaded))
        self.phrases = ArtifactCache[CompiledPhrases](read_phrases, lambda loaded: self.suppression.load(list(loaded.values())))
        self.assistants = ArtifactCache[Assistant](read_assistant, load_assistants)
        self.slots = SlotTable(vllm_config.scheduler_config.max_num_seqs, model.max_model_len, self.vocabulary.special, self.device)
        self.tracked = False
        """Set by the tracker. Without one no plan would ever reach a row, so the API process refuses to start."""
        self.rows_of_batch: Tensor | None = None
        """V1 only, set by its tracker before every step: [num_reqs] int64, slot of each batch row, -1 = unguarded."""
        self.model: weakref.ReferenceType[nn.Module] | None = None
        """The guarded model, set by itself."""
        self._steerer: Steerer | None = None
        self._fork: LateFork | None = None
        self._fork_proved = False
        """Whether the fork has once, without assistants, given the base's own hidden states."""
        self._fork_fault: str | None = None
        self._expected: _Expected | None = None
        self._spoken: _Spoken | None = None

    def load(self, plan: Plan) -> None:
        """Make sure that a plan's artifacts are loaded before its request's first row."""
        steering = [each.artifact for each in plan.steering]
        failures = self.ensure(plan.suppression, [*(each.assistant for each in plan.contrast), *steering])
        # Blocks that were computed without it are cached under its salt: it must not be taken for loaded when it comes later.
        self._never_steered |= failures.keys() & set(steering)
        if plan.corrupt is not None and self._steerer is None:
            try:
                self._the_steerer()
            except InvalidArtifact as error:
                logger.error("lethe: %s", error)  # its rows are closed

    def ensure(self, phrases: Sequence[str], trained: Sequence[str]) -> dict[str, str]:
        """Load artifacts. Returns the failures: fingerprint -> reason.

        Args:
            trained: assistants and steering artifacts, which their files tell apart.
        """
        steering = [name for name in trained if steering_path(self._directory, name).exists()]
        assistants = [name for name in trained if name not in set(steering)]
        live = self.slots.live_plans
        failures = self.steering.ensure(steering, (each.artifact for plan in live for each in plan.steering))
        failures |= self.phrases.ensure(phrases, (name for plan in live for name in plan.suppression))
        in_use = (each.assistant for plan in live for each in plan.contrast)
        return failures | self.assistants.ensure(assistants, in_use)

    def expect_assistants(self) -> None:
        """Before the forward pass: find out for which requests assistants must speak."""
        self._spoken, self._expected = None, None
        if self._fork is None:
            return
        self._fork.expect(None)
        metadata = get_forward_context().attn_metadata
        if not self.slots.engaged or self.rows_of_batch is None or not isinstance(metadata, dict):
            return
        lines = [
            (each.assistant, request, slot, nth)
            for request, slot in enumerate(self.rows_of_batch.tolist())
            if slot >= 0
            for nth, each in enumerate(self.slots.plan(slot).contrast)
            if each.assistant in self._fork.loaded
        ]
        if not lines:
            return
        lines.sort()  # an assistant's lines stand together
        names, *numbers = zip(*lines, strict=True)
        bare = tuple(not self.slots.plan(line[2]).steering for line in lines)
        request, slot, nth = (torch.tensor(each) for each in numbers)
        last = next(iter(metadata.values())).query_start_loc[1:].long()[request] - 1
        self._fork.expect(last)
        self._expected = _Expected(names, request, slot, nth, last, bare)

    def run_assistants(self, positions: Tensor, hidden: Tensor) -> None:
        """After the base, still inside the forward pass: let the assistants speak for the last token of those requests.

        A fork that cannot follow the base is never used again. Its rows have nobody who speaks for them, so they are closed; the
        engine, and everybody else's requests, go on.

        Args:
            positions: [T] int64; hidden: [T, H] the base's own final hidden states.
        """
        if self._expected is None or self._fork is None:
            return
        lines = self._expected
        at = positions[lines.last]
        try:
            # Rows that are steered in the base's last layers are not what the bare fork gives: others prove it.
            if not self._fork_proved and any(lines.bare):
                bare = torch.tensor(lines.bare)
                again, own = self._fork.run(at, lines.request, ())[bare].float(), hidden[lines.last][bare].float()
                if not torch.allclose(again, own, rtol=0.02, atol=0.02 * float(own.abs().max())):
                    raise Unforkable(f"without assistants the fork differs from the base by {float((again - own).abs().max()):.3g}")
                self._fork_proved = True
            final = self._fork.run(at, lines.request, lines.assistants)
        except (Unforkable, RuntimeError, ValueError, TypeError, IndexError) as error:
            self._fork_fault = f"this model's layers cannot be forked: {error}"
            self._fork = None
            logger.exception("lethe: assistants are closed until the server is restarted with another model")
            return
        self._spoken = _Spoken(lines.slot, at.long(), lines.nth, final)

    def spoken_for(self, tags: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What assistants said about the rows that carried ``tags``: P lines of row [P], nth [P] and hidden state [P, H]."""
        if self._spoken is None or not self.slots.engaged:
            return None
        slot, position = self.slots.read(tags)
        same = (slot[:, None] == self._spoken.slot) & (position[:, None] == self._spoken.position)
        row, line = same.nonzero(as_tuple=True)
        return (row, self._spoken.nth[line], self._spoken.final[line]) if len(row) else None

    def _the_fork(self) -> LateFork:
        """The fork, made when the first assistant comes. Raises Unforkable."""
        if self._fork_fault is not None:
            raise Unforkable(self._fork_fault)
        if self._fork is None:
            model = self.model() if self.model is not None else None
            assert model is not None, "the model is made before anything is loaded"
            self._fork = LateFork(model, self.vllm_config)
        return self._fork

    def _is_steered(self, plan: Plan) -> bool:
        failed = self._never_steered & {each.artifact for each in plan.steering}
        return not failed and self._steerer is not None and self._steerer.able(plan)

    def _the_steerer(self) -> Steerer:
        """Made when the first artifact, or the first plan that corrupts, comes. Raises Unsteerable."""
        if self._steerer is None:
            model = self.model() if self.model is not None else None
            assert model is not None, "the model is made before anything is loaded"
            self._steerer = Steerer(model, self.vllm_config)
        return self._steerer

    def begin_steering(self, input_ids: Tensor | None, positions: Tensor, embeddings: Tensor | None) -> Tensor | None:
        """Before the base: [T, H] embeddings to start from, or None for its own."""
        if self._steerer is None or not any(plan.changes_cache for plan in self.slots.live_plans):
            return None
        slots = self.slots_of_tokens(len(positions))
        return None if slots is None else self._steerer.begin(slots, self.slots.plans, input_ids, positions, embeddings)

    def end_steering(self) -> None:
        """After the base, whatever became of it."""
        if self._steerer is not None:
            self._steerer.end()

    def apply(self, logits: Tensor, tags: Tensor, lines: AssistantLines | None = None) -> Tensor:
        """Run every logit guard over the rows that carried ``tags``.

        Contrast comes first: suppression has the last word.
        """
        if not self.slots.engaged:
            return logits
        if logits.dtype is torch.float16:
            logits = logits.float()  # its range has no room for the floor
        rows, plans = self.slots.rows(tags, self.suppression.window_tokens)
        logits = self.contrast.apply(self.unsteered.apply(logits, rows, plans), replace(rows, lines=lines), plans)
        return self.suppression.apply(logits, rows, plans)

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
