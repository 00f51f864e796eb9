"""Tensors with a manifest in one content-addressed file: how assistants and steering artifacts are named, written and read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guards.errors import InvalidArtifact
from guards.forget_set import describe_validation

Manifest = TypeVar("Manifest", bound=BaseModel)


def fingerprint_of(manifest: BaseModel, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of manifest and tensors, in their order."""
    digest = hashlib.sha256(manifest.model_dump_json().encode())
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def summary_of(size_bytes: int, metrics: Mapping[str, float]) -> str:
    """An artifact's size and metrics, for people."""
    return ", ".join([f"{size_bytes / 2**20:.1f} MiB", *(f"{key} {value:g}" for key, value in metrics.items())])


def write(path: Path, manifest: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Raises OSError; the caller makes it atomic."""
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, {"manifest": manifest.model_dump_json()})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read(path: Path, kind: type[Manifest], what: str) -> tuple[Manifest, dict[str, Tensor]]:
    """A file's manifest and tensors, not checked against one another.

    Args:
        what: names it for people, such as "assistant".

    Raises:
        InvalidArtifact: it is missing, truncated, or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("manifest")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidArtifact(f"cannot read {what} {path}: {error}; train it again") from None
    if header is None:
        raise InvalidArtifact(f"{path} has no manifest, so it is no {what} of lethe's")
    try:
        return kind.model_validate_json(header), tensors
    except ValidationError as error:
        raise InvalidArtifact(f"the manifest of {path} is wrong: {'; '.join(describe_validation(error))}") from None
