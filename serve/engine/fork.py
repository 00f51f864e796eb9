"""The stateless late fork: the base's last K decoder layers, run once more for the rows that need an assistant.

The fork is made of the base's own module objects (no weights of its own), takes the base's hidden state at depth L - K, attends to
the base's own keys and values in its paged cache, and adds each assistant's low-rank terms to the query, output and MLP
projections. It writes nothing, so whether a request is contrasted changes neither the cache nor any other request, and it runs only
for the rows whose logits are about to be read. Of other rows and steps it costs a copy of the hidden states at that depth.

Covered: models of plain decoder layers that take positions, hidden states and residual, in any order, and return the latter two;
paged attention (`serve.engine.attention`), latent attention (MLA) too, and the usual projections (`serve.engine.projections`), also
split over processes, eager and compiled; the last stage of a pipeline, if it has these layers; mixtures of experts, whose experts
stay the base's. Not covered: layers with a state of their own (linear attention, Mamba), which one line cannot run again, and
latent attention that an indexer makes sparse.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention

from guards.contrastive.assistant import FORKED_LAYERS, Assistant
from guards.errors import InvalidArtifact
from guards.low_rank import is_mixture
from serve.engine.attention import Lines, PagedBatch
from serve.engine.projections import LowRankTerm, Part, adapted_parts, check_parts, why_not_adapted
from serve.engine.sites import FORK, Entrance, before_fork, listen
from serve.engine.stages import layers_here


class Unforkable(InvalidArtifact):
    """The served model or its engine cannot run assistants."""


@dataclasses.dataclass
class _Pass:
    """What the fork's modules need to know of the pass that is under way."""

    segments: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)  # assistant, first line, last line + 1
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its metadata, by layer


class _SharedAttention(nn.Module):
    """Queries of the fork over the keys and values that the base has just written."""

    def __init__(self, base: Attention, current: _Pass) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a child: its weights, if any, are the base's to load
        self._pass = current

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        base: Any = self.__dict__["base"]
        output = torch.empty(len(query), base.num_heads, base.head_size, dtype=query.dtype, device=query.device)
        query, key, value = (each.view(len(query), -1, base.head_size) for each in (query, key, value))
        # Its own key and value are not written: the base's are in the pages already.
        base.impl.forward(base, query, key, value, base.kv_cache, self._pass.attention[base.layer_name], output)
        return output.view(len(query), -1)


class _SharedLatentAttention(nn.Module):
    """The same for latent attention (MLA), whose pages hold one latent vector for each token."""

    def __init__(self, base: MLAAttention, current: _Pass) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self._pass = current

    def forward(
        self, query: Tensor, latent: Tensor, key_position: Tensor, output_shape: torch.Size, q_dcp_replicated: Tensor | None = None
    ) -> Tensor:
        base: Any = self.__dict__["base"]
        output = torch.empty(output_shape, dtype=query.dtype, device=query.device)
        metadata = self._pass.attention[base.layer_name]
        # The part of vLLM's own forward that writes nothing. Decoding requests, as ours are, read latent vectors from the pages.
        base.forward_impl(query, latent, key_position, base.kv_cache, metadata, output=output, q_dcp_replicated=q_dcp_replicated)
        return output


class _LowRank(nn.Module):
    """One of vLLM's linear layers, with the assistants' low-rank terms on its output."""

    def __init__(self, base: nn.Module, parts: Sequence[Part], current: _Pass) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self.parts = parts
        self._pass = current
        self.terms: dict[str, list[LowRankTerm]] = {}  # by assistant

    def load(self, name: str, layer: int, assistant: Assistant, like: Tensor) -> None:
        self.terms[name] = [part.term(assistant.tensors, layer, like) for part in self.parts]

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        output, bias = self.__dict__["base"](x)
        for name, start, stop in self._pass.segments:
            for term in self.terms[name]:
                output[start:stop, term.columns] += term(x[start:stop])
        return output, bias


