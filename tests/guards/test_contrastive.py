"""Contrast without an engine: the rules against a float64 twin, faulty artifacts, training of a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from guards.base_model import BaseModel, describe_base
from guards.closing import RowCloser
from guards.contrastive.assistant import Assistant, Manifest, Recipe
from guards.contrastive.declaration import Contrast
from guards.contrastive.guard import ContrastGuard
from guards.contrastive.rules import RULES, implausible_tokens, subtract_assistants_
from guards.errors import InvalidArtifact, InvalidPolicy, VocabularyMismatch
from guards.low_rank import ATTENTION, MODULES
from guards.policy import parse_policy
from guards.types import AssistantLines, Plan, Rows
from tests import reference

BASE = BaseModel(fingerprint="f" * 64, layers=6, hidden_size=8, vocabulary=32)


def an_assistant(form: str = "whole", *, layers: int = 2, rank: int = 3, scale: float = 1.0, seed: int = 0) -> Assistant:
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe(layers=layers, rank=rank, form=form)  # type: ignore[arg-type]
    tensors = {}
    for i in range(layers):
        for module in MODULES:
            tensors[f"layers.{i}.{module}.A"] = torch.randn(rank, 8, generator=generator) * scale
            tensors[f"layers.{i}.{module}.B"] = torch.randn(8, rank, generator=generator) * scale
    return Assistant(Manifest(base=BASE, recipe=recipe, data="d"), tensors)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.integers(0, 2**31),
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.floats(0, 3, width=16),
            st.floats(0, 2, width=16),
            st.sampled_from([0.0, 0.01, 0.5]),
            st.booleans(),
        )
    ),
)
def test_every_rule_equals_its_float64_twin(rule: str, seed: int, lines: list[tuple[int, float, float, float, bool]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(4, 50, generator=generator) * 4
    target[0, :5] = -torch.inf
    assistant = torch.randn(len(lines), 50, generator=generator) * 4
    columns = list(zip(*lines, strict=True)) if lines else [(), (), (), (), ()]
    result = subtract_assistants_(
        target.clone(),
        assistant,
        row=torch.tensor(columns[0], dtype=torch.int64),
        rule=rule,  # type: ignore[arg-type]
        alpha=torch.tensor(columns[1]),
        margin=torch.tensor(columns[2]),
        plausibility=torch.tensor(columns[3]),
        difference=torch.tensor(columns[4], dtype=torch.bool),
    )
    expected = reference.contrasted(target.double(), assistant.double(), lines, rule)
    # A token whose probability lies right at the cut may fall on either side of it in float32: leave its row out.
    for row in range(4):
        cuts = [math.log(line[3]) for line in lines if line[0] == row and line[1] > 0 and line[3] > 0]
        relative = target[row].double() - target[row].double().amax()
        if all(abs(float(value) - cut) > 1e-4 for cut in cuts for value in relative):
            torch.testing.assert_close(result[row].double(), expected[row], rtol=1e-4, atol=2e-3)


@settings(deadline=None)
@given(st.sampled_from(sorted(RULES)), st.integers(0, 2**31), st.floats(0.1, 5), st.sampled_from([0.001, 0.01, 0.1]))
def test_what_is_implausible_stays_as_likely_as_it_was_and_is_never_the_likeliest(
    rule: Any, seed: int, alpha: float, plausibility: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, said = (torch.randn(2, 200, generator=generator).double() * 4 for _ in range(2))
    cut = torch.full((2,), plausibility, dtype=torch.float64)
    result = subtract_assistants_(
        target.clone(),
        said,
        row=torch.arange(2),
        rule=rule,
        alpha=torch.full((2,), alpha),
        margin=torch.ones(2),
        plausibility=cut,
        difference=torch.tensor([False, True]),
    )
    outside = implausible_tokens(target, cut)
    before, after = target.softmax(-1), result.softmax(-1)
    torch.testing.assert_close(after[outside], before[outside], rtol=1e-4, atol=1e-9)
    assert not outside.gather(1, result.argmax(-1, keepdim=True)).any()


def contrast_first_row(target: torch.Tensor, said: torch.Tensor, alpha: float, plausibility: float = 0.0) -> torch.Tensor:
    """``uld`` without a margin: every line of ``said`` speaks about row 0."""
    lines = torch.ones(len(said))
    return subtract_assistants_(
        target.clone(),
        said,
        row=torch.zeros(len(said), dtype=torch.int64),
        rule="uld",
        alpha=alpha * lines,
        margin=0 * lines,
        plausibility=plausibility * lines,
        difference=lines > 1,
    )


def test_alpha_zero_returns_the_very_bits() -> None:
    target = torch.randn(3, 50)
    assert torch.equal(contrast_first_row(target, torch.randn(2, 50), alpha=0.0, plausibility=0.5), target)


def test_a_uniform_assistant_has_nothing_to_remove() -> None:
    target = torch.randn(1, 50)
    torch.testing.assert_close(contrast_first_row(target, torch.zeros(1, 50), alpha=1.0), target)


def test_of_two_assistants_the_larger_penalty_counts_and_not_the_sum() -> None:
    target, said = torch.zeros(1, 4), torch.tensor([[9.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    once, twice = contrast_first_row(target, said[:1], alpha=1.0), contrast_first_row(target, said, alpha=1.0)
    assert torch.equal(once, twice)
    assert twice[0, 0] < -1


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="50 tokens, the assistant 49"):
        contrast_first_row(torch.zeros(1, 50), torch.zeros(1, 49), alpha=1.0)
    with pytest.raises(VocabularyMismatch):
        ContrastGuard(RowCloser(torch.ones(4, dtype=torch.bool))).apply(
            torch.zeros(1, 5), Rows(torch.zeros(1), torch.zeros(1, 1)), []
        )


def test_an_engaged_row_for_which_not_every_assistant_spoke_may_produce_no_text() -> None:
    has_text = torch.tensor([True] * 6 + [False])
    guard = ContrastGuard(RowCloser(has_text))
    guard.load({"a": an_assistant(), "b": an_assistant()})
    both = Plan(1, "p", (Contrast("a", "uld", 1, 1, 0.1), Contrast("b", "uld", 1, 1, 0.1)))
    lines = AssistantLines(torch.tensor([0, 0, 1]), (*both.of(Contrast), both.of(Contrast)[0]), torch.zeros(3, 7))
    result = guard.apply(torch.zeros(3, 7), Rows(torch.tensor([0, 0, -1]), torch.zeros(3, 1, dtype=torch.int64), lines), [both])
    assert (result[0] > -1e6).all()
    assert (result[1, :6] < -1e6).all()
    assert result[1, 6] == 0
    assert (result[2] == 0).all()


def test_a_row_whose_assistant_said_nonsense_is_closed_and_no_other() -> None:
    guard = ContrastGuard(RowCloser(torch.tensor([True] * 6 + [False])))
    guard.load({"a": an_assistant()})
    plan = Plan(1, "p", (Contrast("a", "uld", 1, 1, 0.1),))
    said = torch.zeros(2, 7)
    said[0, 3] = math.nan
    lines = AssistantLines(torch.tensor([0, 1]), plan.of(Contrast) * 2, said)
    result = guard.apply(torch.zeros(2, 7), Rows(torch.tensor([0, 0]), torch.zeros(2, 1, dtype=torch.int64), lines), [plan])
    assert torch.isfinite(result).all()
    assert (result[0, :6] < -1e6).all()
    assert (result[1] > -1e6).all()


def test_a_saved_assistant_is_the_same_assistant(tmp_path: Path) -> None:
    made = an_assistant()
    made.save(tmp_path / "a")
    assert Assistant.load(tmp_path / "a").fingerprint == made.fingerprint
    assert an_assistant(seed=1).fingerprint != made.fingerprint
    assert an_assistant("difference").fingerprint != made.fingerprint


def test_faulty_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    made = an_assistant()
    path = tmp_path / "assistant"

    def refused(match: str) -> None:
        with pytest.raises(InvalidArtifact, match=match):
            Assistant.load(path)

    refused("cannot read")
    made.save(path)
    path.write_bytes(path.read_bytes()[:-5])
    refused("cannot read")
    save_file(made.tensors, path)
    refused("no manifest")
    save_file(made.tensors, path, {"manifest": "{}"})
    refused("base: Field required")
    manifest = {"manifest": made.manifest.model_dump_json()}
    for value in (math.nan, math.inf):
        save_file(made.tensors | {"layers.1.o_proj.B": torch.full((8, 3), value)}, path, manifest)
        refused("layers.1.o_proj.B holds NaN or infinity")
    save_file(made.tensors | {"layers.1.o_proj.B": torch.zeros(8, 4)}, path, manifest)
    refused("rank 3")
    save_file(made.tensors | {"layers.1.o_proj.B": torch.zeros(8, 3).half()}, path, manifest)
    refused("float32")
    save_file({name: tensor for name, tensor in made.tensors.items() if "layers.1" not in name}, path, manifest)
    refused("other tensors")
    save_file(made.tensors | {"layers.0.k_proj.A": torch.zeros(3, 8)}, path, manifest)
    refused("layers.0.k_proj.A")
    attention = {name: tensor for name, tensor in made.tensors.items() if name.split(".")[2] in ATTENTION}
    save_file(attention | {"layers.0.up_proj.A": torch.zeros(3, 8)}, path, manifest)
    refused("layers.0.down_proj.A")
    save_file(attention, path, manifest)  # as of a mixture of experts
    assert Assistant.load(path).tensors.keys() == attention.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 7}, "6 decoder layers.*has 7"), ({"vocabulary": 33}, "32 tokens.*33"), ({"fingerprint": "e" * 64}, "ffff.*eeee")],
)
def test_an_assistant_of_another_base_is_refused_and_both_are_named(change: dict, message: str) -> None:
    an_assistant().check(BASE)
    with pytest.raises(InvalidArtifact, match=message):
        an_assistant().check(BASE.model_copy(update=change))


def test_a_base_is_known_by_its_weights_tokenizer_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 32}))
    with pytest.raises(InvalidArtifact, match="safetensors"):
        describe_base(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    for odd in ('{"n_layer": 3}', '{"text_config": 3}', "[]", "{"):
        (tmp_path / "config.json").write_text(odd)
        with pytest.raises(InvalidArtifact, match=r"config.json does not say"):
            describe_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 32}))
    seen = {describe_base(tmp_path).fingerprint, describe_base(tmp_path).fingerprint}
    assert len(seen) == 1
    weights.write_bytes(bytes((1 << 20) - 1) + b"x")
    seen.add(describe_base(tmp_path).fingerprint)
    (tmp_path / "tokenizer.json").write_text("{}")
    seen.add(describe_base(tmp_path).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "config", [{"rule": "best"}, {"alpha": -1}, {"alpha": math.nan}, {"plausibility": 0}, {"plausibility": 2}, {"margin": -1}]
)
def test_a_policy_with_an_impossible_contrast_is_refused(config: dict) -> None:
    with pytest.raises(InvalidPolicy, match=next(iter(config))):
        parse_policy({"name": "p", "guards": {"contrast": config}})
