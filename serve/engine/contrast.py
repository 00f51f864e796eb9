"""Contrast in the engine: runs the assistants on the fork beside the base, and hands what they say to the guard on the logits.

It runs in `compute_logits`, outside of whatever graph the forward pass is in, for the rows that come there.

In a pipeline the last stage has the rows and runs the assistants; the others have nothing to do.

Covered: every row of logits of a request whose plan names assistants. A fork that fails, or differs from
the base, is never used again: rows that need it are closed; the engine and all other requests go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed import get_pp_group

from guards.contrastive.assistant import Assistant
from guards.contrastive.declaration import Contrast
from guards.contrastive.guard import ContrastGuard
from guards.errors import InvalidArtifact
from guards.steering.declaration import Steer
from guards.types import Plan, Rows
from serve.engine.attention import Lines, PagedBatch
from serve.engine.context import NO_BASE, Context
from serve.engine.fork import LateFork, Unforkable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spoken:
    """What the assistants said about some rows, P lines; an assistant's lines stand together."""

    row: Tensor  # [P] int64
    entries: tuple[Contrast, ...]  # [P] the entry of the row's plan for which it was said
    final: Tensor  # [P, H] hidden states, ready for the head; NaN where a row belongs to another request than assumed


class ForkedContrast:
    """One per engine."""

    def __init__(self, context: Context) -> None:
        self._guard = ContrastGuard(context.closer)
        self._context = context
        self._slots = context.slots
        self._fork: LateFork | None = None
        self._proved = False
        """Whether the fork has once, without assistants, given the base's own hidden states."""
        self._fork_fault: str | None = None

    def prepare(self) -> None:
        """Register hooks in a model that is about to be compiled: hooks added later are not in the compiled code."""
        if self._context.base is not None and self._speaks:
            try:
                self._the_fork()
            except Unforkable as error:
                self._fork_fault = str(error)

    def unable(self) -> str | None:
        """Why no assistant can be run beside this model; None if one can."""
        if self._context.base is None:
            return NO_BASE
        if self._speaks and self._fork is None and self._fork_fault is None:
            try:
                self._made()
            except Unforkable as error:
                return str(error)
        return self._fork_fault

    def check(self, assistant: Assistant) -> None:
        """Raise InvalidArtifact or Unforkable if an assistant cannot be run beside this model."""
        if self._context.base is None:
            raise InvalidArtifact(f"the served model takes no assistants, so {assistant.fingerprint[:12]} cannot be loaded")
        assistant.check(self._context.base)
        if self._speaks:
            self._the_fork().check(assistant)

    def load(self, assistants: Mapping[str, Assistant]) -> None:
        """Make exactly these assistants, by fingerprint, the ones that plans may name."""
        if self._speaks:
            self._the_fork().load(assistants)
        self._guard.load(assistants)

    def speak(self, tags: Tensor, hidden: Tensor) -> Spoken | None:
        """After the base, before the head: let the assistants speak for the rows whose plans name them.

        Args:
            tags: [R, TAG_DIGITS] what the rows carried; hidden: [R, H] the base's own final hidden states.
        """
        if self._fork is None or not any(plan.of(Contrast) for plan in self._slots.live_plans):
            return None
        try:
            return self._spoken(self._fork, tags, hidden)
        except Exception as error:
            # Whatever failed: rows that need an assistant get no line, so they are closed; other rows are not.
            self._fork_fault = f"this model's layers cannot be forked: {error}"
            self._fork = None
            logger.exception("lethe: assistants are closed until the server is restarted with another model")
            self._context.stop_unless_alone()
            return None

    def _spoken(self, fork: LateFork, tags: Tensor, hidden: Tensor) -> Spoken | None:
        step, (slots, positions) = self._context.step, self._slots.read(tags)
        of_rows = step.requests_of_rows(len(tags))
        asked = of_rows is None
        if of_rows is None:
            in_batch = {slot: request for request, slot in enumerate(step.requests) if slot >= 0}
            of_rows = [in_batch.get(slot, -1) for slot in slots.tolist()]
        lines = [
            (entry.assistant, row, request, nth)
            for row, request in enumerate(of_rows)
            if request >= 0 and (slot := step.requests[request]) >= 0
            for nth, entry in enumerate(self._slots.plan(slot).of(Contrast))
            if entry.assistant in fork.loaded
        ]
        if not lines or step.starts is None or step.offsets is None or step.pages is None:
            return None
        lines.sort()  # an assistant's lines stand together
        names, *numbers = zip(*lines, strict=True)
        plans = [self._slots.plan(step.requests[request]) for _, _, request, _ in lines]
        row, request, expected = (
            torch.tensor(each, device=tags.device) for each in (*numbers[:2], [step.requests[line[2]] for line in lines])
        )
        own = slots[row] == expected
        position = torch.where(own, positions[row], step.offsets[request])
        token = step.starts[request] + position - step.offsets[request]
        # The host knows each request's length after this pass, so also its last position; others are read from the device.
        lengths = (position + 1).to("cpu", torch.int32) if asked else step.pages.lengths[[line[2] for line in lines]]
        # A row that belongs to another request than assumed has a meaningless token index; its result becomes NaN below.
        rotary = position if step.rotary is None else step.rotary[..., token.clamp(0, step.rotary.shape[-1] - 1)]
        at = Lines(token, position, request, lengths, rotary)
        # The fork is not steered, so only rows whose base was not steered can be compared with it.
        unsteered = [i for i, plan in enumerate(plans) if not plan.of(Steer)]
        if not self._proved and unsteered:
            self._prove(fork, at, step.pages, hidden[row], torch.tensor(unsteered, device=tags.device))
        final = fork.run(at, names, step.pages)
        final = torch.where(own[:, None], final, torch.nan)
        entries = tuple(plan.of(Contrast)[line[3]] for plan, line in zip(plans, lines, strict=True))
        return Spoken(row, entries, final)

    def _prove(self, fork: LateFork, at: Lines, pages: PagedBatch, hidden: Tensor, unsteered: Tensor) -> None:
        """Raise Unforkable unless the fork, without assistants, gives the base's own hidden states ([P, H])."""
        again, own = fork.run(at, (), pages)[unsteered].float(), hidden[unsteered].float()
        if not torch.allclose(again, own, rtol=0.02, atol=0.02 * float(own.abs().max())):
            raise Unforkable(f"without assistants the fork differs from the base by {float((again - own).abs().max()):.3g}")
        self._proved = True

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """See `ContrastGuard.apply`."""
        return self._guard.apply(logits, rows, plans)

    @property
    def _speaks(self) -> bool:
        """Whether this process computes logits."""
        return get_pp_group().is_last_rank

    def _the_fork(self) -> LateFork:
        """The fork, made when the first assistant comes. Raises Unforkable."""
        if self._fork_fault is not None:
            raise Unforkable(self._fork_fault)
        if self._fork is None:
            self._fork = self._made()
            self._fork.listen()
        return self._fork

    def _made(self) -> LateFork:
        """Raises Unforkable."""
        try:
            return LateFork(self._context.model(), self._context.vllm_config)
        except Unforkable:
            raise
        except Exception as error:
            raise Unforkable(f"this model is built in another way than those that can be forked: {error}") from error
