"""Steering inside vLLM's own model: hooks on the base's layers and projections that act on the tokens of some requests only.

Before a forward pass, the tokens of the batch are sorted by what is to be done to them: for each artifact the indices of its
tokens, and the tokens whose embeddings are corrupted. The hooks read those indices, so that rows of other requests are bit for bit
what they would be without, and a pass in which nobody is steered does not even enter them. There is Python for each plan in the
batch, as in the tracker, and none for each row or token. Whatever did not act although it should have is not called loaded again:
its rows are closed.

Keys and values of steered tokens differ, so that such requests carry a salt (`Plan.cache_salt`); the late fork reads what the
steered base wrote and so composes with this.

Covered: models of plain decoder layers whose projections `serve.engine.projections` knows, eager, also split over processes. Not
covered, and refused when an artifact is loaded: compiled models and CUDA graphs. For graphs the indices would become a mask of
fixed address and width, [T] for each of a fixed number of artifact slots, filled by the tracker as tags are, and the low-rank terms
a batched product over slots; the arithmetic here is written so that only the indexing changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from guards.errors import InvalidArtifact
from guards.steering.artifact import MODULES, Steering
from guards.steering.declaration import Corrupt, Corruption, Steer
from guards.steering.operators import corrupt, redirect
from guards.types import Plan
from serve.engine.fork import Unforkable, decoder_of, refuse_lora
from serve.engine.projections import LowRankTerm, Part, parts_of

logger = logging.getLogger(__name__)


class Unsteerable(Unforkable):
    """The served model or its engine cannot be steered."""


class Steerer:
    """One per engine. Shapes: T tokens, N tokens of one artifact, H hidden size.

    Args:
        model: vLLM's model, guarded or not.

    Raises:
        Unsteerable: says what the model or the engine lacks.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        refuse_lora(vllm_config, "steering does")
        if not vllm_config.model_config.enforce_eager:
            raise Unsteerable("steering does not run in compiled models yet; start with --enforce-eager")
        inner = decoder_of(model)
        if not hasattr(inner, "layers") or not hasattr(model, "embed_input_ids"):
            raise Unsteerable(f"{type(model).__name__} has no plain stack of decoder layers, so it cannot be steered")
        self._embed = cast("Any", model).embed_input_ids
        self._like = torch.empty(0, dtype=vllm_config.model_config.dtype, device=next(model.parameters()).device)
        self._layers: list[nn.Module] = list(inner.layers)
        self._loaded: dict[str, Steering] = {}
        self._maps: dict[int, list[tuple[str, Tensor, Tensor, Tensor]]] = {}  # layer -> artifact, into, out, center
        self._terms: dict[nn.Module, dict[str, list[LowRankTerm]]] = {}
        self._hooks: list[Any] = []
        self._groups: list[tuple[str, float, Tensor]] = []  # artifact, strength, [N] its tokens in this pass
        self._acted: set[str] = set()  # artifacts that a hook of this pass applied
        self._idle: set[str] = set()  # those that were to act and were not reached: this model computes in another way
        self._alone = vllm_config.parallel_config.tensor_parallel_size == 1
        self._failed = False  # whether a hook of this pass could not do what it should

    def able(self, plan: Plan) -> bool:
        """Whether everything that a plan asks for can be done."""
        return all(each.artifact in self._loaded and each.artifact not in self._idle for each in plan.of(Steer))

    def check(self, steering: Steering) -> None:
        """Raise InvalidArtifact if an artifact's tensors do not fit the served model."""
        first = steering.manifest.layer
        if steering.manifest.recipe.method != "adapter":
            return
        if first < 1:
            layers = steering.manifest.recipe.layers
            raise InvalidArtifact(f"an adapter over {layers} layers needs a deeper model than this one")
        for i, layer in enumerate(self._layers[first:]):
            found = [part for _, parts in _projections(layer) for part in parts]
            if missing := set(MODULES) - {part.name for part in found}:
                raise InvalidArtifact(f"layer {first + i} has no {min(missing)} of its own kind, so no adapter can act on it")
            for part in found:
                part.check(steering.tensors, i, f"adapter {steering.fingerprint[:12]}")

    def load(self, artifacts: Mapping[str, Steering]) -> None:
        """Make exactly these, by fingerprint, the loaded ones. They have passed `check`. Hooks stand only where one acts."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._maps, self._terms, self._loaded = [], {}, {}, {}
        like = self._like
        for name, steering in sorted(artifacts.items()):  # in an order that no history decides
            layer, tensors = steering.manifest.layer, steering.tensors
            if steering.manifest.recipe.method != "adapter":
                into, out, center = (tensors[part].to(like.device) for part in ("into", "out", "center"))
                self._maps.setdefault(layer, []).append((name, into, out, center))
                continue
            for i, decoder in enumerate(self._layers[layer:]):
                for module, parts in _projections(decoder):
                    self._terms.setdefault(module, {})[name] = [part.term(tensors, i, like) for part in parts]
        for layer in self._maps:
            # First of all hooks, so that the fork's tap sees what the layer sees, whichever was made first.
            self._hooks.append(
                self._layers[layer].register_forward_pre_hook(
                    lambda _, args, kwargs, layer=layer: self._tried(self._redirected, layer, args, kwargs),
                    prepend=True,
                    with_kwargs=True,
                )
            )
        self._hooks += [module.register_forward_hook(partial(self._tried, self._adapted)) for module in self._terms]
        self._loaded = dict(artifacts)  # only now are they all there

    def begin(
        self,
        slots: Tensor,
        plans: Sequence[Plan | None],
        input_ids: Tensor | None,
        positions: Tensor,
        embeddings: Tensor | None = None,
    ) -> Tensor | None:
        """Before the forward pass: sort its tokens by what is to be done to them.

        Args:
            slots: [T] int64, -1 = unguarded; plans: by slot. input_ids, positions: [T].
            embeddings: [T, H], if the runner made them (of images, say).

        Returns:
            [T, H] embeddings to start from, or None for the model's own.
        """
        self._groups, self._acted, self._failed = [], set(), False
        wanted: dict[tuple[str, float], list[int]] = {}
        corrupted: list[int] = []
        for slot, plan in enumerate(plans):
            if plan is not None:
                for each in plan.of(Steer):
                    if each.artifact in self._loaded:
                        wanted.setdefault((each.artifact, each.strength), []).append(slot)
                if any(each.spans for each in plan.of(Corrupt)):
                    corrupted.append(slot)
        for (artifact, strength), its in wanted.items():
            index = torch.isin(slots, slots.new_tensor(its)).nonzero().squeeze(1)
            if len(index):
                self._groups.append((artifact, strength, index))
        if not corrupted or input_ids is None:
            return None
        chosen = [(slot, cast("Plan", plans[slot])) for slot in corrupted]
        return self._corrupted(slots, chosen, input_ids, positions, embeddings)

    def end(self) -> bool:
        """After the base: what runs on its layers from now on (the fork) is nobody's to steer. Returns whether all was done."""
        if idle := {artifact for artifact, _, _ in self._groups} - self._acted:
            self._idle |= idle
            logger.error("lethe: %s did not act on this model's layers; its requests are closed", ", ".join(sorted(idle)))
        self._groups = []
        return not self._failed

    def _corrupted(
        self,
        slots: Tensor,
        plans: Sequence[tuple[int, Plan]],
        input_ids: Tensor,
        positions: Tensor,
        embeddings: Tensor | None,
    ) -> Tensor | None:
        made: Tensor | None = None
        for slot, plan in plans:
            [settings] = plan.of(Corrupt)
            spans = positions.new_tensor(settings.spans)  # [S, 2]
            inside = ((positions[:, None] >= spans[:, 0]) & (positions[:, None] < spans[:, 1])).any(dim=1)
            index = (inside & (slots == slot)).nonzero().squeeze(1)
            if not len(index):
                continue
            if made is None:
                made = (self._embed(input_ids) if embeddings is None else embeddings).clone()
            made[index] = corrupt(
                made[index],
                positions[index],
                kind=cast("Corruption", settings.kind),
                strength=settings.strength,
                first_n=settings.first_n,
                seed=settings.seed,
            )
        return made

    def _tried(self, act: Callable[..., Any], *args: Any) -> Any:
        """What a hook does; if it cannot, the base goes on as it is, and what was to be steered is closed."""
        try:
            return act(*args)
        except Exception:
            if not self._failed:
                logger.exception("lethe: a layer could not be steered")
            if not self._alone:
                raise  # see `Context.stop_unless_alone`
            self._failed = True
            return None

    def _redirected(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Where tokens enter a layer that has maps: (positions, hidden, residual or not, ...). One map after the other."""
        if not self._groups or len(args) < 2:
            return None
        positions, hidden, *rest = args
        residual = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].shape == hidden.shape else None
        moved = None
        for name, into, out, center in self._maps[layer]:
            for artifact, strength, index in self._groups:
                if artifact == name:
                    moved = hidden.clone() if moved is None else moved
                    stream = moved[index] if residual is None else moved[index] + residual[index]
                    shift = redirect(stream, into=into, out=out, center=center, strength=strength)
                    moved.index_add_(0, index, shift.to(hidden.dtype))
                    self._acted.add(name)
        return None if moved is None else ((positions, moved, *rest), kwargs)

    def _adapted(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a projection that has adapters: its output is written into."""
        if not self._groups:
            return
        result = output[0] if isinstance(output, tuple) else output
        for artifact, strength, index in self._groups:
            if artifact in self._terms[module]:
                self._acted.add(artifact)
            for term in self._terms[module].get(artifact, ()):
                added = term(args[0][index])
                result[:, term.columns].index_add_(0, index, added.to(result.dtype), alpha=strength)


def _projections(layer: nn.Module) -> list[tuple[nn.Module, tuple[Part, ...]]]:
    """A decoder layer's projections that take low-rank terms."""
    found = [(module, parts_of(name.rpartition(".")[2], module)) for name, module in layer.named_modules()]
    return [(module, parts) for module, parts in found if parts]
