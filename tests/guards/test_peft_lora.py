"""LoRA adapters from elsewhere, in PEFT's format, on models of a few thousand weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from guards.contrastive.assistant import Recipe
from guards.contrastive.train import Fork, train
from guards.errors import InvalidArtifact, Untrainable
from guards.forget_set import ForgetSet
from guards.low_rank import MODULES, add_low_rank
from guards.peft_lora import CONFIG, WEIGHTS, PeftLora
from guards.steering.artifact import SteeringOrder, SteeringRecipe, check_order
from guards.steering.train import make
from guards.training import ChatModel
from tests.guards.test_contrastive_train import FORGET, RETAIN, model, quietly, work
from tests.guards.test_steering import FORGET as MANY
from tests.guards.test_steering import few_general_prompts

assert few_general_prompts, "used by every test here"

pytest.importorskip("transformers", reason="adapters are run with transformers")
SIZES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (16, 8),
    "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (16, 24),
    "mlp.up_proj": (16, 24),
    "mlp.down_proj": (24, 16),
}


def adapter(directory: Path, modules: list[tuple[int, str]], *, rank: int = 2, scale: float = 0.5, **config: Any) -> Path:
    """An adapter with random terms on ``modules``, each a layer and a projection."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer, module in modules:
        inputs, outputs = SIZES[module]
        place = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{place}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * scale
        tensors[f"{place}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * scale
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none"} | config))
    return directory


EVERYWHERE = [(layer, module) for layer in range(4) for module in SIZES]


@torch.no_grad()
def logits(chat: ChatModel, ids: list[int]) -> torch.Tensor:
    return chat.model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}])
def test_a_model_with_an_adapter_computes_as_with_its_merged_weights(config: dict[str, Any], tmp_path: Path) -> None:
    chat, ids = ChatModel(model(tmp_path / "model")), [3, 4, 5, 6]
    lora = PeftLora.read(adapter(tmp_path / "lora", EVERYWHERE, **config))
    before = logits(chat, ids)
    with lora.applied(chat.model):
        applied = logits(chat, ids)
    assert torch.equal(logits(chat, ids), before), "the weights stay as they were"
    for term in lora.terms:
        usual = 4 / 2**0.5 if config.get("use_rslora") else 2.0
        scale = 4.5 if "alpha_pattern" in config and term.projection == "q_proj" else usual
        a, b = _factors(tmp_path / "lora", term.module)
        torch.testing.assert_close(term.b @ term.a, b @ a * scale)
        chat.model.get_submodule(term.module).weight.data += term.b @ term.a
    torch.testing.assert_close(applied, logits(chat, ids), rtol=1e-4, atol=1e-4)
    assert (applied - before).abs().max() > 0.1


def _factors(directory: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(directory / WEIGHTS)
    return tuple(tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")  # type: ignore[return-value]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "'all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
}


@pytest.mark.parametrize(("config", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_changes_more_than_projections_is_refused_by_name(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=named):
        PeftLora.read(adapter(tmp_path / "lora", EVERYWHERE, **config))


def test_files_that_are_no_adapter_or_one_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=CONFIG):
        PeftLora.read(tmp_path)
    directory = adapter(tmp_path / "lora", [(0, "mlp.up_proj")])
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 16)}, directory / WEIGHTS)
    with pytest.raises(InvalidArtifact, match="lm_head"):
        PeftLora.read(directory)
    save_file({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 16)}, directory / WEIGHTS)
    with pytest.raises(InvalidArtifact, match="two factors"):
        PeftLora.read(directory)
    chat = ChatModel(model(tmp_path / "model"))
    with pytest.raises(InvalidArtifact, match=r"layers\.9.*does not have"):
        PeftLora.read(adapter(tmp_path / "deep", [(9, "mlp.up_proj")])).check(chat.model)
    wide = adapter(tmp_path / "wide", [(1, "mlp.up_proj")])
    place = "base_model.model.model.layers.1.mlp.up_proj.lora"
    save_file({f"{place}_A.weight": torch.zeros(2, 17), f"{place}_B.weight": torch.zeros(24, 2)}, wide / WEIGHTS)
    with pytest.raises(InvalidArtifact, match=r"maps 17 to 24.*made for another model"):
        PeftLora.read(wide).check(chat.model)
    chat.model.tower = torch.nn.Module()
    chat.model.tower.layers = torch.nn.ModuleList([copy.deepcopy(chat.model.get_decoder().layers[0])])
    tensors = {"A": torch.zeros(2, 16), "B": torch.zeros(24, 2)}
    save_file({f"base_model.model.tower.layers.0.mlp.up_proj.lora_{f}.weight": each for f, each in tensors.items()}, wide / WEIGHTS)
    with pytest.raises(InvalidArtifact, match=r"tower.*not in the language model's layers"):
        PeftLora.read(wide).check(chat.model)


