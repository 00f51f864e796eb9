"""A steering artifact: what was fitted or trained for one set by one method, in one content-addressed file with its manifest.

Maps (``project``, ``steer``): ``into`` [H, r], ``out`` [r, H], ``center`` [H]. Adapters: ``layers.<i>.<module>.A`` [rank, in] and
``.B`` [out, rank], i from 0 (= base layer L - recipe.layers); B carries the scale. float32. No pickles, nothing executable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from guards import artifact_file
from guards.base_model import BaseModel, check_base
from guards.errors import InvalidArtifact, Untrainable
from guards.forget_set import Frozen
from guards.kinds import TrainingOrder
from guards.low_rank import expected_names
from guards.steering.declaration import Method

MAX_RANK = 512


class SteeringRecipe(Frozen):
    """How a set is steered. ``depth``, ``rank`` of maps; ``layers``, ``rank`` and the rest of adapters."""

    method: Method
    depth: float = Field(0.7, gt=0, lt=1, description="where a map acts, as a share of the layers")
    rank: int = Field(32, ge=1, le=MAX_RANK)
    layers: int = Field(8, ge=1, le=256, description="the last so many get an adapter")
    epochs: int = Field(6, ge=1, le=1_000)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    batch_examples: int = Field(8, ge=1, le=1_024)
    seed: int = 0


class DistillationTarget(Frozen):
    """An answer that a policy gave, and what else it could have said."""

    question: str
    tokens: tuple[int, ...] = Field(min_length=1, max_length=4_096)
    top: tuple[Annotated[tuple[tuple[int, float], ...], Field(min_length=1)], ...] = Field(
        description="at each place, (token, log-probability), the likeliest"
    )


class SteeringOrder(TrainingOrder):
    """The body of a call that fits or trains a steering artifact: ``recipe`` needs its ``method``."""

    recipe: SteeringRecipe
    distil: bool = Field(False, description="whether targets must be there")
    targets: tuple[DistillationTarget, ...] = Field(
        (), max_length=100_000, description="what a policy says, to be distilled into an adapter"
    )


def check_order(order: SteeringOrder, base: BaseModel) -> None:
    """Raise Untrainable for an order that cannot be carried out, or would make the opposite of what is wanted."""
    recipe, targets = order.recipe, order.targets
    if recipe.method == "adapter" and recipe.layers >= base.layers:
        raise Untrainable(f"recipe.layers is {recipe.layers}, the served model has {base.layers}; adapt fewer of them")
    if order.distil and not targets:  # without targets it would become an adapter that knows nothing
        raise Untrainable("there is nothing to distil: no targets came; the policy must answer the set's questions")
    if targets and recipe.method != "adapter":
        raise Untrainable(f"a policy can be distilled into an adapter, not by method {recipe.method!r}")
    if order.lora and (recipe.method != "adapter" or targets or order.distil):
        raise Untrainable("a LoRA adapter is imported as method 'adapter', without targets")
    broken = next((each for each in targets if len(each.top) != len(each.tokens)), None)
    if broken is not None:
        raise Untrainable(f"a target has {len(broken.tokens)} tokens and {len(broken.top)} distributions; one for each")


class SteeringManifest(Frozen):
    format: Literal["lethe-steering-1"] = "lethe-steering-1"
    base: BaseModel
    recipe: SteeringRecipe
    data: str = Field(description="sha256 of what it was made from")
    metrics: dict[str, float] = Field(default_factory=dict)

    @property
    def layer(self) -> int:
        """The base layer at whose entrance a map acts, or from which on an adapter does."""
        if self.recipe.method == "adapter":
            return self.base.layers - self.recipe.layers
        return max(1, min(self.base.layers - 1, round(self.recipe.depth * self.base.layers)))


class Steering:
    """A checked artifact in memory.

    Raises:
        InvalidArtifact: a tensor is missing, has another shape or dtype, or is not finite.
    """

    def __init__(self, manifest: SteeringManifest, tensors: Mapping[str, Tensor]) -> None:
        recipe, hidden = manifest.recipe, manifest.base.hidden_size
        maps = {"into", "out", "center"}
        expected = expected_names(tensors.keys(), recipe.layers) if recipe.method == "adapter" else maps
        if wrong := sorted(expected ^ tensors.keys()):
            raise InvalidArtifact(f"a steering artifact by {recipe.method} has other tensors: {wrong[0]} and its like")
        for name, tensor in tensors.items():
            if tensor.dtype is not torch.float32 or not torch.isfinite(tensor).all():
                raise InvalidArtifact(f"{name} must be finite float32 (got {tensor.dtype}); make it again")
        if recipe.method == "adapter":
            fits = all(tensor.ndim == 2 and recipe.rank == tensor.shape[name.endswith("B")] for name, tensor in tensors.items())
        else:
            into, out, center = (tensors[name] for name in ("into", "out", "center"))
            fits = into.ndim == out.ndim == 2 and into.shape == out.T.shape == (hidden, into.shape[1]) and center.shape == (hidden,)
        if not fits:
            shapes = {name: tuple(tensor.shape) for name, tensor in list(tensors.items())[:3]}
            raise InvalidArtifact(f"shapes {shapes} do not fit a model of {hidden} hidden units at rank {recipe.rank}")
        self.manifest = manifest
        self.tensors = {name: tensors[name] for name in sorted(tensors)}

    @property
    def fingerprint(self) -> str:
        """sha256 of manifest and tensors."""
        return artifact_file.fingerprint_of(self.manifest, self.tensors)

    @property
    def kind(self) -> str:
        """As the registry names it."""
        return self.manifest.recipe.method

    @property
    def rank(self) -> int:
        """Of its map, or of each of its low-rank terms."""
        return self.manifest.recipe.rank if self.kind == "adapter" else self.tensors["into"].shape[1]

    @property
    def summary(self) -> str:
        """How large it is and how training went, for people."""
        return artifact_file.summary_of(self.size_bytes, self.manifest.metrics)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * 4 for tensor in self.tensors.values())

    def save(self, path: Path) -> None:
        """Raises OSError; the caller makes it atomic."""
        artifact_file.write(path, self.manifest, self.tensors)

    @staticmethod
    def load(path: Path) -> Steering:
        """Read and check a file. Raises InvalidArtifact."""
        return Steering(*artifact_file.read(path, SteeringManifest, "steering artifact"))

    def check(self, base: BaseModel) -> None:
        """Raise InvalidArtifact, naming both, if it was made for another base model."""
        check_base(self.manifest.base, base, f"steering artifact {self.fingerprint[:12]}")
