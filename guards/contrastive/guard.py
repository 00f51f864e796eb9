"""The step: contrast every engaged row with its assistants, and close the rows that cannot be.

Covered: rows whose plan names assistants, however many and whichever. Not covered here: running the assistants, which is the
engine's work; what they said arrives in ``Rows.lines``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from guards.closing import RowCloser
from guards.contrastive.assistant import Assistant
from guards.contrastive.declaration import Contrast, RuleName
from guards.contrastive.rules import subtract_assistants_
from guards.errors import VocabularyMismatch
from guards.types import Plan, Rows


class ContrastGuard:
    """A LogitsGuard.

    A row whose plan names an assistant that did not speak for it (not loaded, not run) may only produce tokens without text: it
    fails closed.
    """

    def __init__(self, closer: RowCloser) -> None:
        self.device = closer.has_text.device
        self._closer = closer
        self._difference: dict[str, bool] = {}

    def load(self, assistants: Mapping[str, Assistant]) -> None:
        """Make exactly these assistants, by fingerprint, the ones that plans may name."""
        self._difference = {name: each.manifest.recipe.form == "difference" for name, each in assistants.items()}

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Contrast, in place.

        Args:
            logits: [R, V] float, before temperature and masks. ``-inf`` stays ``-inf``.
            rows: the step's layout; ``lines`` holds what the assistants said.
            plans: what ``rows.plan`` points into.
        """
        if logits.shape[1] != len(self._closer.has_text):
            raise VocabularyMismatch(f"logits have {logits.shape[1]} columns, the vocabulary {len(self._closer.has_text)} tokens")
        if not any(plan.of(Contrast) for plan in plans):
            return logits
        wanted = torch.tensor([len(plan.of(Contrast)) for plan in plans] + [0], device=self.device)[rows.plan]
        spoken = torch.zeros_like(wanted)
        lines = rows.lines
        if lines is not None and lines.entries:
            entries = cast("tuple[Contrast, ...]", lines.entries)
            # A NaN would spread over the whole row and undo every other guard on it: a line that is not finite gets strength 0.
            sound = torch.isfinite(lines.logits).all(dim=1)
            known = torch.tensor([entry.assistant in self._difference for entry in entries], device=self.device)
            spoken.index_add_(0, lines.row, (known & sound).to(spoken.dtype))
            for rule in sorted({entry.rule for entry in entries}):
                mine = [i for i, entry in enumerate(entries) if entry.rule == rule and entry.assistant in self._difference]
                if mine:
                    self._subtract(logits, lines.logits, sound, lines.row, entries, mine)
        self._closer.close_(logits, (spoken < wanted).nonzero().squeeze(1), "contrast")
        return logits

    def _subtract(
        self, logits: Tensor, said: Tensor, sound: Tensor, row: Tensor, entries: Sequence[Contrast], mine: list[int]
    ) -> None:
        """Contrast rows with the lines of ``said`` ([P, V]) at the indexes ``mine``, which all have the same rule."""
        chosen = [entries[i] for i in mine]
        index = torch.tensor(mine, device=self.device)

        def values(*numbers: float) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float32, device=self.device)

        subtract_assistants_(
            logits,
            said if len(mine) == len(entries) else said[index],
            row=row[index],
            rule=cast("RuleName", chosen[0].rule),
            alpha=values(*(entry.alpha for entry in chosen)) * sound[index],
            margin=values(*(entry.margin for entry in chosen)),
            plausibility=values(*(entry.plausibility for entry in chosen)),
            difference=torch.tensor([self._difference[entry.assistant] for entry in chosen], device=self.device),
        )
