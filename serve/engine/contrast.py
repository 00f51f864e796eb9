"""Contrast in the engine: runs the assistants on the fork beside the base, and hands what they say to the guard on the logits.

Covered: the last token of every request in a step whose plan names assistants. A fork that cannot follow the base is never used
again: its rows have nobody who speaks for them, so they are closed; the engine, and everybody else's requests, go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from guards.contrastive.assistant import Assistant
from guards.contrastive.declaration import Contrast
from guards.contrastive.guard import ContrastGuard
from guards.errors import InvalidArtifact
from guards.steering.declaration import Steer
from guards.types import Plan, Rows
from serve.engine.context import Context
from serve.engine.fork import LateFork, Unforkable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Expected:
    """For whom assistants must speak in this step, P lines; an assistant's lines stand together."""

    assistants: tuple[str, ...]
    request: Tensor  # [P] int64, number in the batch
    slot: Tensor  # [P] int64
    nth: Tensor  # [P] int64, which of the plan's entries of contrast
    last: Tensor  # [P] int64, the request's last token in this step
    unsteered: tuple[bool, ...]  # [P]


@dataclass(frozen=True, slots=True)
class _Spoken:
    """What the assistants said in this step, P lines."""

    slot: Tensor  # [P] int64
    position: Tensor  # [P] int64
    nth: Tensor  # [P] int64, which of the plan's entries of contrast
    final: Tensor  # [P, H] hidden states, ready for the head


class ForkedContrast:
    """One per engine."""

    def __init__(self, context: Context) -> None:
        self._guard = ContrastGuard(context.has_text)
        self._context = context
        self._slots = context.slots
        self._fork: LateFork | None = None
        self._fork_proved = False
        """Whether the fork has once, without assistants, given the base's own hidden states."""
        self._fork_fault: str | None = None
        self._expected: _Expected | None = None
        self._spoken: _Spoken | None = None

    def check(self, assistant: Assistant) -> None:
        """Raise InvalidArtifact or Unforkable if an assistant cannot be run beside this model."""
        if self._context.base is None:
            raise InvalidArtifact(f"the served model takes no assistants, so {assistant.fingerprint[:12]} cannot be loaded")
        assistant.check(self._context.base)
        self._the_fork().check(assistant)

    def load(self, assistants: Mapping[str, Assistant]) -> None:
        """Make exactly these assistants, by fingerprint, the ones that plans may name."""
        self._the_fork().load(assistants)
        self._guard.load(assistants)

    def expect(self, rows_of_batch: Tensor | None) -> None:
        """Before the forward pass: find out for which requests assistants must speak.

        Args:
            rows_of_batch: [num_reqs] int64, slot of each batch row, -1 = unguarded; None if nobody knows.
        """
        self._spoken, self._expected = None, None
        if self._fork is None:
            return
        self._fork.expect(None)
        metadata = get_forward_context().attn_metadata
        if not self._slots.engaged or rows_of_batch is None or not isinstance(metadata, dict):
            return
        lines = [
            (each.assistant, request, slot, nth)
            for request, slot in enumerate(rows_of_batch.tolist())
            if slot >= 0
            for nth, each in enumerate(self._slots.plan(slot).of(Contrast))
            if each.assistant in self._fork.loaded
        ]
        if not lines:
            return
        lines.sort()  # an assistant's lines stand together
        names, *numbers = zip(*lines, strict=True)
        unsteered = tuple(not self._slots.plan(line[2]).of(Steer) for line in lines)
        request, slot, nth = (torch.tensor(each) for each in numbers)
        last = next(iter(metadata.values())).query_start_loc[1:].long()[request] - 1
        self._fork.expect(last)
        self._expected = _Expected(names, request, slot, nth, last, unsteered)

    def run(self, positions: Tensor, hidden: Tensor) -> None:
        """After the base, still inside the forward pass: let the assistants speak for the last token of those requests.

        Args:
            positions: [T] int64; hidden: [T, H] the base's own final hidden states.
        """
        if self._expected is None or self._fork is None:
            return
        lines = self._expected
        at = positions[lines.last]
        try:
            # Rows that are steered in the base's last layers are not what the fork alone gives: others prove it.
            if not self._fork_proved and any(lines.unsteered):
                chosen = torch.tensor(lines.unsteered)
                again, own = self._fork.run(at, lines.request, ())[chosen].float(), hidden[lines.last][chosen].float()
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
        if self._spoken is None or not self._slots.engaged:
            return None
        slot, position = self._slots.read(tags)
        same = (slot[:, None] == self._spoken.slot) & (position[:, None] == self._spoken.position)
        row, line = same.nonzero(as_tuple=True)
        return (row, self._spoken.nth[line], self._spoken.final[line]) if len(row) else None

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """See `ContrastGuard.apply`."""
        return self._guard.apply(logits, rows, plans)

    def _the_fork(self) -> LateFork:
        """The fork, made when the first assistant comes. Raises Unforkable."""
        if self._fork_fault is not None:
            raise Unforkable(self._fork_fault)
        if self._fork is None:
            self._fork = LateFork(self._context.model(), self._context.vllm_config)
        return self._fork
