"""Places in the network where lethe looks or acts: operators that a compiler takes whole.

Hooks on the base's own modules call them: after the embedding, where a decoder layer is entered, after its projections. In a
compiled model the hooks are compiled with it, so they must stand there before that happens; in an eager one they come and go. What
is compiled holds the operators and their numbers and nothing else: who listens is found in vLLM's forward context when they run, as
vLLM's attention does it, so that a compiled model may be kept in vLLM's cache for the next start.

Covered: models whose layers take ``hidden_states``, and ``residual`` or not, by whatever place or name (`Entrance`). Those who
listen notice if nobody calls.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.utils.hooks import RemovableHandle
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available

from serve.protocol.wire import PLAN_KEY

STEERING, FORK = "lethe.steering", "lethe.fork"
"""Keys of the listeners in vLLM's ``static_forward_context``."""


class Steers(Protocol):
    """Changes its tensors in place. Shapes: T tokens, H hidden size."""

    def embedded(self, embeddings: Tensor) -> None:
        """[T, H], after the embedding."""

    def entered(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """[T, H] each, where a layer is entered."""

    def projected(self, site: int, inputs: Tensor, output: Tensor) -> None:
        """[T, I], [T, O], after the projection of a number."""


class Taps(Protocol):
    """Looks only."""

    def tap(self, hidden: Tensor, residual: Tensor | None) -> None:
        """[T, H] each, where the first forked layer is entered."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """How a decoder layer is called: models do not agree about the order. Numbers are places among its arguments."""

    hidden: int
    residual: int | None  # None: such layers add it themselves
    positions: str | None  # name of the argument

    @classmethod
    def of(cls, layer: nn.Module) -> Entrance | None:
        """None for layers without hidden states of that name."""
        names = list(inspect.signature(layer.forward).parameters)
        if "hidden_states" not in names:
            return None
        residual = names.index("residual") if "residual" in names else None
        return cls(names.index("hidden_states"), residual, next((each for each in POSITIONS if each in names), None))

    def streams(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """[T, H] hidden states and residual of a call; None if it brings others."""
        hidden: Any = args[self.hidden] if len(args) > self.hidden else kwargs.get("hidden_states")
        if not _is_stream(hidden):
            return None
        residual = args[self.residual] if self.residual is not None and len(args) > self.residual else kwargs.get("residual")
        return hidden, residual if isinstance(residual, Tensor) and residual.shape == hidden.shape else None


POSITIONS = ("positions", "position_ids")


def listen(key: str, listener: Steers | Taps, vllm_config: VllmConfig) -> None:
    """Let the operators of one engine find who listens."""
    vllm_config.compilation_config.static_forward_context[key] = cast("Any", listener)


def after_embedding(module: nn.Module) -> RemovableHandle:
    def leaving(_module: nn.Module, _args: Any, output: Any) -> None:
        if _is_stream(output):
            torch.ops.lethe.embedded(output)

    return module.register_forward_hook(leaving)


def before_layer(module: nn.Module, layer: int) -> RemovableHandle:
    entrance = Entrance.of(module)

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if entrance is not None and (streams := entrance.streams(args, kwargs)) is not None:
            torch.ops.lethe.entered(*streams, layer)

    # First of all hooks, so that the fork's tap sees what the layer sees, whichever was made first.
    return module.register_forward_pre_hook(entering, prepend=True, with_kwargs=True)


def after_projection(module: nn.Module, site: int) -> RemovableHandle:
    def leaving(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        if args and _is_stream(args[0]) and _is_stream(result):
            torch.ops.lethe.projected(args[0], result, site)

    module.requires_unquantized_input = True  # type: ignore[assignment]  # vLLM may quantise before the layer, where it may
    return module.register_forward_hook(leaving)


def before_fork(module: nn.Module) -> RemovableHandle:
    entrance = Entrance.of(module)

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if entrance is not None and (streams := entrance.streams(args, kwargs)) is not None:
            torch.ops.lethe.tapped(*streams)

    return module.register_forward_pre_hook(entering, with_kwargs=True)


def _is_stream(given: Any) -> bool:
    """Whether it is [T, something] of floating point numbers: what this model calls a layer with may be anything."""
    return isinstance(given, Tensor) and given.ndim == 2 and given.is_floating_point()


def mark(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Make what is compiled now another than what was compiled with hooks at other places, or with other operators.

    vLLM looks for it in its cache by a hash of the whole configuration.
    """
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    made_of = sha256(json.dumps([hooked, list(OPERATORS)]).encode()).hexdigest()
    cast("dict[str, Any]", vllm_config.additional_config)[PLAN_KEY]["sites"] = made_of


def _listening(key: str) -> Any:
    """None outside of a forward pass, where a runner makes embeddings of images, for instance."""
    return cast("Any", get_forward_context().no_compile_layers).get(key) if is_forward_context_available() else None


def embedded(embeddings: Tensor) -> None:
    if (steers := _listening(STEERING)) is not None:
        steers.embedded(embeddings)


def entered(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    if (steers := _listening(STEERING)) is not None:
        steers.entered(layer, hidden, residual)


def projected(inputs: Tensor, output: Tensor, site: int) -> None:
    if (steers := _listening(STEERING)) is not None:
        steers.projected(site, inputs, output)


def tapped(hidden: Tensor, residual: Tensor | None) -> None:
    if (taps := _listening(FORK)) is not None:
        taps.tap(hidden, residual)


OPERATORS = {
    "embedded(Tensor(a!) embeddings) -> ()": embedded,
    "entered(Tensor(a!) hidden, Tensor? residual, int layer) -> ()": entered,
    "projected(Tensor inputs, Tensor(a!) output, int site) -> ()": projected,
    # Declared as changing an input that it only reads: otherwise a compiler would drop the call.
    "tapped(Tensor(a!) hidden, Tensor? residual) -> ()": tapped,
}
"""By schema. A compiler sees what each may change, and nothing of what it does."""

_library = Library("lethe", "DEF")
for _schema, _operator in OPERATORS.items():
    _library.define(_schema)
    _library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
    _library._register_fake(_operator.__name__, lambda *_: None)
