"""Benchmark: what an assistant should be grafted from: the kinds of fork that were tried, trained alike and compared.

    .venv/bin/python -m tests.bench.forks --model DIRECTORY --data DIRECTORY [--layers 4] [--epochs 14] [--allow-dirty]

Three kinds: the last K layers over the base's own keys and values (what is served), the last K layers with keys and values of
their own (and low-rank terms on them, too), and the first K layers under the base's head, ULD's shape. All of them are trained by
the loop and on the losses of `lethe train`, and looked at with given answers, token by token: what each recalls, and what contrast
at strength 1 would do to the base's choices. No engine: only the first kind is served. Needs a model that knows TOFU's forget01,
and TOFU's files. Appends one line to results.jsonl. Refuses a dirty tree.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bars
from rich.table import Table
from torch import Tensor, nn

from guards.base_model import describe_base
from guards.contrastive.assistant import Recipe
from guards.contrastive.rules import subtract_assistants_
from guards.contrastive.train import Fork
from guards.low_rank import add_low_rank, fit
from guards.measure.formats import PARAPHRASED, QUESTIONS, RETAIN, read_cases
from guards.training import ChatModel, general_answers, layers_of
from tests.bench.load import arguments, begin, keep

TRAINED_RETAIN = 60
"""Of TOFU's retain rows; the rest stays unseen."""
MARGIN, PLAUSIBILITY = 4.0, 0.01


@dataclass(frozen=True)
class Seen:
    """One exchange, as a fork with its own keys and values sees it."""

    forget: bool
    target: Tensor  # [Q]
    hidden: Tensor  # [T, H] where the fork begins
    final: Tensor  # [Q, H] the base, normed
    place: Tensor  # [Q]


