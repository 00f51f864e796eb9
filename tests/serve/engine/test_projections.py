"""Low-rank terms on packed and split layers equal the whole projections' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guards.errors import InvalidArtifact

pytest.importorskip("vllm", reason="vLLM is not installed: its layers are what this is about")
from serve.engine import projections
from serve.engine.projections import parts_of

IN, HEADS, HEAD, UP, RANK = 6, 4, 3, 8, 2
LIKE = torch.zeros(1)


def layer(name: str, processes: int, number: int) -> Any:
    shared = {"tp_size": processes, "tp_rank": number, "input_size": IN}
    made = {
        "qkv_proj": {"total_num_heads": HEADS, "head_size": HEAD},
        "gate_up_proj": {"output_sizes": [UP, UP]},
        "o_proj": {"output_size": 5},
        "input_layernorm": {},
    }[name]
    return SimpleNamespace(**shared, **made)


def tensors() -> dict[str, torch.Tensor]:
    outputs = {"q_proj": HEADS * HEAD, "gate_proj": UP, "up_proj": UP, "o_proj": 5}
    made = torch.Generator().manual_seed(1)
    return {
        f"layers.0.{name}.{factor}": torch.randn(shape, generator=made)
        for name, size in outputs.items()
        for factor, shape in (("A", (RANK, IN)), ("B", (size, RANK)))
    }


def whole(name: str, x: torch.Tensor) -> torch.Tensor:
    a, b = (tensors()[f"layers.0.{name}.{factor}"] for factor in "AB")
    return x @ a.T @ b.T


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("name", "parts"), [("qkv_proj", ["q_proj"]), ("gate_up_proj", ["gate_proj", "up_proj"])])
def test_a_layer_split_by_its_outputs_takes_its_own_part(name: str, parts: list[str], processes: int) -> None:
    x = torch.randn(7, IN)
    for i, part in enumerate(parts):
        found = [parts_of(name, layer(name, processes, number))[i] for number in range(processes)]
        terms = [each.term(tensors(), 0, LIKE) for each in found]
        torch.testing.assert_close(torch.cat([term(x) for term in terms], dim=-1), whole(part, x))
        width = whole(part, x).shape[1] // processes
        assert [term.columns for term in terms] == [slice(i * width, (i + 1) * width)] * processes


def test_a_layer_split_by_its_inputs_adds_up_what_the_processes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, IN)
    halves = x.split(IN // 2, dim=1)
    terms = [parts_of("o_proj", layer("o_proj", 2, number))[0].term(tensors(), 0, LIKE) for number in range(2)]
    narrow = sum(half @ term.a for half, term in zip(halves, terms, strict=True))
    summed: list[torch.Tensor] = []

    def all_reduce(own: torch.Tensor) -> torch.Tensor:
        summed.append(own)
        return narrow

    monkeypatch.setattr(projections, "tensor_model_parallel_all_reduce", all_reduce)
    for half, term in zip(halves, terms, strict=True):
        torch.testing.assert_close(term(half), whole("o_proj", x))
    torch.testing.assert_close(summed[0] + summed[1], narrow)


def test_a_term_of_another_size_is_refused_and_both_are_named() -> None:
    [part] = parts_of("o_proj", layer("o_proj", 1, 0))
    part.check(tensors(), 0, "assistant abc")
    with pytest.raises(InvalidArtifact, match="assistant abc maps 6 to 9, the served model's 6 to 5"):
        part.check(tensors() | {"layers.0.o_proj.B": torch.zeros(9, RANK)}, 0, "assistant abc")
    assert parts_of("input_layernorm", layer("input_layernorm", 1, 0)) == ()


def test_what_overflows_for_a_token_that_is_not_steered_leaves_it_as_it_is() -> None:
    [part] = parts_of("o_proj", layer("o_proj", 1, 0))
    term = part.term(tensors(), 0, LIKE.half())
    inputs = torch.full((2, IN), 6e4, dtype=torch.float16)
    assert not torch.isfinite(inputs @ term.a).all(), "nothing overflows, so this shows nothing"
    assert torch.equal(term(inputs, torch.tensor([[0.0], [1.0]]))[0], torch.zeros(5, dtype=torch.float16))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["q_proj", "q_b_proj"])
def test_queries_that_are_made_alone_take_a_term(name: str, processes: int) -> None:
    """As with latent attention."""
    shared = {"tp_size": processes, "input_size": IN, "output_size": 8}
    parts = [parts_of(name, SimpleNamespace(tp_rank=number, **shared)) for number in range(processes)]  # type: ignore[arg-type]
    width = 8 // processes
    assert [(part.name, part.size, part.outputs, part.columns) for [part] in parts] == [
        (name, (IN, 8), slice(i * width, (i + 1) * width), slice(0, width)) for i in range(processes)
    ]
