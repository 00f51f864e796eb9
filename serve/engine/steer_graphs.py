"""Steering in CUDA graphs: a graph replays what it was captured with, so artifacts are copied into static buffers.

All artifacts in the buffers share a number of columns, one for each rank. A map's columns act where its layer is entered, an
adapter's on its projections; at each token a column has the strength that the token's request gives it, or 0. Which artifacts the
buffers hold changes between passes, when those that requests name are not all there. A graph is captured twice for each size, with
and without steering (`serve.engine.graphs_v2`), so that only steps in which somebody is steered pay for it.

Covered: maps of any layer, adapters of the last `LAYERS` layers, as many as have `COLUMNS` ranks together, `1 + CHAIN` maps of one
request at one layer, corrupted names. Whatever else is asked for is done outside of graphs, see `SteeringInNetwork.graphs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from vllm.config import VllmConfig

from guards.steering.artifact import Steering
from serve.engine.projections import LowRankTerm, Projection

COLUMNS = 128
"""Ranks of all artifacts in the buffers. With a model of 8 billion parameters and steps of 8,192 tokens they take some 220 MB."""
LAYERS = 8
CHAIN = 3
"""Maps of one request at one layer that see what other maps before them did. Each costs two small kernels a layer."""


class GraphBuffers:
    """One per engine. Shapes: T tokens, H hidden size, C columns, L layers.

    Args:
        projections: of the base, by site. depth: L. like: of the base's device and dtype.
    """

    def __init__(self, projections: Sequence[Projection], depth: int, like: Tensor, vllm_config: VllmConfig) -> None:
        hidden, tokens = vllm_config.model_config.get_hidden_size(), vllm_config.scheduler_config.max_num_batched_tokens

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=like.device)

        self._projections, self._like, self._lowest = projections, like, depth - LAYERS
        self._strengths = zeros(tokens, COLUMNS)
        self._into, self._out, self._shift = zeros(hidden, COLUMNS), zeros(COLUMNS, hidden), zeros(COLUMNS)
        self._cross = zeros(COLUMNS, COLUMNS)
        """What a column of one map adds to the input of a column of a later map at the same layer."""
        self._at = zeros(depth, COLUMNS)
        """1 where a layer is the one at which a column acts."""
        self._terms: dict[int, list[LowRankTerm]] = {
            site: [part.empty(COLUMNS, like) for part in each.parts]
            for site, each in enumerate(projections)
            if each.layer >= max(1, self._lowest)
        }
        self._covered = torch.zeros((tokens, 1), dtype=torch.bool, device=like.device)
        self._embeddings = torch.zeros((tokens, hidden), dtype=like.dtype, device=like.device)
        self._covers = False
        self._takes_embeddings = vllm_config.model_config.is_multimodal_model
        self._artifacts: dict[str, Steering] = {}
        self._columns: dict[str, list[int]] = {}
        self._ordered = True
        self.capturing = False
        """Whether a graph with steering is being captured: the only time at which Python runs this arithmetic."""
        self.reached: set[tuple[str, int]] = set()
        """Places that a captured pass reached, by layer; an adapter's, where it reached all of the layer's projections. Graphs do
        nothing at other places."""
        self._missed = {site: each.layer for site, each in enumerate(projections)}
        """Projections that no captured pass has reached, and their layers."""

    def load(self, artifacts: Mapping[str, Steering]) -> None:
        """Only these may be in the buffers from now on."""
        for name in self._columns.keys() - artifacts.keys():
            del self._columns[name]  # nobody gives its columns a strength any more
        self._artifacts = dict(artifacts)

    def does(self, plans: Iterable[tuple[Iterable[str], bool]]) -> bool:
        """Whether a graph does all that is asked for; copies the artifacts into the buffers.

        Args:
            plans: of each request, the artifacts that it names, and whether its embeddings are corrupted.
        """
        wanted: set[str] = set()
        for names, corrupted in plans:
            maps = Counter(self._artifacts[name].manifest.layer for name in names if name in self._artifacts and self._is_map(name))
            if corrupted and (self._takes_embeddings or ("embedding", 0) not in self.reached):
                return False
            if max(maps.values(), default=0) > 1 + CHAIN:
                return False
            wanted |= set(names)
        if not all(name in self._artifacts and self._fits(name) for name in wanted):
            return False
        if sum(self._artifacts[name].rank for name in wanted) > COLUMNS:
            return False
        missing = sorted(wanted - self._columns.keys())
        if missing or not self._ordered:
            self._bring(missing, wanted)
        return True

    def _is_map(self, name: str) -> bool:
        return self._artifacts[name].manifest.recipe.method != "adapter"

    def _fits(self, name: str) -> bool:
        first = self._artifacts[name].manifest.layer
        if self._is_map(name):
            return ("layer", first) in self.reached
        return first >= max(1, self._lowest) and {("adapter", layer) for layer in range(first, len(self._at))} <= self.reached

    def _bring(self, missing: Iterable[str], wanted: set[str]) -> None:
        """Copy missing artifacts in. A name is entered after its columns, `_ordered` is set last: a failed copy is repeated."""
        self._ordered = False
        free = set(range(COLUMNS)).difference(*self._columns.values())
        for name in missing:
            for other in [each for each in self._columns if each not in wanted]:
                if len(free) >= self._artifacts[name].rank:
                    break
                free |= set(self._columns.pop(other))
            columns = sorted(free)[: self._artifacts[name].rank]
            free -= set(columns)
            self._fill(name, columns)
            self._columns[name] = columns
        self._order()
        self._ordered = True

    def _fill(self, name: str, columns: list[int]) -> None:
        steering = self._artifacts[name]
        first, tensors = steering.manifest.layer, steering.tensors
        for tensor in (self._into.T, self._out, self._shift, self._at.T):
            tensor[columns] = 0
        for terms in self._terms.values():
            for term in terms:
                term.a[:, columns], term.b[columns] = 0, 0
        if self._is_map(name):
            into, out, center = (tensors[each].to(self._like.device) for each in ("into", "out", "center"))
            self._into[:, columns], self._out[columns], self._shift[columns] = into, out, -(center @ into)
            self._at[first, columns] = 1
            return
        for site, buffers in self._terms.items():
            each = self._projections[site]
            if each.layer >= first:
                for part, buffer in zip(each.parts, buffers, strict=True):
                    term = part.term(tensors, each.layer - first, self._like)
                    buffer.a[:, columns], buffer.b[columns] = term.a, term.b

    def _order(self) -> None:
        """Maps at one layer act in the order of their names, as they do outside of graphs."""
        place = torch.full((COLUMNS,), -1)
        layer = torch.full((COLUMNS,), -1)
        for nth, name in enumerate(sorted(each for each in self._columns if self._is_map(each))):
            place[self._columns[name]], layer[self._columns[name]] = nth, self._artifacts[name].manifest.layer
        follows = (layer[:, None] == layer) & (place[:, None] < place) & (place[:, None] >= 0)
        self._cross.copy_((self._out @ self._into) * follows.to(self._cross.device))

    def begin(self, slots: Tensor, wanted: Mapping[str, Sequence[float]], corrupted: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Before a pass of which a graph does everything: [T] slots; strengths by artifact and slot; which tokens become what."""
        if wanted:
            of_slots = torch.zeros(len(next(iter(wanted.values()))), COLUMNS)
            for name, strengths in wanted.items():
                of_slots[:, self._columns[name]] = torch.tensor(strengths)[:, None]
            self._strengths[: len(slots)] = of_slots.to(self._strengths.device)[slots]
        else:
            self._strengths[: len(slots)] = 0
        if self._covers:
            self._covered.zero_()
            self._covers = False
        for index, embeddings in corrupted:
            self._covered[index], self._embeddings[index], self._covers = True, embeddings, True

    def reset(self) -> None:
        """Nobody is steered in the pass that comes, whatever it was to do."""
        self._strengths.zero_()
        self._covered.zero_()
        self._covers = False

    def _reach(self, place: str, layer: int) -> None:
        if torch.cuda.is_current_stream_capturing():  # a pass before it, which warms up, is not in the graph
            self.reached.add((place, layer))

    def embedded(self, embeddings: Tensor) -> None:
        self._reach("embedding", 0)
        count = len(embeddings)
        embeddings.copy_(torch.where(self._covered[:count], self._embeddings[:count], embeddings))

    def entered(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        self._reach("layer", layer)
        strengths = self._strengths[: len(hidden)] * self._at[layer]
        stream = hidden if residual is None else hidden + residual
        low = torch.addmm(self._shift, stream.float(), self._into)
        moved = low * strengths
        for _ in range(CHAIN):
            moved = torch.addmm(low, moved, self._cross) * strengths
        hidden += (moved @ self._out).to(hidden.dtype)

    def projected(self, site: int, inputs: Tensor, output: Tensor) -> None:
        layer = self._projections[site].layer
        if torch.cuda.is_current_stream_capturing():
            self._missed.pop(site, None)
        if layer not in self._missed.values():
            self._reach("adapter", layer)
        for term in self._terms.get(site, ()):
            output[:, term.columns] += term(inputs, self._strengths[: len(inputs)])
