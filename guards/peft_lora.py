"""LoRA adapters in PEFT's format, as researchers publish forget-tuned and unlearned models: read, run, and taken apart.

Covered: low-rank terms on linear projections of attention and the MLP, of every layer or some, with ranks and scales of their own.
Not covered: what changes other weights as well (DoRA, biases, embeddings, whole modules): it is refused by name.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint (``adapter_config.json``, ``adapter_model.safetensors``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from guards.errors import InvalidArtifact

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<projection>\w+)$")
_ALIEN = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "eva_config",
)
"""Settings of PEFT that make an adapter more than low-rank terms."""


@dataclass(frozen=True, slots=True)
class Term:
    """What is added to one projection: ``x @ a.T @ b.T``; b carries the scale."""

    module: str  # its place in the model
    layer: int
    projection: str
    a: Tensor  # [r, in] float32
    b: Tensor  # [out, r] float32


@dataclass(frozen=True, slots=True)
class PeftLora:
    """One adapter."""

    terms: tuple[Term, ...]
    fingerprint: str  # sha256 of both files

    @staticmethod
    def read(directory: Path) -> PeftLora:
        """Raises InvalidArtifact: it is none, or one that cannot be run here; the message says why."""
        try:
            written = (directory / CONFIG).read_bytes()
            config = json.loads(written)
            tensors = load_file(directory / WEIGHTS)
            told = hashlib.sha256(written + (directory / WEIGHTS).read_bytes()).hexdigest()
        except (OSError, ValueError, SafetensorError) as error:
            raise InvalidArtifact(f"{directory} is no adapter in PEFT's format ({CONFIG} and {WEIGHTS}): {error}") from None
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else None
            raise InvalidArtifact(f"{directory} is of kind {kind!r}; only LORA adapters can be imported")
        if alien := [name for name in _ALIEN if config.get(name)]:
            raise InvalidArtifact(
                f"{directory} sets {alien[0]}, so it changes more than low-rank terms can; merge it and train anew"
            )
        if config.get("bias", "none") != "none":
            raise InvalidArtifact(f"{directory} changes biases (bias {config['bias']!r}); train it with bias 'none'")
        return PeftLora(tuple(_terms(directory, config, tensors)), told)

    def check(self, model: nn.Module) -> None:
        """Raise InvalidArtifact, naming the projection, if a term does not fit into a model of transformers."""
        layers = list(model.get_decoder().layers)  # type: ignore[operator]
        for term in self.terms:
            try:
                module = model.get_submodule(term.module)
            except AttributeError:
                raise InvalidArtifact(f"the adapter changes {term.module}, which the served model does not have") from None
            if term.layer >= len(layers) or all(module is not each for each in layers[term.layer].modules()):
                raise InvalidArtifact(
                    f"the adapter changes {term.module}, which is not in the language model's layers (but in a vision tower, for "
                    "instance); only those can be imported"
                )
            shape = getattr(getattr(module, "weight", None), "shape", None)
            if not isinstance(module, nn.Linear) or shape != (len(term.b), term.a.shape[1]):
                raise InvalidArtifact(
                    f"the adapter maps {term.a.shape[1]} to {len(term.b)} in {term.module}, where the served model has "
                    f"{'x'.join(map(str, reversed(shape))) if shape else type(module).__name__}; it was made for another model"
                )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, a model of transformers computes with the adapter. Its weights stay as they are."""
        handles = []
        for term in self.terms:
            module = model.get_submodule(term.module)
            a, b = term.a.to(next(module.parameters())), term.b.to(next(module.parameters()))

            def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return output + (inputs[0] @ a.T) @ b.T

            handles.append(module.register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def as_last_layers(self, first: int, expected: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Tensor], int] | None:
        """The adapter as an artifact's tensors, exactly; None if it changes more than such an artifact can.

        Args:
            first: the layer of the model from which on an artifact acts.
            expected: ``layers.<i>.<projection>`` (i from 0 = ``first``), all that it holds -> their inputs and outputs.

        Returns:
            ``layers.<i>.<projection>.A`` and ``.B``, zero where the adapter changes nothing; and their rank.
        """
        mine = {f"layers.{term.layer - first}.{term.projection}": term for term in self.terms if term.b.any() and term.a.any()}
        if not mine.keys() <= expected.keys():
            return None
        rank = max((len(term.a) for term in mine.values()), default=1)
        tensors: dict[str, Tensor] = {}
        for name, (inputs, outputs) in expected.items():
            a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
            if (term := mine.get(name)) is not None:
                a[: len(term.a)], b[:, : len(term.a)] = term.a, term.b
            tensors |= {f"{name}.A": a, f"{name}.B": b}
        return tensors, rank


def _terms(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Term]:
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or _LAYER.search(match["module"]) is None:
            raise InvalidArtifact(f"{directory} changes {name}; only projections of attention and the MLP can be imported")
        if tensor.ndim != 2 or not torch.isfinite(tensor).all():
            raise InvalidArtifact(f"{name} in {directory} must be a finite matrix")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor.float()
    if not factors:
        raise InvalidArtifact(f"{directory} changes nothing")
    for module, both in sorted(factors.items()):
        if both.keys() != {"A", "B"} or len(both["A"]) != both["B"].shape[1]:
            raise InvalidArtifact(f"{directory} has no two factors of one rank for {module}")
        place = _LAYER.search(module)
        assert place is not None, "checked above"
        rank = len(both["A"])
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        yield Term(module, int(place["layer"]), place["projection"], both["A"], both["B"] * scale)


def _pattern(patterns: Any, module: str, usual: float) -> float:
    """PEFT's own rule: the first pattern that the module's name ends with."""
    found = next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), usual)
    return float(found)
