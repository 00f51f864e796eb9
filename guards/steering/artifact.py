"""A steering artifact: what was fitted or trained for one set by one method, in one content-addressed file with its manifest.

Maps (``project``, ``steer``): ``into`` [H, r], ``out`` [r, H], ``center`` [H]. Adapters: ``layers.<i>.<module>.A`` [rank, in] and
``.B`` [out, rank], i from 0 (= base layer L - recipe.layers); B carries the scale. float32. No pickles, nothing executable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from guards import artifact_file
from guards.base_model import BaseModel, check_base
from guards.errors import InvalidArtifact
from guards.forget_set import Frozen
from guards.policy import Method

MODULES = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
        if recipe.method == "adapter":
            expected = {f"layers.{i}.{module}.{factor}" for i in range(recipe.layers) for module in MODULES for factor in "AB"}
        else:
            expected = {"into", "out", "center"}
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
