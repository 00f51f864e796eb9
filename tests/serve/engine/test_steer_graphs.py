"""The buffers of the graphs do what maps and adapters do one after the other, with artifacts coming and going."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guards.base_model import BaseModel
from guards.low_rank import MODULES
from guards.steering.artifact import Steering, SteeringManifest, SteeringRecipe
from guards.steering.declaration import Steer
from guards.steering.operators import redirect
from guards.types import Plan

pytest.importorskip("vllm", reason="vLLM is not installed: the engine's side needs it")
from serve.engine.projections import Part, Projection
from serve.engine.steer_graphs import CHAIN, COLUMNS, LAYERS, GraphBuffers
from serve.engine.steer_hooks import Steerer

HIDDEN, DEPTH, TOKENS = 12, 10, 6
BASE = BaseModel.model_construct(hidden_size=HIDDEN, layers=DEPTH)
WHOLE = slice(None)


def artifact(method: str, seed: int, *, rank: int = 3, layer: int = 5, layers: int = 4) -> Steering:
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    recipe = SteeringRecipe(method=method, rank=rank, layers=layers, depth=layer / DEPTH)  # type: ignore[arg-type]
    manifest = SteeringManifest.model_construct(base=BASE, recipe=recipe, data=str(seed), metrics={})
    tensors = {"into": normal(HIDDEN, rank), "out": normal(rank, HIDDEN), "center": normal(HIDDEN)}
    if method == "adapter":
        names = [f"layers.{i}.{module}" for i in range(layers) for module in MODULES]
        tensors = {
            f"{name}.{factor}": normal(*shape) for name in names for factor, shape in (("A", (rank, HIDDEN)), ("B", (HIDDEN, rank)))
        }
    return Steering(manifest, tensors)


@pytest.fixture(autouse=True)
def _capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def buffers(reaches: range = range(DEPTH)) -> GraphBuffers:
    """As it is once a pass that comes to some of the layers was captured."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_hidden_size=lambda: HIDDEN, is_multimodal_model=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS + 2),
    )
    whole = {"size": (HIDDEN, HIDDEN), "inputs": WHOLE, "outputs": WHOLE, "columns": WHOLE, "summed": False}
    projections = [Projection(nn.Identity(), layer, (Part("o_proj", **whole),)) for layer in range(DEPTH)]  # type: ignore[arg-type]
    made, tokens = GraphBuffers(projections, DEPTH, torch.zeros(0), config), torch.zeros(TOKENS, HIDDEN)
    made.embedded(tokens)
    for layer in reaches:
        made.entered(layer, tokens, None)
        made.projected(layer, tokens, tokens)
    return made


SLOTS = torch.tensor([0, 0, 1, -1, 2, -1])
"""Whose the tokens are; of three requests, the last of which names nothing."""


def one_after_the_other(artifacts: dict[str, Steering], wanted: dict[str, list[float]], layer: int, hidden: Tensor) -> Tensor:
    for name, steering in sorted(artifacts.items()):
        if name in wanted and steering.manifest.layer == layer and steering.kind != "adapter":
            strength = torch.tensor(wanted[name])[SLOTS][:, None]
            hidden = hidden + redirect(hidden, **steering.tensors, strength=strength)  # type: ignore[arg-type]
    return hidden


@pytest.mark.parametrize("seed", range(12))
def test_what_graphs_do_is_what_is_done_outside_of_them_whatever_came_before(seed: int) -> None:
    """Artifacts of random kinds and ranks, asked for by random requests, in steps that follow each other in the same buffers."""
    chance = random.Random(seed)
    kinds = ["project", "steer", "adapter"]
    artifacts = {
        f"{i}": artifact(chance.choice(kinds), 100 * seed + i, rank=chance.randint(1, 40), layer=chance.choice([2, 5]))
        for i in range(9)
    }
    made, done = buffers(), 0
    made.load(artifacts)
    for step in range(12):
        named = [chance.sample(sorted(artifacts), chance.randint(0, 3)) for _ in range(2)]
        wanted = {
            name: [chance.choice([0.5, 1.0]) if name in names else 0.0 for names in named] + [0.0, 0.0]
            for name in {*named[0], *named[1]}
        }
        does = made.does([(names, False) for names in named])
        assert does == (sum(artifacts[name].rank for name in wanted) <= COLUMNS)
        if not does:
            continue
        done += 1
        made.begin(SLOTS, wanted, [])
        generator = torch.Generator().manual_seed(step)
        hidden, residual = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
        for layer in (2, 5, 6):
            expected = one_after_the_other(artifacts, wanted, layer, hidden + residual)
            found = hidden.clone()
            made.entered(layer, found, residual)
            torch.testing.assert_close(found + residual, expected, rtol=1e-3, atol=1e-2)
            assert torch.equal(found[[3, 4, 5]], hidden[[3, 4, 5]]), "others' rows are what they were"
            output = torch.zeros(TOKENS, HIDDEN)
            made.projected(layer, hidden, output)
            expected = torch.zeros(TOKENS, HIDDEN)
            for name, strengths in wanted.items():
                each = artifacts[name]
                if each.kind == "adapter" and layer >= each.manifest.layer:
                    a, b = (each.tensors[f"layers.{layer - each.manifest.layer}.o_proj.{factor}"] for factor in "AB")
                    expected += torch.tensor(strengths)[SLOTS][:, None] * (hidden @ a.T @ b.T)
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-2)
    assert done > 3, "hardly anything was compared"


