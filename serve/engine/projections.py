"""Low-rank terms on vLLM's linear layers, which pack several projections into one and split them over processes.

A projection that is split by its outputs (query, gate, up) takes the rows of B that belong to this process. One that is split by
its inputs (attention's output, the MLP's) takes the columns of A; what A gives, no wider than the rank, is then summed over the
processes, as the base's own output has been.

Covered: the projections of the Llama, Qwen, Gemma, GPT-OSS and DeepSeek lines among others. Not covered: experts of a mixture,
which have no layer of their own, shared ones among them; attention beside them is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce

from guards.errors import InvalidArtifact
from guards.low_rank import LATENT_QUERY, adapted_modules


@dataclass(frozen=True, slots=True)
class Part:
    """One projection, as far as it is in this process's layer."""

    name: str  # as artifacts know it
    size: tuple[int, int]  # the whole projection's inputs and outputs
    inputs: slice  # of them, what this process's input holds
    outputs: slice  # of them, what this process's output holds
    columns: slice  # where in this process's output they stand
    summed: bool  # whether the inputs are split, so that the processes' terms must be added up

    def term(self, tensors: Mapping[str, Tensor], layer: int, like: Tensor) -> LowRankTerm:
        """An artifact's term on it. ``tensors``: A [r, inputs] and B [outputs, r], see `check`."""
        a, b = (tensors[f"layers.{layer}.{self.name}.{factor}"] for factor in "AB")
        return LowRankTerm(
            a[:, self.inputs].to(like).T.contiguous(), b[self.outputs].to(like).T.contiguous(), self.columns, self.summed
        )

    def empty(self, rank: int, like: Tensor) -> LowRankTerm:
        """A term of zeros, to be written into."""
        inputs, outputs = (
            len(range(*each.indices(size))) for each, size in zip((self.inputs, self.outputs), self.size, strict=True)
        )
        return LowRankTerm(like.new_zeros(inputs, rank), like.new_zeros(rank, outputs), self.columns, self.summed)

    def check(self, tensors: Mapping[str, Tensor], layer: int, artifact: str) -> None:
        """Raise InvalidArtifact, naming ``artifact``, if its term has another size."""
        a, b = (tensors[f"layers.{layer}.{self.name}.{factor}"] for factor in "AB")
        if (a.shape[1], b.shape[0]) != self.size:
            raise InvalidArtifact(
                f"{self.name} in layer {layer} of {artifact} maps {a.shape[1]} to {b.shape[0]}, "
                f"the served model's {self.size[0]} to {self.size[1]}; train it again on this server"
            )


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """What is added to some columns of a layer's output."""

    a: Tensor  # [I, r], I inputs of this process
    b: Tensor  # [r, O], O columns
    columns: slice
    summed: bool

    def __call__(self, x: Tensor, strength: Tensor | None = None) -> Tensor:
        """[N, O] for inputs [N, I]. With several processes all must call it alike.

        Args:
            strength: [N, 1] or [N, r], of each input or each of its ranks; None = 1.
        """
        low = x @ self.a
        if self.summed:
            low = tensor_model_parallel_all_reduce(low)
        if strength is not None:
            scaled = (low * strength).to(low.dtype)
            # inf * 0 is not a number, and the token may be another request's.
            low = torch.where(strength == 0, 0, scaled) if low.dtype is torch.float16 else scaled
        return low @ self.b


@dataclass(frozen=True, slots=True)
class Projection:
    """One of the base's linear layers that takes low-rank terms."""

    module: nn.Module
    layer: int  # of the decoder
    parts: tuple[Part, ...]


def projections_of(layers: Iterable[nn.Module]) -> list[Projection]:
    """Of decoder layers, in an order that depends on the model alone."""
    return [
        Projection(module, i, parts)
        for i, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if "expert" not in name and (parts := adapted_parts(layer, name.rpartition(".")[2], module))
    ]


def why_not_adapted(layer: nn.Module, parts: Iterable[Part]) -> str | None:
    """What a decoder layer lacks to take low-rank terms, "has no up_proj" for instance; None if it takes them."""
    missing = set(adapted_modules(layer)) - {part.name for part in parts}
    return f"has no {min(missing)} of a kind that can be adapted" if missing else None


def check_parts(parts: Sequence[Part], tensors: Mapping[str, Tensor], layer: int, artifact: str) -> None:
    """Raise InvalidArtifact, naming ``artifact``, if its terms in a layer are on other projections, or of other sizes."""
    of_layer = f"layers.{layer}."
    mine, its = {part.name for part in parts}, {name.split(".")[2] for name in tensors if name.startswith(of_layer)}
    if mine != its:
        where = ", ".join(sorted(mine ^ its))
        raise InvalidArtifact(f"layer {layer} of {artifact} and the served model's differ in {where}; train it again")
    for part in parts:
        part.check(tensors, layer, artifact)


def adapted_parts(decoder: nn.Module, name: str, layer: nn.Module) -> tuple[Part, ...]:
    """Of one of a decoder layer's linear layers, the projections that artifacts adapt: beside experts, attention's alone."""
    return tuple(part for part in parts_of(name, layer) if part.name in adapted_modules(decoder))


def parts_of(name: str, layer: nn.Module) -> tuple[Part, ...]:
    """The projections in one of vLLM's linear layers that take low-rank terms; () for layers of another kind."""
    child: Any = layer
    processes, number = int(getattr(layer, "tp_size", 1)), int(getattr(layer, "tp_rank", 0))

    def by_outputs(part: str, whole: int, first: int) -> Part:
        mine = whole // processes
        outputs, columns = slice(number * mine, (number + 1) * mine), slice(first, first + mine)
        return Part(part, (int(child.input_size), whole), slice(None), outputs, columns, summed=False)

    if name == "qkv_proj":
        return (by_outputs("q_proj", int(child.total_num_heads * child.head_size), 0),)
    if name in ("q_proj", LATENT_QUERY):
        return (by_outputs(name, int(child.output_size), 0),)
    if name == "gate_up_proj":
        gate, up = child.output_sizes
        return by_outputs("gate_proj", gate, 0), by_outputs("up_proj", up, gate // processes)
    if name in ("o_proj", "down_proj"):
        size = int(child.input_size), int(child.output_size)
        mine = size[0] // processes
        inputs = slice(number * mine, (number + 1) * mine)
        summed = processes > 1 and bool(getattr(layer, "reduce_results", True))  # else the model sums what we add, too
        return (Part(name, size, inputs, slice(None), slice(None), summed),)
    return ()