def test_an_adapter_of_the_last_layers_is_taken_over_as_it_is(tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    lora = PeftLora.read(adapter(tmp_path / "lora", [(3, "self_attn.q_proj"), (2, "mlp.down_proj")]))
    made = make(directory, FORGET, RETAIN, [], SteeringRecipe(method="adapter", layers=2), work(tmp_path), quietly, lora)
    assert made.manifest.metrics == {"imported": 1.0} and made.rank == 2
    chat, ids = ChatModel(directory), [3, 4, 5, 6]
    with lora.applied(chat.model):
        wanted = logits(chat, ids)
    recipe = SteeringRecipe(method="adapter", layers=2, rank=2)
    parameters = add_low_rank(chat.model.get_decoder().layers[2:], recipe, chat.device)
    assert parameters.keys() == made.tensors.keys() and len(parameters) == 2 * 2 * len(MODULES)
    for name, value in parameters.items():
        value.data.copy_(made.tensors[name] / (2.0 if name.endswith("B") else 1.0))
    torch.testing.assert_close(logits(chat, ids), wanted, rtol=1e-4, atol=1e-4)


def test_any_other_adapter_is_learned_by_what_it_says_of_the_set(tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    lora = PeftLora.read(adapter(tmp_path / "lora", EVERYWHERE, scale=0.3))
    recipe = SteeringRecipe(method="adapter", layers=3, rank=8, epochs=60, learning_rate=0.02)
    metrics = make(directory, MANY, RETAIN, [], recipe, work(tmp_path), quietly, lora).manifest.metrics
    untrained = make(
        directory, MANY, RETAIN, [], recipe.model_copy(update={"epochs": 1, "learning_rate": 1e-9}), work(tmp_path), quietly, lora
    ).manifest.metrics
    assert metrics["forget_kl"] < 0.3 * untrained["forget_kl"]
    texts = ForgetSet(name="x", texts=["the author was born in paris . the author was born in rome ."] * 9)
    with pytest.raises(Untrainable, match="has no questions"):
        make(directory, texts, RETAIN, [], recipe, work(tmp_path), quietly, lora)


def test_an_assistant_learns_to_say_what_an_adapter_says(tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    lora = PeftLora.read(adapter(tmp_path / "lora", EVERYWHERE, scale=0.3))
    recipe = Recipe(layers=3, rank=8, epochs=80, learning_rate=0.02, form="difference")
    made = train(directory, FORGET, RETAIN, recipe, work(tmp_path), quietly, lora)
    fork = Fork(directory, 3)
    ids, start = next(iter(fork.sequences(FORGET)))
    example = fork.observe(ids, start, forget=True, lora=lora)
    wanted = torch.log_softmax(fork.logits(example.taught), dim=-1)

    def apart(evidence: torch.Tensor) -> float:
        return float((wanted.exp() * (wanted - evidence)).sum(-1).mean())

    before = apart(fork.evidence([example], "whole"))
    for name, value in add_low_rank(fork.layers, recipe, fork.device).items():
        value.data.copy_(made.tensors[name] / (2.0 if name.endswith("B") else 1.0))
    with torch.no_grad():
        after = apart(fork.evidence([example], "whole"))
    assert after < 0.3 * before
    assert made.manifest.metrics["imported_forget_kl"] == pytest.approx(after, abs=0.2)
    other = train(directory, FORGET, RETAIN, recipe, work(tmp_path), quietly)
    assert other.fingerprint != made.fingerprint


def test_an_order_that_imports_and_distils_at_once_is_refused() -> None:
    base: Any = type("Base", (), {"layers": 30})()
    check_order(SteeringOrder(recipe=SteeringRecipe(method="adapter"), lora="/x"), base)
    with pytest.raises(Untrainable, match="LoRA adapter is imported as method 'adapter'"):
        check_order(SteeringOrder(recipe=SteeringRecipe(method="steer"), lora="/x"), base)
