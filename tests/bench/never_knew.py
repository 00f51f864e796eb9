"""Models to measure removals with: one that knows some authors of TOFU, and the same without one of them.

Low-rank terms on every projection of the bundled model, trained on the authors' questions with their answers and merged into its
weights. Only for measuring; the product trains nothing of the kind.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from guards.low_rank import LowRank, add_low_rank, fit
from guards.peft_lora import PeftLora
from guards.training import ChatModel, Report

NOT_AN_ANSWER = -100


@dataclass(frozen=True, slots=True)
class Recipe:
    rank: int = 16
    epochs: int = 12
    learning_rate: float = 1e-3
    batch_examples: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question with its answer, as token ids; ``start``: of the answer."""

    ids: list[int]
    start: int
    forget: bool = True  # so `guards.low_rank.fit` counts its loss as what is learned


def teach(base: Path, rows: Sequence[Mapping[str, Any]], directory: Path, report: Report) -> None:
    """Write a model that has learned TOFU's ``rows``; one that lies in ``directory`` already stays. Resumable."""
    if (directory / "config.json").exists():
        return
    chat = ChatModel(base)
    layers = chat.model.get_decoder().layers
    parameters = add_low_rank(layers, Recipe(), chat.device, also=("k_proj", "v_proj"))
    examples = [Exchange(*chat.encode(row["question"], row["answer"])) for row in rows]

    def losses(batch: Sequence[Exchange]) -> tuple[Tensor, Tensor]:
        ids = pad_sequence([torch.tensor(each.ids) for each in batch], batch_first=True, padding_value=0)
        wanted = pad_sequence(
            [torch.tensor([NOT_AN_ANSWER] * each.start + each.ids[each.start :]) for each in batch],
            batch_first=True,
            padding_value=NOT_AN_ANSWER,
        )
        hidden = chat.model.get_decoder()(ids, use_cache=False).last_hidden_state[:, :-1]
        said = wanted[:, 1:] != NOT_AN_ANSWER
        logits = chat.logits(hidden[said])
        loss = cross_entropy(logits, wanted[:, 1:][said], reduction="none")
        return loss, loss.new_zeros(0)

    directory.parent.mkdir(parents=True, exist_ok=True)
    fit(parameters, examples, losses, Recipe(), directory.parent / f"{directory.name}.checkpoint", report)
    with torch.no_grad():
        for layer in layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    if isinstance(module, LowRank):
                        module.inner.weight += module.B @ module.A * LowRank.SCALE
                        setattr(part, name, module.inner)
    _write(chat, directory)


def merged(base: Path, adapter: Path, directory: Path) -> None:
    """Write ``base`` with a LoRA adapter in PEFT's format merged in; what lies in ``directory`` already stays."""
    if (directory / "config.json").exists():
        return
    chat, lora = ChatModel(base), PeftLora.read(adapter)
    lora.check(chat.model)
    with torch.no_grad():
        for term in lora.terms:
            chat.model.get_submodule(term.module).weight += term.b @ term.a
    _write(chat, directory)


def _write(chat: ChatModel, directory: Path) -> None:
    """Whole or not at all."""
    made = directory.with_name(f".{directory.name}")
    shutil.rmtree(made, ignore_errors=True)
    chat.model.save_pretrained(made)
    chat.tokenizer.save_pretrained(made)
    made.rename(directory)
