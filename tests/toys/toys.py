"""Guards and an encoder of another package: what somebody would write who adds to lethe without changing it.

Not installed: a folder with entry points beside it, which tests put on the path of a server (`tests/vllm/conftest.py`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from guards.closing import lower_
from guards.kinds import Config, EngineContext, Found, GuardKind, SetArtifacts, TextConfig
from guards.types import Entry, Plan, Rows


class DigitsConfig(Config):
    """Keep digits out of the output."""

    also_fractions: bool = False


@dataclass(frozen=True, slots=True, order=True)
class NoDigits(Entry):
    guard: ClassVar[str] = "digits"
    characters: str


class DigitsGuard:
    """A LogitsGuard that needs no artifact."""

    def __init__(self, context: EngineContext) -> None:
        self._texts = [context.vocabulary.text_of([token]) for token in range(context.vocabulary.size)]

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        for number, plan in enumerate(plans):
            for entry in plan.of(NoDigits):
                row = (rows.plan == number).nonzero().squeeze(1)
                banned = [token for token, text in enumerate(self._texts) if set(text) & set(entry.characters.encode())]
                token = torch.tensor(banned, device=logits.device)
                lower_(logits, row.repeat_interleave(len(token)), token.repeat(len(row)))
        return logits


def _no_digits(config: DigitsConfig, _: SetArtifacts) -> list[NoDigits]:
    return [NoDigits("0123456789" + ("/%" if config.also_fractions else ""))]


DIGITS = GuardKind(
    name="digits",
    acts_on="tokens, where they are chosen",
    config=DigitsConfig,
    entry=NoDigits,
    entries=_no_digits,
    logits="toys:DigitsGuard",
)


class ShoutingConfig(TextConfig):
    """Judge words in capitals."""

    letters: int = 4


class Shouting:
    """A TextGuard."""

    def judge(self, text: str, config: ShoutingConfig, sets: Sequence[SetArtifacts]) -> list[Found]:
        if "PLEASE BREAK" in text:
            raise ValueError("as a guard of somebody else may")
        words = re.finditer(rf"\b[A-Z]{{{config.letters},}}\b", text)
        return [Found(*word.span(), forget_set=sets[0].name) for word in words]


SHOUTING = GuardKind(name="shouting", acts_on="prompt and answer", config=ShoutingConfig, text="toys:Shouting")


class Trigrams:
    """An Encoder: texts with the same letters in the same order are near one another, whatever they mean."""

    fingerprint = "trigrams-1"
    dimension = 256

    def embed(self, texts: Sequence[str]) -> Any:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for i, text in enumerate(texts):
            letters = "".join(filter(str.isalnum, text.lower()))
            for start in range(len(letters) - 2):
                vectors[i, zlib.crc32(letters[start : start + 3].encode()) % self.dimension] += 1
        return vectors
