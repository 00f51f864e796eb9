"""Where steering acts: operators at fixed places of the network, which a compiler takes whole.

Hooks on the base's own modules call them: where a decoder layer is entered, after its projections, after the embedding. In a
compiled model the hooks are compiled with it, so they stand at every such place before that happens; in an eager one only where
something acts. An operator finds who is to act (`Acting`) in vLLM's forward context, as vLLM's attention does.

Covered: models that call their layers with ``(positions, hidden, residual or not, ...)``. One that does not is noticed, since nobody
acts in it.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.utils.hooks import RemovableHandle
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available

KEY = "lethe.steering"


class Acting(Protocol):
    """Who acts. Each changes its tensor in place. Shapes: T tokens, H hidden size."""

    def embedded(self, embeddings: Tensor) -> None:
        """[T, H], after the embedding."""

    def entered(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """[T, H] each, where a layer is entered."""

    def projected(self, site: int, inputs: Tensor, output: Tensor) -> None:
        """[T, I], [T, O], after the projection of a number."""


def enlist(acting: Acting, vllm_config: VllmConfig) -> None:
    """Let the operators of one engine find who acts."""
    vllm_config.compilation_config.static_forward_context[KEY] = cast("Any", acting)


def hook_embedding(module: nn.Module) -> RemovableHandle:
    return module.register_forward_hook(lambda _module, _args, output: torch.ops.lethe.after_embedding(output))


def hook_layer(module: nn.Module, layer: int) -> RemovableHandle:
    def entering(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) < 2:
            return
        hidden, rest = args[1], args[2:]
        residual = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].shape == hidden.shape else None
        torch.ops.lethe.before_layer(hidden, residual, layer)

    # First of all hooks, so that the fork's tap sees what the layer sees, whichever was made first.
    return module.register_forward_pre_hook(entering, prepend=True)


def hook_projection(module: nn.Module, site: int) -> RemovableHandle:
    def leaving(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.ops.lethe.after_projection(args[0], output[0] if isinstance(output, tuple) else output, site)

    return module.register_forward_hook(leaving)


def _acting() -> Acting | None:
    """None outside of a forward pass: a runner makes embeddings of images there."""
    return cast("Any", get_forward_context().no_compile_layers).get(KEY) if is_forward_context_available() else None


def after_embedding(embeddings: Tensor) -> None:
    if (acting := _acting()) is not None:
        acting.embedded(embeddings)


def before_layer(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    if (acting := _acting()) is not None:
        acting.entered(layer, hidden, residual)


def after_projection(inputs: Tensor, output: Tensor, site: int) -> None:
    if (acting := _acting()) is not None:
        acting.projected(site, inputs, output)


OPERATORS = {
    "after_embedding(Tensor(a!) embeddings) -> ()": after_embedding,
    "before_layer(Tensor(a!) hidden, Tensor? residual, int layer) -> ()": before_layer,
    "after_projection(Tensor inputs, Tensor(a!) output, int site) -> ()": after_projection,
}
"""By schema. The compiler sees what each may change, and nothing of what it does."""

_library = Library("lethe", "DEF")
for _schema, _operator in OPERATORS.items():
    _library.define(_schema)
    _library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
    _library._register_fake(_operator.__name__, lambda *_: None)
