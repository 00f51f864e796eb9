"""The assistant: low-rank adapters for the base's last K decoder layers, in one content-addressed file with its manifest.

Tensors: ``layers.<i>.<module>.A`` [rank, in] and ``.B`` [out, rank], i from 0 (= base layer L - K) to K - 1; which modules, see
`guards.low_rank.expected_names`. float32; B already carries the scale. The manifest (JSON, in the file's header) says for which
base model, by which recipe, from which data and how well. No pickles, nothing executable.
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
from guards.errors import InvalidArtifact, Untrainable
from guards.forget_set import Frozen
from guards.kinds import TrainingOrder
from guards.low_rank import expected_names

MAX_RANK = 512
FORKED_LAYERS = 4
"""K in a server. Assistants of another depth are refused: one fork serves all of them in one pass."""


class Recipe(Frozen):
    """How an assistant is trained. The defaults suit some dozens of questions."""

    layers: int = Field(FORKED_LAYERS, ge=1, le=256, description="K, how many of the base's last layers are forked")
    rank: int = Field(32, ge=1, le=MAX_RANK)
    epochs: int = Field(14, ge=1, le=1_000)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    batch_examples: int = Field(8, ge=1, le=1_024)
    retain_weight: float = Field(1.0, ge=0, le=1_000)
    form: Literal["whole", "difference"] = Field("whole", description="what is trained to recall: see `train`")
    seed: int = 0


class AssistantOrder(TrainingOrder):
    """The body of a call that trains an assistant: everything has a default."""

    recipe: Recipe = Field(default_factory=Recipe)


def check_order(order: AssistantOrder, _: BaseModel) -> None:
    """Raise Untrainable if no server could use what this would make."""
    if order.recipe.layers != FORKED_LAYERS:
        raise Untrainable(
            f"recipe.layers is {order.recipe.layers}, this server forks the last {FORKED_LAYERS} layers; leave it out"
        )


class Manifest(Frozen):
    format: Literal["lethe-assistant-1"] = "lethe-assistant-1"
    base: BaseModel
    recipe: Recipe
    data: str = Field(description="sha256 of what it was trained on")
    metrics: dict[str, float] = Field(default_factory=dict)


class Assistant:
    """A checked assistant in memory.

    Raises:
        InvalidArtifact: a tensor is missing, has another shape or dtype, or is not finite. Nothing half-checked gets out.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        if missing := sorted(expected_names(tensors.keys(), manifest.recipe.layers) ^ tensors.keys()):
            raise InvalidArtifact(f"an assistant of {manifest.recipe.layers} layers has other tensors: {missing[0]} and its like")
        for name, tensor in tensors.items():
            if tensor.dtype is not torch.float32 or tensor.ndim != 2:
                raise InvalidArtifact(f"{name} must be a float32 matrix (got {tensor.dtype}, shape {tuple(tensor.shape)})")
            if tensor.shape[0 if name.endswith("A") else 1] != manifest.recipe.rank:
                raise InvalidArtifact(f"{name} has shape {tuple(tensor.shape)}, the manifest says rank {manifest.recipe.rank}")
            if not torch.isfinite(tensor).all():
                raise InvalidArtifact(f"{name} holds NaN or infinity; train the assistant again")
        self.manifest = manifest
        self.tensors = {name: tensors[name] for name in sorted(tensors)}

    @property
    def fingerprint(self) -> str:
        """sha256 of manifest and tensors."""
        return artifact_file.fingerprint_of(self.manifest, self.tensors)

    kind = "assistant"

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
    def load(path: Path) -> Assistant:
        """Read and check a file.

        Raises:
            InvalidArtifact: it is missing, truncated, of another kind, or does not keep what the manifest says.
        """
        return Assistant(*artifact_file.read(path, Manifest, "assistant"))

    def check(self, base: BaseModel) -> None:
        """Raise InvalidArtifact, naming both, if the assistant was made for another base model."""
        check_base(self.manifest.base, base, f"assistant {self.fingerprint[:12]}")