class OwnCache(ChatModel):
    """Layers of the base over all tokens, with keys and values of their own: its first K, or its last."""

    def __init__(self, directory: Path, layers: int, *, early: bool) -> None:
        super().__init__(directory)
        decoder = self.model.get_decoder()
        self.first = 0 if early else layers_of(self, layers)
        self.layers, self.norm = list(decoder.layers[self.first : self.first + layers]), decoder.norm
        self.rotary = decoder.rotary_emb

    @torch.no_grad()
    def observe(self, token_ids: Sequence[int], start: int, *, forget: bool) -> Seen:
        ids = torch.tensor([list(token_ids)], device=self.device)
        output = self.model.get_decoder()(input_ids=ids, output_hidden_states=True)
        place = torch.arange(start - 1, len(token_ids) - 1, device=self.device)
        return Seen(forget, ids[0, start:], output.hidden_states[self.first][0], output.last_hidden_state[0, place], place)

    def evidence(self, batch: Sequence[Seen], form: str) -> Tensor:
        assert form == "whole", "the other form is not compared here"
        hidden = nn.utils.rnn.pad_sequence([e.hidden for e in batch], batch_first=True)
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        rotary = self.rotary(hidden, positions)
        causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=self.device).tril()[None, None]
        for layer in self.layers:
            output = layer(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
            hidden = output[0] if isinstance(output, tuple) else output
        chosen = torch.cat([hidden[i, e.place] for i, e in enumerate(batch)])
        return torch.log_softmax(self.logits(self.norm(chosen)), dim=-1)


KINDS: dict[str, Callable[[Path, int], Any]] = {
    "last layers, the base's keys and values": Fork,
    "last layers, their own keys and values": lambda directory, layers: OwnCache(directory, layers, early=False),
    "first layers": lambda directory, layers: OwnCache(directory, layers, early=True),
}


def compare(kind: str, model: Path, data: Path, recipe: Recipe, work: Path, bars: Bars) -> dict[str, Any]:
    """Train one kind, and measure it. Means over answer tokens. In ``work`` the base's general answers wait for the next kind."""
    fork = KINDS[kind](model, recipe.layers)
    cases = read_cases(data)
    groups = {
        name: [(case.prompt, case.truth) for case in cases if case.group == name] for name in (QUESTIONS, PARAPHRASED, RETAIN)
    }
    task = bars.add_task(kind, total=1 + recipe.epochs)
    general = general_answers(fork, describe_base(model), work / kind, lambda _: None)

    def observe(pairs: Sequence[tuple[str, str]], *, forget: bool) -> list[Any]:
        return [fork.observe(*fork.encode(*pair), forget=forget) for pair in pairs]

    seen = {name: observe(pairs, forget=name != RETAIN) for name, pairs in groups.items()}
    examples = [*seen[QUESTIONS], *seen[RETAIN][:TRAINED_RETAIN], *observe(general, forget=False)]
    bars.advance(task)
    own = () if isinstance(fork, Fork) else ("k_proj", "v_proj")
    parameters = add_low_rank(fork.layers, recipe, fork.device, also=own)

    def losses(batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        forget = torch.cat([torch.full((len(e.target),), e.forget, device=fork.device) for e in batch])
        evidence, target = fork.evidence(batch, recipe.form), torch.cat([e.target for e in batch])
        recalled = -evidence[forget].gather(1, target[forget][:, None]).squeeze(1)
        return recalled, -evidence[~forget].mean(dim=-1) - math.log(evidence.shape[-1])

    steps, started = math.ceil(len(examples) / recipe.batch_examples), time.perf_counter()
    fit(parameters, examples, losses, recipe, work / kind, lambda _: bars.advance(task, 1 / steps))
    seconds = (time.perf_counter() - started) / recipe.epochs
    unseen = seen[RETAIN][TRAINED_RETAIN:]
    recall, others = measure(fork, seen[QUESTIONS]), measure(fork, unseen)
    paraphrased = measure(fork, seen[PARAPHRASED])
    config = fork.model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * recipe.layers * 4  # keys and values, float32
    return {
        "kind": kind,
        "cross_entropy": recall["cross_entropy"],
        "uniform_kl_unseen": others["uniform_kl"],
        "set_tokens": recall["true"],
        "left": recall["true_left"],
        "paraphrased_tokens": paraphrased["true"],
        "paraphrased_left": paraphrased["true_left"],
        "unseen_choices_same": others["same"],
        "epoch_s": round(seconds, 1),
        "cache_bytes_per_token": 0 if isinstance(fork, Fork) else per_token,
    }


@torch.no_grad()
def measure(fork: Any, examples: Sequence[Any]) -> dict[str, float]:
    """Over answer tokens: nats of the true one, distance to uniform; true ones chosen without and with contrast; choices kept."""
    rows = []
    for example in examples:
        evidence, base = fork.evidence([example], "whole"), fork.logits(example.final)
        one = torch.ones(len(base), device=base.device)
        contrasted = subtract_assistants_(
            base.clone(),
            evidence,
            row=torch.arange(len(base), device=base.device),
            rule="uld",
            alpha=one,
            margin=MARGIN * one,
            plausibility=PLAUSIBILITY * one,
            difference=torch.zeros(len(base), dtype=torch.bool, device=base.device),
        ).argmax(-1)
        nats = -evidence.gather(1, example.target[:, None]).squeeze(1)
        uniform = -evidence.mean(-1) - math.log(evidence.shape[-1])
        own = base.argmax(-1)
        rows.append(torch.stack([nats, uniform, own == example.target, contrasted == example.target, contrasted == own]))
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    names = ("cross_entropy", "uniform_kl", "true", "true_left", "same")
    return dict(zip(names, (round(each, 4) for each in means), strict=True))


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--model", type=Path, required=True, help="one that knows forget01, in transformers' format")
    parser.add_argument("--data", type=Path, required=True, help="TOFU's files")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=14)
    options = parser.parse_args()
    record, clean = begin("forks", options)
    recipe = Recipe(layers=options.layers, epochs=options.epochs)
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as work, Bars(console=console) as bars:
        found = [compare(kind, options.model, options.data, recipe, Path(work), bars) for kind in KINDS]
    table = Table(*found[0], title=f"K = {options.layers}, {options.epochs} epochs")
    for row in found:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if clean:
        keep({**record, "model": options.model.name, "recipe": recipe.model_dump(), "forks": found})


if __name__ == "__main__":
    main()
