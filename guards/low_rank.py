"""Low-rank terms on a model's last layers, and how they are trained: what an assistant and an unlearning adapter have in common.

In a layer whose MLP is a mixture of experts only attention is adapted: its experts stay the base's.

One loop, so that both can be interrupted and go on as if they had not been: the order of the examples depends on seed and epoch
alone, and a checkpoint after every epoch holds parameters, optimizer and losses in one file.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from guards.errors import Untrainable
from guards.training import Progress, Report
from guards.whole_file import write_whole

FORMAT = "lethe-checkpoint-2"
"""Of checkpoints; from another one training begins anew."""


ATTENTION = ("q_proj", "o_proj")
"""Never k_proj or v_proj: the late fork reads the base's keys and values, which is what keeps it without state."""
LATENT_QUERY = "q_b_proj"
"""What some models with latent attention (MLA) have for q_proj: it makes queries of a latent vector."""
MLP = ("gate_proj", "up_proj", "down_proj")
MODULES = (*ATTENTION, *MLP)


def expected_names(names: Collection[str], layers: int) -> set[str]:
    """What an artifact that holds tensors of these names must hold: in each layer attention's terms, and the MLP's or none."""
    found = set()
    for i in range(layers):
        here = {module for module in (*MODULES, LATENT_QUERY) if f"layers.{i}.{module}.A" in names}
        modules = _modules(latent=LATENT_QUERY in here, mixture=here.isdisjoint(MLP))
        found |= {f"layers.{i}.{module}.{factor}" for module in modules for factor in "AB"}
    return found


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank term."""

    SCALE = 2.0
    """alpha / rank, LoRA's usual 2; folded into B when saved."""

    def __init__(self, inner: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        bound = 1 / math.sqrt(inner.in_features)
        self.A = nn.Parameter((torch.rand(rank, inner.in_features, generator=generator) * 2 - 1) * bound)
        self.B = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (x @ self.A.T) @ self.B.T * self.SCALE


class Example(Protocol):
    @property
    def forget(self) -> bool: ...


class Recipe(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_examples(self) -> int: ...
    @property
    def seed(self) -> int: ...


AnyExample = TypeVar("AnyExample", bound=Example)
Parameters = dict[str, nn.Parameter]


def is_mixture(layer: nn.Module) -> bool:
    """Whether a decoder layer holds experts, of which each token passes some."""
    return any("experts" in name for name, _ in layer.named_modules())


def adapted_modules(layer: nn.Module) -> tuple[str, ...]:
    """The projections of a decoder layer that take low-rank terms, in transformers and in vLLM alike."""
    latent = any(name.endswith(LATENT_QUERY) for name, _ in layer.named_modules())
    return _modules(latent=latent, mixture=is_mixture(layer))


def _modules(*, latent: bool, mixture: bool) -> tuple[str, ...]:
    query, output = ATTENTION
    return (LATENT_QUERY if latent else query, output, *(() if mixture else MLP))


def projection_sizes(layers: Iterable[nn.Module]) -> dict[str, tuple[int, int]]:
    """``layers.<i>.<module>`` -> inputs and outputs, for everything that an artifact of these layers holds. Raises Untrainable."""
    return {
        f"layers.{i}.{module}": (inner.in_features, inner.out_features)
        for i, layer in enumerate(layers)
        for module in adapted_modules(layer)
        for inner in (_linear(layer, module, i)[1],)
    }


def _linear(layer: nn.Module, module: str, i: int) -> tuple[nn.Module, nn.Linear]:
    """A projection of a decoder layer, and the part of the layer that has it. Raises Untrainable."""
    places = [getattr(layer, name, None) for name in ("self_attn", "mlp")]
    parent = next((part for part in places if hasattr(part, module)), None)
    inner = getattr(parent, module, None)
    if parent is None or not isinstance(inner, nn.Linear):
        number: Any = getattr(places[0], "layer_idx", i)
        raise Untrainable(f"layer {number} has no linear {module}; this family of models is not supported")
    return parent, inner


def add_low_rank(layers: Iterable[nn.Module], recipe: Recipe, device: torch.device, *, also: Sequence[str] = ()) -> Parameters:
    """Give every projection of every layer that takes one its low-rank term; the model itself is changed.

    Args:
        also: other linear modules of attention or the MLP.

    Returns:
        ``layers.<i>.<module>.A`` and ``.B``, to be trained. They begin as no change at all.

    Raises:
        Untrainable: a layer lacks one of the projections.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    parameters: Parameters = {}
    for i, layer in enumerate(layers):
        for module in (*adapted_modules(layer), *also):
            parent, inner = _linear(layer, module, i)
            made = LowRank(inner, recipe.rank, generator).to(device)
            setattr(parent, module, made)
            parameters |= {f"layers.{i}.{module}.A": made.A, f"layers.{i}.{module}.B": made.B}
    return parameters


def fit(
    parameters: Parameters,
    examples: Sequence[AnyExample],
    losses: Callable[[Sequence[AnyExample]], tuple[Tensor, Tensor]],
    recipe: Recipe,
    checkpoint: Path,
    report: Report,
    *,
    keep_weight: float = 1.0,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Train: AdamW, a warm start, a cosine down to zero.

    Args:
        losses: a batch -> what each place of what is forgotten costs, and each of what is kept, in nats; [N], [M], either may be
            empty.
        checkpoint: a file; what was trained with the same arguments goes on from it.

    Returns:
        The trained tensors as they are saved (float32, B with its scale), and both mean losses over the last epoch.

    Raises:
        Untrainable: the loss became infinite or nothing.
        OSError: the disk is full, or the like; the checkpoint before stays.
    """
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(examples) / recipe.batch_examples)
    steps = per_epoch * recipe.epochs
    first_epoch, means = _resume(checkpoint, parameters, optimizer)
    for epoch in range(first_epoch, recipe.epochs):
        order = _mixed(examples, random.Random(f"{recipe.seed}-{epoch}"))  # noqa: S311 - so that a resumed run is the same run
        sums, counts = [0.0, 0.0], [0, 0]
        for number in range(per_epoch):
            step = epoch * per_epoch + number
            warm = min(1.0, (step + 1) / (0.05 * steps + 1))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            forget, keep = losses(order[number * recipe.batch_examples : (number + 1) * recipe.batch_examples])
            loss = forget.new_zeros(())
            for i, (part, weight) in enumerate(((forget, 1.0), (keep, keep_weight))):
                if len(part):
                    loss = loss + weight * part.mean()
                sums[i] += float(part.detach().sum())
                counts[i] += len(part)
            if not torch.isfinite(loss):
                raise Untrainable(f"the loss became {float(loss.detach())} at step {step}; use a lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            report(Progress("train", step + 1, steps, float(loss.detach())))
        means = sums[0] / max(1, counts[0]), sums[1] / max(1, counts[1])
        _save(checkpoint, parameters, optimizer, epoch + 1, means)
    tensors = {
        name: (value.detach() * (LowRank.SCALE if name.endswith("B") else 1)).float().cpu().contiguous()
        for name, value in parameters.items()
    }
    return tensors, means


def _mixed(examples: Sequence[AnyExample], rng: random.Random) -> list[AnyExample]:
    """Shuffled, with what is forgotten spread evenly among what is kept: every batch has its share of both."""
    placed = []
    for is_forget in (True, False):
        group = [e for e in examples if e.forget is is_forget]
        rng.shuffle(group)
        placed += [((i + rng.random()) / len(group), e) for i, e in enumerate(group)]
    return [e for _, e in sorted(placed, key=lambda pair: pair[0])]


def _save(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, epochs: int, means: tuple[float, float]) -> None:
    state = {f"parameter.{name}": value.detach().contiguous() for name, value in parameters.items()}
    for name, value in parameters.items():
        state |= {f"{part}.{name}": optimizer.state[value][part].contiguous() for part in ("exp_avg", "exp_avg_sq")}
        state[f"step.{name}"] = optimizer.state[value]["step"].reshape(1)
    note = {"format": FORMAT, "note": json.dumps({"epochs": epochs, "losses": means})}
    write_whole(path, lambda temporary: save_file(state, temporary, note))


def _resume(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> tuple[int, tuple[float, float]]:
    """Restore the last checkpoint; returns how many epochs are done, and the mean losses of the last."""
    fresh = 0, (math.nan, math.nan)
    if not path.exists():
        return fresh
    with safe_open(path, "pt") as file, torch.no_grad():
        if (file.metadata() or {}).get("format") != FORMAT:
            return fresh
        note = json.loads(file.metadata()["note"])
        for name, value in parameters.items():
            value.copy_(file.get_tensor(f"parameter.{name}"))
            optimizer.state[value] = {
                part: file.get_tensor(f"{part}.{name}").to(value.device) for part in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[value]["step"] = file.get_tensor(f"step.{name}").reshape(())
    forget, keep = note["losses"]
    return int(note["epochs"]), (float(forget), float(keep))
