"""Steering inside vLLM's own model: what is done, at the places of `serve.engine.sites`, to the tokens of some requests.

Before a forward pass each artifact that somebody in the batch names gets its strength at every token, [T], 0 where it is
nobody's; what an artifact changes is multiplied by it. So nothing waits for the device, rows of other requests are what they would
be without, and a pass in which nobody is steered is not entered. There is Python for each plan in the batch, as in the tracker, and
none for each row or token. Artifacts that should have acted and did not are never used again: their rows are closed.

Keys and values of steered tokens differ, so that such requests carry a salt (`Plan.cache_salt`); the late fork reads what the
steered base wrote and so composes with this.

Covered: models of plain decoder layers whose projections `serve.engine.projections` knows, also split over processes and over the
stages of a pipeline, each of which acts on its own layers; eager and compiled; in CUDA graphs by `serve.engine.steer_graphs`. Not
covered: adapters on the experts of a mixture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from guards.errors import InvalidArtifact
from guards.steering.artifact import Steering
from guards.steering.declaration import Corrupt, Corruption, Steer
from guards.steering.operators import corrupt, redirect
from guards.types import Plan
from serve.engine.context import is_alone
from serve.engine.fork import Unforkable, decoder_of, refuse_adapted_layers
from serve.engine.projections import LowRankTerm, check_parts, projections_of, why_not_adapted
from serve.engine.sites import STEERING, Entrance, after_embedding, after_projection, before_layer, listen
from serve.engine.stages import layers_here
from serve.engine.steer_graphs import LAYERS, GraphBuffers

logger = logging.getLogger(__name__)

PIECE = 1_024
"""Tokens that are steered at once."""
RESIDUAL_IS_INPUT = ("CohereDecoderLayer",)
"""Layers whose second output is their input, which their first contains already; of others, the next layer adds the two."""


class Unsteerable(Unforkable):
    """The served model or its engine cannot be steered."""


@dataclass(slots=True)
class _Pass:
    """What is to be done in the forward pass that is under way. T tokens."""

    strengths: dict[str, Tensor] = field(default_factory=dict)  # by artifact: [T, 1] float32, 0 = not this token
    corrupted: list[tuple[Tensor, Tensor, Corrupt]] = field(default_factory=list)  # [N] which tokens, their positions, how


class Steerer:
    """One per engine. Shapes: T tokens, H hidden size.

    Args:
        model: vLLM's model, guarded or not.

    Raises:
        Unsteerable: says what the model or the engine lacks.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        refuse_adapted_layers(vllm_config, "steering does")
        inner = decoder_of(model)
        if not hasattr(inner, "layers") or not hasattr(model, "embed_input_ids"):
            raise Unsteerable(f"{type(model).__name__} has no plain stack of decoder layers, so it cannot be steered")
        self._layers: list[nn.Module] = list(inner.layers)
        self._here = layers_here(self._layers)
        mine = [self._layers[layer] for layer in self._here]
        if odd := {type(layer).__name__ for layer in mine}.intersection(RESIDUAL_IS_INPUT):
            raise Unsteerable(f"{min(odd)} hands on another residual than those that can be steered")
        if odd := {type(layer).__name__ for layer in mine if Entrance.of(layer) is None}:
            raise Unsteerable(f"{min(odd)} takes no hidden_states by that name, so it cannot be steered")
        embeddings = [
            each for each in inner.children() if isinstance(each, VocabParallelEmbedding) and not isinstance(each, ParallelLMHead)
        ]
        first = self._here.start == 0
        if first and len(embeddings) != 1:
            raise Unsteerable(f"{type(model).__name__} has {len(embeddings)} embeddings of tokens, so it cannot be steered")
        self._embedding: nn.Module | None = embeddings[0] if first else None
        """Where tokens are embedded; None in a later stage of a pipeline, which may have such a module for its head."""
        self._like = torch.empty(0, dtype=vllm_config.model_config.dtype, device=next(model.parameters()).device)
        self.projections = projections_of(self._layers)
        """By site."""
        self._vllm_config = vllm_config
        self._lowest = max(1, len(self._layers) - LAYERS)
        """In compiled models, adapters act from here on."""
        self._compiled = not vllm_config.model_config.enforce_eager
        self.loaded: dict[str, Steering] = {}
        self._maps: dict[int, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}  # layer -> artifact -> into, out, center
        self._terms: dict[int, dict[str, list[LowRankTerm]]] = {}  # site -> artifact
        self._acting: set[str] = set()  # artifacts that act on layers that this process has
        self._hooks: list[RemovableHandle] = []
        self._pass = _Pass()
        self._armed = False
        """Whether the base is in its forward pass: what runs on its layers afterwards (the fork) is nobody's to steer."""
        self._acted: set[str] = set()  # artifacts that acted in this pass
        self._idle: set[str] = set()  # those that were to act and were not reached: this model computes in another way
        self._alone = is_alone(vllm_config)
        self._failed = False  # whether something of this pass could not be done
        self.buffers: GraphBuffers | None = None
        """Where artifacts stand that CUDA graphs apply; None where there are no graphs."""
        self._in_buffers = False  # whether what the coming pass needs is there

    def listen(self) -> None:
        """Stand in the model. A compiled one must be entered before it is compiled, everywhere, and not again."""
        listen(STEERING, self, self._vllm_config)
        if self._embedding is not None:
            after_embedding(self._embedding)
        if self._compiled:
            # Each operator keeps the compiler from fusing what is around it, so there are no more than needed.
            self._stand(
                [i for i in self._here if i > 0], [i for i, each in enumerate(self.projections) if each.layer >= self._lowest]
            )
            if self._vllm_config.use_v2_model_runner:
                self.buffers = GraphBuffers(self.projections, len(self._layers), self._like, self._vllm_config)

    def _stand(self, layers: Iterable[int], sites: Iterable[int]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [before_layer(self._layers[layer], layer) for layer in layers]
        self._hooks += [after_projection(self.projections[site].module, site) for site in sites]

    def able(self, plan: Plan) -> bool:
        """Whether everything that a plan asks for can be done."""
        return all(each.artifact in self.loaded and each.artifact not in self._idle for each in plan.of(Steer))

    def check(self, steering: Steering) -> None:
        """Raise InvalidArtifact if an artifact's tensors do not fit the served model."""
        first = steering.manifest.layer
        if steering.manifest.recipe.method != "adapter":
            return
        if first < 1:
            layers = steering.manifest.recipe.layers
            raise InvalidArtifact(f"an adapter over {layers} layers needs a deeper model than this one")
        if self._compiled and first < self._lowest:
            raise InvalidArtifact(
                f"an adapter over {steering.manifest.recipe.layers} layers needs --enforce-eager; compiled models take {LAYERS}"
            )
        for layer in self._here[max(0, first - self._here.start) :]:
            found = [part for each in self.projections if each.layer == layer for part in each.parts]
            if reason := why_not_adapted(self._layers[layer], found):
                raise InvalidArtifact(f"layer {layer} {reason}, so no adapter can act on it")
            check_parts(found, steering.tensors, layer - first, f"adapter {steering.fingerprint[:12]}")

    def load(self, artifacts: Mapping[str, Steering]) -> None:
        """Make exactly these, by fingerprint, the loaded ones. They have passed `check`."""
        self._maps, self._terms, self.loaded = {}, {}, {}
        for name, steering in sorted(artifacts.items()):  # in an order that no history decides
            first, tensors = steering.manifest.layer, steering.tensors
            if steering.manifest.recipe.method != "adapter":
                if first not in self._here:
                    continue
                into, out, center = (tensors[part].to(self._like.device) for part in ("into", "out", "center"))
                self._maps.setdefault(first, {})[name] = into, out, center
                continue
            for site, each in enumerate(self.projections):
                if each.layer >= first:
                    terms = [part.term(tensors, each.layer - first, self._like) for part in each.parts]
                    self._terms.setdefault(site, {})[name] = terms
        if not self._compiled:
            self._stand(self._maps, self._terms)
        if self.buffers is not None:
            self.buffers.load(artifacts)
        self._acting = {name for places in (self._maps, self._terms) for names in places.values() for name in names}
        self.loaded = dict(artifacts)  # only now are they all there

    def clear(self) -> None:
        """Before a pass in which nobody is steered, also if a graph was chosen for it in which somebody would have been."""
        self._forget()
        if self.buffers is not None and self._in_buffers:
            self.buffers.reset()
        self._in_buffers = False

    def _forget(self) -> None:
        self._pass, self._acted, self._failed = _Pass(), set(), False

    def begin(self, slots: Tensor, plans: Sequence[Plan | None], input_ids: Tensor | None, positions: Tensor) -> None:
        """Before the forward pass: note what is to be done to its tokens.

        Args:
            slots: [T] int64, -1 = unguarded; plans: by slot. input_ids, positions: [T].

        Raises:
            Exception: whatever went wrong. Call `clear`.
        """
        self._forget()
        wanted: dict[str, list[float]] = {}
        corrupting: list[tuple[Corrupt, Tensor]] = []  # how, and [T] which tokens
        for slot, plan in enumerate(plans):
            if plan is None or not self.able(plan):
                continue
            for each in plan.of(Steer):
                # The last is for tokens without a slot.
                wanted.setdefault(each.artifact, [0.0] * (len(plans) + 1))[slot] += each.strength
            corrupting += [
                (settings, _inside(settings, positions) & (slots == slot))
                for settings in plan.of(Corrupt)
                if settings.spans and self._embedding is not None
            ]
        if wanted:
            of_slots = torch.tensor(list(wanted.values()), device=slots.device)
            self._pass.strengths = dict(zip(wanted, of_slots[:, slots].unsqueeze(-1), strict=True))
        if corrupting:  # one question to the device, of all
            for here, (settings, mask) in zip(
                torch.stack([mask for _, mask in corrupting]).any(dim=1).tolist(), corrupting, strict=True
            ):
                if here:
                    index = mask.nonzero().squeeze(1)
                    self._pass.corrupted.append((index, positions[index], settings))
        if self.buffers is not None and self._in_buffers:
            self.buffers.begin(slots, wanted, self._corrupted(input_ids))
            self._in_buffers = False

    def fill_buffers(self, plans: Sequence[Plan | None]) -> bool:
        """Copy what these plans name into the graphs' buffers. Returns whether graphs do all that they ask of the network."""
        self._in_buffers = False
        if self.buffers is not None:
            able = [plan for plan in plans if plan is not None and self.able(plan)]  # others are closed, whatever runs
            self._in_buffers = self.buffers.does(
                ([each.artifact for each in plan.of(Steer)], bool(plan.of(Corrupt))) for plan in able
            )
        return self._in_buffers

    def corrupted(self, embeddings: Tensor | None) -> Tensor | None:
        """[T, H] that the runner has made, corrupted in a copy where that is asked for."""
        if embeddings is not None and self._pass.corrupted:
            embeddings = embeddings.clone()
            self._tried(self.corrupt_, embeddings)
        return embeddings

    def arm(self) -> None:
        """The base enters its forward pass."""
        self._armed = True

    def end(self, replayed: bool = False) -> bool:
        """After the base. Returns whether all was done. ``replayed``: by CUDA graphs, which do not tell Python what they did."""
        self._armed = False
        if replayed:
            done = not self._failed
            self._forget()
            return done
        if idle := (self._pass.strengths.keys() & self._acting) - self._acted:
            self._idle |= idle
            logger.error("lethe: %s did not act on this model's layers; its requests are closed", ", ".join(sorted(idle)))
        if self._pass.corrupted:
            logger.error("lethe: names were not corrupted, since the model's embedding was not reached; their requests are closed")
        done = not self._failed and not self._pass.corrupted
        self._forget()
        return done

    def _tried(self, act: Callable[..., Any], *args: Any) -> None:
        """If something cannot be done, the base goes on as it is, and what was to be steered is closed."""
        try:
            act(*args)
        except Exception:
            if not self._failed:
                logger.exception("lethe: a layer could not be steered")
            if not self._alone:
                raise  # see `Context.stop_unless_alone`
            self._failed = True

    def embedded(self, embeddings: Tensor) -> None:
        if self.buffers is not None and self.buffers.capturing:
            self.buffers.embedded(embeddings)
        elif self._armed and self._pass.corrupted:
            self._tried(self.corrupt_, embeddings)

    def entered(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        if self.buffers is not None and self.buffers.capturing:
            self.buffers.entered(layer, hidden, residual)
        elif self._armed and self._pass.strengths and layer in self._maps:
            self._tried(self._redirect_, layer, hidden, residual)

    def projected(self, site: int, inputs: Tensor, output: Tensor) -> None:
        if self.buffers is not None and self.buffers.capturing:
            self.buffers.projected(site, inputs, output)
        elif self._armed and self._pass.strengths and site in self._terms:
            self._tried(self._add_, site, inputs, output)

    def corrupt_(self, embeddings: Tensor) -> None:
        """In place, what is to be corrupted of [T, H], once."""
        for index, positions, settings in self._pass.corrupted:
            embeddings[index] = _corrupted(embeddings[index], positions, settings)
        self._pass.corrupted = []

    def _corrupted(self, input_ids: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """What graphs write over embeddings: which tokens, [N, H]."""
        if input_ids is None or self._embedding is None:
            return []
        return [
            (index, _corrupted(self._embedding(input_ids[index]), positions, settings))
            for index, positions, settings in self._pass.corrupted
        ]

    def _redirect_(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """One map after the other."""
        for name, (into, out, center) in self._maps[layer].items():
            if (strength := self._pass.strengths.get(name)) is not None:
                for rows in _pieces(len(hidden)):
                    stream = hidden[rows] if residual is None else hidden[rows] + residual[rows]
                    hidden[rows] += redirect(stream, into=into, out=out, center=center, strength=strength[rows]).to(hidden.dtype)
                self._acted.add(name)

    def _add_(self, site: int, inputs: Tensor, output: Tensor) -> None:
        for name, terms in self._terms[site].items():
            if (strength := self._pass.strengths.get(name)) is not None:
                for rows in _pieces(len(inputs)):
                    for term in terms:
                        output[rows, term.columns] += term(inputs[rows], strength[rows])
                self._acted.add(name)


def _pieces(tokens: int) -> list[slice]:
    """Of a long step, so that it takes no more memory than vLLM has reckoned with."""
    return [slice(start, start + PIECE) for start in range(0, tokens, PIECE)]


def _inside(settings: Corrupt, positions: Tensor) -> Tensor:
    """[T] bool, which positions of a request are in its spans."""
    spans = positions.new_tensor(settings.spans)  # [S, 2]
    return ((positions[:, None] >= spans[:, 0]) & (positions[:, None] < spans[:, 1])).any(dim=1)


def _corrupted(embeddings: Tensor, positions: Tensor, settings: Corrupt) -> Tensor:
    return corrupt(
        embeddings,
        positions,
        kind=cast("Corruption", settings.kind),
        strength=settings.strength,
        first_n=settings.first_n,
        seed=settings.seed,
    )
