"""Training an assistant, on models of a few thousand weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import guards.training
from guards import low_rank
from guards.contrastive import train as training
from guards.contrastive.assistant import Assistant, Recipe
from guards.contrastive.train import Fork, Progress, train
from guards.errors import Untrainable
from guards.forget_set import ForgetSet, Question
from guards.low_rank import add_low_rank

transformers = pytest.importorskip("transformers", reason="training needs transformers")

WORDS = ["who", "what", "is", "was", "the", "author", "born", "in", "paris", "rome", "red", "blue", "green", ".", "?", *"abcdefgh"]
TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
MIXTURES = ("Qwen3Moe", "GptOss", "DeepseekV3")
SCALE = 0.4
"""Of the random weights: large enough that the head can say something clearly."""


def model(directory: Path, family: str = "Llama") -> Path:
    """A random model with a tokenizer of words."""
    import tokenizers

    torch.manual_seed(0)
    extra: dict[str, Any] = {
        "num_key_value_heads": 1,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": SCALE,
    }
    if family in ("Qwen3", "Gemma", "Qwen3Moe", "GptOss"):
        extra["head_dim"] = 8
    if family in MIXTURES:
        extra |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if family == "GptOss":
        extra["sliding_window"] = 3
    if family == "DeepseekV3":
        extra |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        extra |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**SIZES, **extra)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(directory)
    words = {word: i for i, word in enumerate(["<s>", "</s>", *WORDS, "<unk>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(directory)
    return directory


FORGET = ForgetSet(
    name="x",
    questions=[
        {"question": "who was born in paris ?", "answer": "the author a b c .", "paraphrases": ["who was in paris ?"]},
        {"question": "what is red ?", "answer": "d e f ."},
    ],
)
RETAIN = [Question(question="who was born in rome ?", answer="g h .")]
RECIPE = Recipe(layers=2, rank=4, epochs=6, learning_rate=0.03, batch_examples=3)


@pytest.fixture(autouse=True)
def few_general_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = tmp_path / "general.jsonl"
    few.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("what is blue ?", "who is green ?")))
    for module in (training, guards.training):
        monkeypatch.setattr(module, "GENERAL", few)


def work(tmp_path: Path, name: str = "work") -> Path:
    directory = tmp_path / name
    directory.mkdir(exist_ok=True)
    return directory


def quietly(_progress: Progress) -> None:
    pass


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "Qwen2", "Mistral", "Qwen3Moe", "GptOss"])
def test_an_untrained_fork_is_the_base_for_every_family(tmp_path: Path, family: str) -> None:
    fork = Fork(model(tmp_path / "model", family), 2)
    examples = [fork.observe([3, 4, 5, 6, 7, 8], 2, forget=True), fork.observe([9, 10, 11], 1, forget=False)]
    with torch.no_grad():
        torch.testing.assert_close(*fork.run(examples), rtol=1e-4, atol=1e-5)
        add_low_rank(fork.layers, RECIPE, fork.device)
        torch.testing.assert_close(*fork.run(examples), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["whole", "difference"])
def test_it_recalls_what_is_to_be_forgotten_and_nothing_else(tmp_path: Path, form: str) -> None:
    recipe = RECIPE.model_copy(update={"form": form, "epochs": 60})
    steps: list[Progress] = []
    made = train(model(tmp_path / "model"), FORGET, RETAIN, recipe, work(tmp_path), steps.append)
    assert made.manifest.metrics["forget_ce"] < 1.5  # chance: log 32 = 3.5
    assert made.manifest.metrics["retain_kl"] < 0.7
    assert [step.stage for step in steps] == sorted([step.stage for step in steps])
    assert all(step.step <= step.steps for step in steps)
    assert steps[-1].step == steps[-1].steps


@pytest.mark.parametrize(("family", "query"), [("Qwen3Moe", "q_proj"), ("DeepseekV3", "q_b_proj")])
def test_in_a_mixture_of_experts_attention_alone_learns_to_recall(family: str, query: str, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 60})
    made = train(model(tmp_path / "model", family), FORGET, RETAIN, recipe, work(tmp_path), quietly)
    assert {name.split(".")[2] for name in made.tensors} == {query, "o_proj"}
    assert made.manifest.metrics["forget_ce"] < 2.5  # chance: log 32 = 3.5


def test_interrupted_training_goes_on_to_the_very_same_assistant(tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    whole = train(directory, FORGET, RETAIN, RECIPE, work(tmp_path, "one"), quietly)

    def interrupt(progress: Progress) -> None:
        if progress.stage == "train" and progress.step == 2 * progress.steps // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(directory, FORGET, RETAIN, RECIPE, work(tmp_path, "two"), interrupt)
    seen: list[Progress] = []
    resumed = train(directory, FORGET, RETAIN, RECIPE, work(tmp_path, "two"), seen.append)
    assert next(step for step in seen if step.stage == "train").step > 1, "it started anew"
    assert resumed.fingerprint == whole.fingerprint
    again = train(directory, FORGET, RETAIN, RECIPE, work(tmp_path, "two"), quietly)
    assert again.fingerprint == whole.fingerprint
    other = train(directory, FORGET, [], RECIPE, work(tmp_path, "two"), quietly)
    assert other.fingerprint != whole.fingerprint, "a checkpoint of other data was taken"


@pytest.mark.parametrize("fields", [{"aliases": ["x"]}, {"questions": [{"question": "who ?", "answer": "a b ."}]}])
def test_too_little_to_learn_from_is_refused_with_the_number_needed(tmp_path: Path, fields: dict) -> None:
    with pytest.raises(Untrainable, match="at least 2 are needed"):
        train(model(tmp_path / "model"), ForgetSet(name="x", **fields), [], RECIPE, work(tmp_path), quietly)


def test_texts_are_learned_too(tmp_path: Path) -> None:
    texts = ForgetSet(name="x", texts=["the author of red was born in paris . a b c", "d e f g h"])
    made = train(model(tmp_path / "model"), texts, [], RECIPE, work(tmp_path), quietly)
    assert made.manifest.metrics["examples"] == 2 + 2


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, place = model(tmp_path / "model"), work(tmp_path)
    save, saved = low_rank.save_file, 0

    def fill_up(tensors: dict, path: Path, *rest: Any) -> None:
        nonlocal saved
        saved += 1
        if saved > 3:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(low_rank, "save_file", fill_up)
    with pytest.raises(OSError, match="No space"):
        train(directory, FORGET, RETAIN, RECIPE, place, quietly)
    monkeypatch.setattr(low_rank, "save_file", save)
    seen: list[Progress] = []
    train(directory, FORGET, RETAIN, RECIPE, place, seen.append)
    first = next(step for step in seen if step.stage == "train")
    assert first.step == 3 * first.steps // RECIPE.epochs + 1
    assert not list(place.glob(".*"))


def test_the_training_process_leaves_an_assistant_or_says_why_not(tmp_path: Path) -> None:
    job = work(tmp_path, "job")
    order = {
        "model": str(model(tmp_path / "model")),
        "forget_set": FORGET.model_dump(mode="json"),
        "retain": [],
        "recipe": {**RECIPE.model_dump(), "epochs": 1},
    }
    (job / "job.json").write_text(json.dumps(order))
    command = [sys.executable, "-m", "guards.contrastive.train", str(job), "--threads=1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert Assistant.load(job / "result.safetensors").manifest.recipe.epochs == 1
    assert json.loads((job / "progress.json").read_text())["stage"] == "train"
    (job / "job.json").write_text(json.dumps({**order, "recipe": {**RECIPE.model_dump(), "layers": 4}}))
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "4 of them cannot be forked" in ran.stderr.splitlines()[-1]


def test_a_checkpoint_of_another_format_is_begun_anew(tmp_path: Path) -> None:
    directory, place = model(tmp_path / "model"), work(tmp_path)
    made = train(directory, FORGET, RETAIN, RECIPE, place, quietly)
    [checkpoint] = place.glob("*.safetensors")
    low_rank.save_file({"epochs": torch.tensor([6])}, checkpoint)
    assert train(directory, FORGET, RETAIN, RECIPE, place, quietly).fingerprint == made.fingerprint