def test_what_graphs_cannot_hold_is_left_to_a_pass_without_them() -> None:
    made = buffers()
    artifacts = {"wide": artifact("project", 1, rank=COLUMNS + 1), "deep": artifact("adapter", 2, layers=LAYERS + 1)}
    artifacts |= {f"{i}": artifact("project", 3 + i, rank=1) for i in range(CHAIN + 2)}
    made.load(artifacts)
    assert not made.does([(["wide"], False)]) and not made.does([(["deep"], False)])
    assert not made.does([(["not loaded"], False)])
    short = buffers(range(6, DEPTH))
    short.load(artifacts | {"last": artifact("adapter", 9)})
    assert not short.does([(["0"], False)]), "its layer is not in what was captured"
    assert short.does([(["last"], False)])
    assert not made.does([([f"{i}" for i in range(CHAIN + 2)], False)]), "more maps than see each other"
    assert made.does([([f"{i}" for i in range(CHAIN + 1)], False), ([f"{CHAIN + 1}"], False)])
    made.load({})
    assert not made.does([(["0"], False)])
    hidden = torch.randn(TOKENS, HIDDEN)
    made.begin(SLOTS, {}, [])
    found = hidden.clone()
    made.entered(5, found, None)
    assert torch.equal(found, hidden), "nothing is left of what was taken out"


def test_embeddings_are_corrupted_in_the_pass_that_has_them_and_in_no_other() -> None:
    made = buffers()
    embeddings, other = torch.randn(TOKENS, HIDDEN), torch.randn(2, HIDDEN)
    made.begin(SLOTS, {}, [(torch.tensor([1, 4]), other)])
    found = embeddings.clone()
    made.embedded(found)
    assert torch.equal(found[[1, 4]], other) and torch.equal(found[[0, 2, 3, 5]], embeddings[[0, 2, 3, 5]])
    made.begin(SLOTS, {}, [])
    made.embedded(found := embeddings.clone())
    assert torch.equal(found, embeddings)


def test_what_was_only_half_copied_into_the_buffers_is_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, artifacts = buffers(), {name: artifact("project", i) for i, name in enumerate("ab")}
    made.load(artifacts)
    for broken in ("_fill", "_order"):
        with monkeypatch.context() as patch:
            patch.setattr(made, broken, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                made.does([(["a", "b"], False)])
    wanted = {"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 0.0, 0.0, 0.0]}
    assert made.does([(["a", "b"], False)])
    made.begin(SLOTS, wanted, [])
    hidden = torch.randn(TOKENS, HIDDEN)
    expected = one_after_the_other(artifacts, wanted, 5, hidden)
    made.entered(5, hidden, None)
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-2)


def test_a_pass_that_loses_track_of_its_requests_steers_nobody_in_a_graph_that_was_chosen_before() -> None:
    steerer = Steerer.__new__(Steerer)
    steerer.buffers, steerer.loaded, steerer._idle = buffers(), {"a": artifact("project", 1)}, set()
    steerer.buffers.load(steerer.loaded)
    plans = [Plan(1, "p", (Steer("a", 1.0),))]
    assert steerer.fill_buffers(plans)
    steerer.begin(torch.tensor([0, 0, -1]), plans, None, torch.arange(3))
    assert steerer.fill_buffers(plans)
    steerer.clear()
    hidden = torch.randn(3, HIDDEN)
    steerer.buffers.entered(5, found := hidden.clone(), None)
    assert torch.equal(found, hidden)


def test_the_buffers_are_float32_whatever_the_model_is_made_in() -> None:
    """vLLM makes models with their dtype as PyTorch's default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = buffers()
    finally:
        torch.set_default_dtype(torch.float32)
    made.load({"a": artifact("project", 1)})
    assert made.does([(["a"], False)])
    made.begin(SLOTS, {"a": [1.0, 0.0, 0.0, 0.0]}, [])
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16()
    made.entered(5, found := hidden.clone(), None)
    assert not torch.equal(found[:2], hidden[:2]) and torch.equal(found[2:], hidden[2:])
