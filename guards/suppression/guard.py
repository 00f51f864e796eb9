"""The guard: pushes the logits of tokens that would complete a phrase to the floor, and closes rows that cannot be guarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from guards.closing import lower_
from guards.errors import VocabularyMismatch
from guards.kinds import EngineContext
from guards.suppression.artifact import CompiledPart, CompiledPhrases
from guards.suppression.declaration import Suppress
from guards.suppression.folding import Folding
from guards.suppression.mask import SPARE_TOKENS, PhraseTable, window_widths
from guards.suppression.vocabulary import Vocabulary
from guards.types import Plan, Rows


class SuppressionGuard:
    """Keeps phrases out of what is sampled. A LogitsGuard.

    Covered and not covered: see the package. A row whose plan names an artifact that is not loaded, or whose window is
    starved (too many tokens without text to see far enough back) or holds an unknown token, may only produce tokens without
    text: it fails closed.
    """

    def __init__(self, context: EngineContext) -> None:
        self.vocabulary: Vocabulary = context.vocabulary
        self.device = context.device
        self._artifacts: dict[str, CompiledPhrases] = {}
        self._tables: list[PhraseTable] = []
        self._closer = context.closer

    @property
    def loaded(self) -> frozenset[str]:
        """Fingerprints of the artifacts that plans may name."""
        return frozenset(self._artifacts)

    @property
    def window_tokens(self) -> int:
        """How many token ids ``Rows.suffix`` must hold."""
        return max((window_widths(table.window)[-1] for table in self._tables), default=0) + SPARE_TOKENS

    def check(self, artifact: CompiledPhrases) -> None:
        """Raise VocabularyMismatch if the artifact was compiled for another tokenizer."""
        if artifact.vocabulary != self.vocabulary.fingerprint:
            raise VocabularyMismatch(
                f"artifact {artifact.fingerprint[:12]} was compiled for vocabulary {artifact.vocabulary[:12]}, "
                f"this model has {self.vocabulary.fingerprint[:12]}; build the forget set again on this server, "
                "and give every served model a LETHE_STATE_DIR of its own"
            )

    def load(self, artifacts: Mapping[str, CompiledPhrases]) -> None:
        """Make exactly these artifacts, by fingerprint, the ones that plans may name.

        Raises:
            VocabularyMismatch: one was compiled for another tokenizer. Nothing changes then.
        """
        for artifact in artifacts.values():
            self.check(artifact)
        groups: dict[Folding, list[tuple[str, CompiledPart]]] = {}
        for artifact in artifacts.values():
            for part in artifact.parts:
                groups.setdefault(part.by, []).append((artifact.fingerprint, part))
        tables = [PhraseTable.merge(by, parts, self.vocabulary, self.device) for by, parts in groups.items()]
        self._artifacts = dict(artifacts)
        self._tables = tables

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Push banned tokens to the floor, in place.

        Args:
            logits: [R, V] float, before temperature and masks. ``-inf`` stays ``-inf``.
            rows: the step's layout; ``suffix`` holds at least `window_tokens` ids.
            plans: what ``rows.plan`` points into.
        """
        if logits.shape[1] != self.vocabulary.size:
            raise VocabularyMismatch(f"logits have {logits.shape[1]} columns, the vocabulary {self.vocabulary.size} tokens")
        engaged_plans = torch.tensor([bool(plan.artifacts_of(Suppress)) for plan in plans] + [False], device=self.device)
        engaged = engaged_plans[rows.plan].nonzero().squeeze(1)
        if not len(engaged):
            return logits
        plan, suffix = rows.plan[engaged], rows.suffix[engaged]
        closed = torch.tensor([not self.loaded.issuperset(plan.artifacts_of(Suppress)) for plan in plans], device=self.device)[plan]
        for table in self._tables:
            member = torch.zeros(len(plans), len(table.slots), dtype=torch.bool)
            for i, each in enumerate(plans):
                member[i, [table.slots[name] for name in each.artifacts_of(Suppress) if name in table.slots]] = True
            row, token, unread = table.banned(suffix, member.to(self.device)[plan])
            lower_(logits, engaged[row], token)
            closed = closed | unread
        if closed.any():
            self._closer.close_(logits, engaged[closed], "suppression")
        return logits
