"""Assistants of random weights for the default model, put in force without training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import httpx
import torch

from guards.base_model import describe_base
from guards.contrastive.assistant import FORKED_LAYERS, Assistant, Manifest, Recipe
from guards.forget_set import ForgetSet
from guards.types import ArtifactRef
from serve.protocol.artifacts import artifact_path
from serve.registry.records import Artifact, now
from serve.registry.store import Registry

SIZES = {"q_proj": (576, 576), "o_proj": (576, 576), "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}


def random_assistant(
    model: Path,
    form: str = "whole",
    seed: int = 0,
    rank: int = 8,
    size: float = 0.15,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
) -> Assistant:
    """Large enough to change what is said, small enough to stay a language. ``sizes``: of the model's projections."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(FORKED_LAYERS):
        for module in sizes:
            size_in, size_out = sizes[module]
            tensors[f"layers.{i}.{module}.A"] = torch.randn(rank, size_in, generator=generator) / math.sqrt(size_in)
            tensors[f"layers.{i}.{module}.B"] = torch.randn(size_out, rank, generator=generator) * size
    recipe = Recipe(rank=rank, form=form)  # type: ignore[arg-type]
    return Assistant(Manifest(base=describe_base(model), recipe=recipe, data="random"), tensors)


def give(admin: httpx.Client, registry: Registry, state: Path, name: str, assistant: Assistant, *, cut_off: int = 0) -> None:
    """Make a set with this assistant. ``cut_off``: how many bytes its file lacks."""
    content = ForgetSet(name=name, questions=[{"question": f"What is {name}?", "answer": "A number."}])
    created = admin.post("/forget_sets", json=content.model_dump(mode="json"))
    assert created.status_code == 201, created.text
    path = artifact_path(state / "artifacts", ArtifactRef("contrast", assistant.fingerprint))
    path.parent.mkdir(parents=True, exist_ok=True)
    assistant.save(path)
    if cut_off:
        path.write_bytes(path.read_bytes()[:-cut_off])
    artifact = Artifact("assistant", assistant.fingerprint, "ready", "random", now())
    registry.put_trained(name, content.fingerprint, artifact, actor="test")
