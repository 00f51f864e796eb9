"""The step: contrast every engaged row with its assistants, and close the rows that cannot be.

Covered: rows whose plan names assistants, however many and whichever. Not covered here: running the assistants, which is the
engine's work; what they said arrives in ``Rows.lines``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from guards.closing import close_rows_
from guards.contrastive.assistant import Assistant
from guards.contrastive.declaration import Contrast, RuleName
from guards.contrastive.rules import subtract_assistants
from guards.errors import VocabularyMismatch
from guards.types import Plan, Rows


class ContrastGuard:
    """A LogitsGuard.

    A row whose plan names an assistant that did not speak for it (not loaded, not run) may only produce tokens without text: it
    fails closed.
    """

    def __init__(self, has_text: Tensor) -> None:
        """``has_text``: [V] bool, whether a token is text that a reader would see."""
        self.device = has_text.device
        self._has_text = has_text
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
        if logits.shape[1] != len(self._has_text):
            raise VocabularyMismatch(f"logits have {logits.shape[1]} columns, the vocabulary {len(self._has_text)} tokens")
        wanted = torch.tensor([len(plan.of(Contrast)) for plan in plans] + [0], device=self.device)[rows.plan]
        if not wanted.any():
            return logits
        spoken = torch.zeros_like(wanted)
        if rows.lines is not None and len(rows.lines.row):
            lines = rows.lines
            plan_of_line = rows.plan[lines.row].tolist()
            settings = [plans[plan].of(Contrast)[nth] for plan, nth in zip(plan_of_line, lines.nth.tolist(), strict=True)]
            # What is not a number would make the whole row one, and void every other guard on it.
            sound = torch.isfinite(lines.logits).all(dim=1).tolist()
            known = [setting.assistant in self._difference and good for setting, good in zip(settings, sound, strict=True)]
            spoken.index_add_(0, lines.row, torch.tensor(known, device=self.device).to(spoken.dtype))
            for rule in sorted({setting.rule for setting in settings}):
                mine = [i for i, setting in enumerate(settings) if setting.rule == rule and known[i]]
                if not mine:
                    continue
                chosen = [settings[i] for i in mine]
                index = torch.tensor(mine, device=self.device)

                def values(*numbers: float) -> Tensor:
                    return torch.tensor(numbers, dtype=torch.float32, device=self.device)

                logits = subtract_assistants(
                    logits,
                    lines.logits[index],
                    row=lines.row[index],
                    rule=cast("RuleName", rule),
                    alpha=values(*(setting.alpha for setting in chosen)),
                    margin=values(*(setting.margin for setting in chosen)),
                    plausibility=values(*(setting.plausibility for setting in chosen)),
                    difference=torch.tensor([self._difference[setting.assistant] for setting in chosen], device=self.device),
                )
        close_rows_(logits, (spoken < wanted).nonzero().squeeze(1), self._has_text)
        return logits