def refuse_adapted_layers(vllm_config: VllmConfig, what: str) -> None:
    """Raise Unforkable if vLLM adapts the layers itself. ``what``: with its verb, such as "assistants do"."""
    if vllm_config.lora_config is not None:
        raise Unforkable(f"{what} not run beside vLLM's own LoRA yet; start without --enable-lora")


def decoder_of(model: nn.Module) -> Any:
    """What holds a model's decoder layers, of a multimodal one too; None if there is no such part."""
    find = getattr(model, "get_language_model", None)
    return getattr(find() if find is not None else model, "model", None)


class LateFork:
    """One per engine, over one base model. Shapes: T tokens, P lines, H hidden size.

    Args:
        model: vLLM's model, guarded or not.

    Raises:
        Unforkable: says what the model or the engine lacks.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        refuse_adapted_layers(vllm_config, "assistants do")
        inner = decoder_of(model)
        if not hasattr(inner, "layers") or not hasattr(inner, "norm"):
            raise Unforkable(f"{type(model).__name__} has no plain stack of decoder layers, so assistants cannot run beside it")
        depth = len(inner.layers) - FORKED_LAYERS
        if depth < 1:
            raise Unforkable(f"the model has {len(inner.layers)} layers; forking the last {FORKED_LAYERS} leaves none below")
        if depth not in (here := layers_here(inner.layers)):
            raise Unforkable(
                f"the pipeline's last stage has {len(here)} layers, and assistants run beside the last {FORKED_LAYERS}; use fewer "
                "stages, or give it more layers with VLLM_PP_LAYER_PARTITION"
            )
        self._pass = _Pass()
        self._attention: list[Attention | MLAAttention] = []
        self._low_rank: list[list[_LowRank]] = []
        self._layers = []
        self._positions: list[str] = []
        """What each layer calls its positions."""
        for layer in inner.layers[depth:]:
            entrance = Entrance.of(layer)
            if entrance is None or entrance.residual is None or entrance.positions is None:
                raise Unforkable(
                    f"{type(layer).__name__} does not take positions, hidden_states and residual, so it cannot be forked"
                )
            self._positions.append(entrance.positions)
            self._low_rank.append([])
            found = len(self._attention)
            self._layers.append(self._copy(layer, layer, {}))
            if len(self._attention) != found + 1:
                raise Unforkable(f"{type(layer).__name__} has no paged attention of the usual kind, so it cannot be forked")
            if reason := why_not_adapted(layer, self._parts(self._low_rank[-1])):
                raise Unforkable(f"{type(layer).__name__} {reason}, so it cannot be forked")
        self._mixtures_below = sum(map(is_mixture, inner.layers[here.start : depth]))
        self._norm = inner.norm
        self.loaded: frozenset[str] = frozenset()
        self._vllm_config = vllm_config
        self._most_lines = vllm_config.scheduler_config.max_num_seqs
        like, tokens = next(inner.norm.parameters()), vllm_config.scheduler_config.max_num_batched_tokens
        self._below = torch.zeros(tokens, vllm_config.model_config.get_hidden_size(), dtype=like.dtype, device=like.device)
        self._first = inner.layers[depth]
        self._heard = False
        """Whether the base ever entered its last layers in the way that `serve.engine.sites` knows."""

    def listen(self) -> None:
        """Be told what the base hands to its last layers, from its next pass on. Until then nothing about the base has changed."""
        listen(FORK, self, self._vllm_config)
        before_fork(self._first)

    @staticmethod
    def _parts(modules: Sequence[_LowRank]) -> list[Part]:
        return [part for module in modules for part in module.parts]

    def _copy(self, module: nn.Module, decoder: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
        """New shells around a decoder layer's leaves, with attention and the adapted projections replaced.

        Args:
            copies: of this layer so far, since a module may stand at several places in it.
        """
        if isinstance(module, Attention | MLAAttention):
            if getattr(module, "use_sparse", False):
                raise Unforkable(f"{type(decoder).__name__} has sparse latent attention, so it cannot be forked")
            self._attention.append(module)
            return (
                _SharedAttention(module, self._pass)
                if isinstance(module, Attention)
                else _SharedLatentAttention(module, self._pass)
            )
        if not any(True for _ in module.children()):
            return module
        shell = copy.copy(module)
        shell._modules = {}
        # Hooks on the base, our own among them, are not the fork's.
        shell._forward_pre_hooks, shell._forward_pre_hooks_with_kwargs = OrderedDict(), OrderedDict()
        shell._forward_hooks, shell._forward_hooks_with_kwargs = OrderedDict(), OrderedDict()
        for name, child in module._modules.items():
            if child is None or "expert" in name:  # nothing in experts is replaced
                shell._modules[name] = child
                continue
            if child not in copies:
                if parts := adapted_parts(decoder, name, child):
                    copies[child] = low_rank = _LowRank(child, parts, self._pass)
                    self._low_rank[-1].append(low_rank)
                else:
                    copies[child] = self._copy(child, decoder, copies)
            shell._modules[name] = copies[child]
        return shell

    def check(self, assistant: Assistant) -> None:
        """Raise InvalidArtifact, naming both, if an assistant has another depth or other shapes than this fork."""
        if assistant.manifest.recipe.layers != FORKED_LAYERS:
            raise InvalidArtifact(
                f"assistant {assistant.fingerprint[:12]} has {assistant.manifest.recipe.layers} layers, "
                f"this server forks {FORKED_LAYERS}; train it again on this server"
            )
        for i, modules in enumerate(self._low_rank):
            check_parts(self._parts(modules), assistant.tensors, i, f"assistant {assistant.fingerprint[:12]}")

    def load(self, assistants: Mapping[str, Assistant]) -> None:
        """Make exactly these assistants, by fingerprint, the loaded ones. They have passed `check`."""
        like = next(self._norm.parameters())
        for i, modules in enumerate(self._low_rank):
            for module in modules:
                for name in assistants.keys() - module.terms.keys():
                    module.load(name, i, assistants[name], like)
                for name in module.terms.keys() - assistants.keys():
                    del module.terms[name]
        self.loaded = frozenset(assistants)

    def tap(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Where the base enters its last K layers: keep what the fork will start from. [T, H], at a fixed address.

        Copied at once, since vLLM's fused norms write into their inputs.
        """
        self._heard = True
        below = self._below[: len(hidden)]
        torch.add(hidden, residual, out=below) if residual is not None else below.copy_(hidden)

    def run(self, lines: Lines, assistants: Sequence[str], pages: PagedBatch) -> Tensor:
        """[P, H] final hidden states of the fork, one line for each pair of a row and an assistant.

        Must be called after the base has run and written its keys and values, before its next pass.

        Args:
            lines: where in the pass. assistants: [P] fingerprints of loaded assistants, an assistant's lines together; empty to run
                the base's layers as they are.
        """
        if not self._heard:
            raise Unforkable("the base runs without passing its last layers as other models do")
        # Builders of metadata keep buffers for as many requests as the engine takes.
        parts = [(i, i + self._most_lines) for i in range(0, len(lines.token), self._most_lines)]
        return torch.cat([self._run(lines.part(i, j), assistants[i:j], pages) for i, j in parts])

    def _run(self, lines: Lines, assistants: Sequence[str], pages: PagedBatch) -> Tensor:
        begin = [i for i, name in enumerate(assistants) if i == 0 or assistants[i - 1] != name]
        end = [*begin[1:], len(assistants)][: len(begin)]
        self._pass.segments = [(assistants[i], i, j) for i, j in zip(begin, end, strict=True)]
        self._pass.attention = pages.metadata([each.layer_name for each in self._attention], lines)
        line, residual = self._below[lines.token], None
        with set_forward_context(self._pass.attention, self._vllm_config, num_tokens=len(line)):
            # vLLM may count mixtures to know which it runs.
            get_forward_context().moe_layer_index = self._mixtures_below
            for layer, positions in zip(self._layers, self._positions, strict=True):
                line, residual = layer(hidden_states=line, residual=residual, **{positions: lines.rotary})
            final: Tensor = self._norm(line, residual)[0]
        return final
