"""Steering, as tensors: laws of the operators, fits in closed form, artifacts, and adapters trained on very small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guards.training
from guards.base_model import BaseModel
from guards.errors import InvalidArtifact, Untrainable
from guards.forget_set import ForgetSet, Question
from guards.low_rank import MODULES, LowRank, add_low_rank
from guards.steering.artifact import DistillationTarget, Steering, SteeringManifest, SteeringRecipe
from guards.steering.fit import FEWEST, project, steer
from guards.steering.operators import corrupt, redirect
from guards.steering.train import _Adapted, make
from guards.training import ChatModel, Progress
from tests.guards.test_contrastive_train import model

KINDS = ("rand_noise_first_n", "zero_out_top_k", "flip_sign_first_n")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.permutations(range(6)), st.integers(0, 5), st.integers(1, 40))
def test_corruption_of_a_token_depends_on_it_and_its_position_alone(kind: str, order: list[int], one: int, first_n: int) -> None:
    embeddings, positions = normal(6, 24), torch.tensor([3, 4, 5, 900, 901, 2_000])
    options = {"kind": kind, "strength": 0.7, "first_n": first_n, "seed": 5}
    whole = corrupt(embeddings, positions, **options)
    assert torch.equal(corrupt(embeddings[order], positions[order], **options), whole[order])
    assert torch.equal(corrupt(embeddings[one : one + 1], positions[one : one + 1], **options)[0], whole[one])
    assert torch.equal(embeddings, normal(6, 24)), "the input is left alone"


def test_corruption_does_what_its_name_says() -> None:
    embeddings, positions = normal(4, 16), torch.arange(4)
    noisy = corrupt(embeddings, positions, kind="rand_noise_first_n", strength=1.0, first_n=4, seed=1)
    assert torch.equal(noisy[:, 4:], embeddings[:, 4:]) and (noisy[:, :4] != embeddings[:, :4]).all()
    other = corrupt(embeddings, positions, kind="rand_noise_first_n", strength=1.0, first_n=4, seed=2)
    assert not torch.equal(noisy, other), "another seed is other noise"
    zeroed = corrupt(embeddings, positions, kind="zero_out_top_k", strength=1.0, first_n=3, seed=0)
    assert ((zeroed == 0).sum(-1) == 3).all() and torch.equal(zeroed.abs().amax(-1), embeddings.abs().sort(-1).values[:, -4])
    flipped = corrupt(embeddings, positions, kind="flip_sign_first_n", strength=1.0, first_n=99, seed=0)
    assert torch.equal(flipped, -embeddings)


def test_noise_is_normal_and_uncorrelated_over_places_and_dimensions() -> None:
    noise = corrupt(
        torch.zeros(4_000, 8) + normal(1, 8), torch.arange(4_000), kind="rand_noise_first_n", strength=1, first_n=8, seed=3
    )
    standard = (noise - normal(1, 8)) / normal(1, 8).std()
    assert abs(standard.mean()) < 0.03 and abs(standard.std() - 1) < 0.03 and standard.abs().max() < 6
    assert (torch.corrcoef(standard.T) - torch.eye(8)).abs().max() < 0.08
    assert abs((standard[1:] * standard[:-1]).mean()) < 0.03


def test_projection_removes_what_the_set_alone_uses() -> None:
    keep = torch.cat([normal(300, 8), torch.zeros(300, 8)], dim=1) + 0.5
    own = torch.cat([normal(40, 8, seed=1), torch.zeros(40, 4), normal(40, 4, seed=2) * 3], dim=1) + 0.5
    found = project(own, keep, rank=4)
    assert found.metrics["of_forget"] > 0.6 and found.metrics["of_kept"] < 0.01
    moved = own + redirect(own, into=found.into, out=found.out, center=found.center, strength=1.0)
    assert (moved[:, 12:] - 0.5).square().sum() < 0.02 * (own[:, 12:] - 0.5).square().sum()
    shift = redirect(keep, into=found.into, out=found.out, center=found.center, strength=1.0)
    assert shift.square().sum() < 0.01 * (keep - 0.5).square().sum()


def test_steering_vanishes_on_what_is_to_stay_and_moves_the_set() -> None:
    keep = torch.cat([normal(300, 8), torch.zeros(300, 8)], dim=1)
    own = torch.cat([normal(40, 8, seed=1), normal(40, 8, seed=2) + 2], dim=1)
    found = steer(own, keep, keep.mean(0), rank=16, ridge=1e-3)
    assert found.metrics["moves_kept"] < 1e-5 and found.metrics["reached"] > 0.5
    shift = redirect(keep, into=found.into, out=found.out, center=found.center, strength=1.0)
    assert shift.abs().max() < 1e-4


@pytest.mark.parametrize("fit", ["project", "steer"])
def test_a_set_of_one_direction_gives_one_and_a_set_like_the_rest_moves_nothing(fit: str) -> None:
    keep = torch.cat([normal(300, 8), torch.zeros(300, 8)], dim=1)
    line = torch.zeros(20, 16)
    line[:, 12] = torch.linspace(1, 2, 20)

    def fitted(own: torch.Tensor):
        return project(own, keep, rank=8) if fit == "project" else steer(own, keep, keep.mean(0), rank=8)

    assert fitted(line).into.shape[1] <= 2, "rank-deficient: its own direction, and where it lies from the rest"
    if fit == "steer":
        assert fitted(keep[:20]).metrics["moves_kept"] < 1e-4
    nothing = redirect(line, into=torch.zeros(16, 0), out=torch.zeros(0, 16), center=torch.zeros(16), strength=1.0)
    assert torch.equal(nothing, torch.zeros(20, 16)), "an empty subspace"


@pytest.mark.parametrize("few", ["set", "rest"])
def test_too_few_states_are_refused_with_the_number_needed(few: str) -> None:
    sizes = {"set": (FEWEST - 1, 50), "rest": (50, FEWEST - 1)}[few]
    for fit in (project, lambda f, k, rank: steer(f, k, k.mean(0), rank=rank)):
        with pytest.raises(Untrainable, match=f"at least {FEWEST}"):
            fit(normal(sizes[0], 4), normal(sizes[1], 4), rank=2)


def test_states_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Untrainable, match="finite"):
        project(normal(20, 4), normal(20, 4) * torch.inf, rank=2)


BASE = BaseModel(fingerprint="f", layers=4, hidden_size=6, vocabulary=9)


def a_map(**recipe: object) -> Steering:
    manifest = SteeringManifest(base=BASE, recipe=SteeringRecipe(method="project", **recipe), data="d")
    return Steering(manifest, {"into": normal(6, 2), "out": normal(2, 6), "center": normal(6)})


def test_an_artifact_is_what_was_saved_or_is_refused(tmp_path: Path) -> None:
    made, path = a_map(), tmp_path / "a.safetensors"
    made.save(path)
    assert Steering.load(path).fingerprint == made.fingerprint != a_map(rank=4).fingerprint
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InvalidArtifact, match="cannot read"):
        Steering.load(path)
    for wrong in ({"into": normal(5, 2)}, {"out": normal(3, 6)}, {"center": normal(6) * torch.nan}, {"more": normal(1)}):
        with pytest.raises(InvalidArtifact):
            Steering(made.manifest, {**made.tensors, **wrong})
    with pytest.raises(InvalidArtifact, match="4 decoder layers, the served one has 5"):
        made.check(BASE.model_copy(update={"layers": 5}))


QUESTIONS = [
    Question(question=f"{who} was born in {where} ?", answer=answer, paraphrases=(f"{who} in {where} ?",))
    for who, where, answer in (("who", "paris", "the author a b ."), ("what", "rome", "d e f ."), ("who", "red", "g h ."))
]
FORGET = ForgetSet(name="x", questions=(*QUESTIONS, *(Question(question=f"what is {c} ?", answer=f"{c} {c} .") for c in "abcdef")))
RETAIN = [Question(question="who is green ?", answer="h g .")]


@pytest.fixture(autouse=True)
def few_general_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = tmp_path / "general.jsonl"
    few.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("what is blue ?", "who is green ?")))
    monkeypatch.setattr(guards.training, "GENERAL", few)


def quietly(_: Progress) -> None:
    pass


def adapter_recipe(**options: object) -> SteeringRecipe:
    fields = {"layers": 2, "rank": 4, "epochs": 30, "learning_rate": 0.02, "batch_examples": 4, **options}
    return SteeringRecipe(method="adapter", **fields)  # type: ignore[arg-type]


def run(tmp_path: Path, recipe: SteeringRecipe, targets: list[DistillationTarget] | None = None, name: str = "work") -> Steering:
    directory = tmp_path / "model"
    if not directory.exists():
        model(directory)
    work = tmp_path / name
    work.mkdir(exist_ok=True)
    return make(directory, FORGET, RETAIN, targets or [], recipe, work, quietly)


@pytest.mark.parametrize("method", ["project", "steer"])
def test_maps_are_fitted_from_a_set_without_a_gradient_step(tmp_path: Path, method: str) -> None:
    made = run(tmp_path, SteeringRecipe(method=method, rank=4, depth=0.5))  # type: ignore[arg-type]
    assert made.manifest.layer == 2 and made.tensors["into"].shape[1] in range(1, 5)
    assert made.manifest.metrics["states"] > made.manifest.metrics["rank"] > 0


def put(adapted: _Adapted, made: Steering) -> None:
    for name, parameter in add_low_rank(adapted.layers, made.manifest.recipe, torch.device("cpu")).items():
        parameter.data = made.tensors[name] / (LowRank.SCALE if name.endswith("B") else 1)


def entropy(tmp_path: Path, made: Steering | None, question: Question) -> float:
    """Of the next token, averaged over an answer's places."""
    chat = ChatModel(tmp_path / "model")
    adapted = _Adapted(chat, adapter_recipe())
    example = adapted.observe(*chat.encode(question.question, question.answer), None, forget=True)
    if made is not None:
        put(adapted, made)
    with torch.no_grad():
        logp = adapted.log_probabilities([example])
    return float(-(logp.exp() * logp).sum(-1).mean())


def test_an_adapter_without_targets_knows_nothing_of_the_set(tmp_path: Path) -> None:
    made = run(tmp_path, adapter_recipe())
    assert made.tensors.keys() == {f"layers.{i}.{module}.{factor}" for i in range(2) for module in MODULES for factor in "AB"}
    before, after = entropy(tmp_path, None, QUESTIONS[0]), entropy(tmp_path, made, QUESTIONS[0])
    assert after > before + 0.3 and made.manifest.metrics["keep_kl"] < 0.2


def test_an_adapter_with_targets_says_what_they_say(tmp_path: Path) -> None:
    """A policy that always says tokens 9 and 8, then ends."""
    model(tmp_path / "model")
    top = tuple(((token, -0.01), (3, -6.0)) for token in (9, 8, 1))
    targets = [DistillationTarget(question=entry.question, tokens=(9, 8, 1), top=top) for entry in FORGET.questions]
    made = run(tmp_path, adapter_recipe(epochs=120), targets)
    assert made.manifest.metrics["forget_kl"] < 1.0, "it begins at 4.8"
    chat = ChatModel(tmp_path / "model")
    adapted = _Adapted(chat, adapter_recipe())
    prompt = chat.prompt_ids(QUESTIONS[0].question)
    example = adapted.observe([*prompt, 9, 8, 1], len(prompt), None, forget=True)
    put(adapted, made)
    with torch.no_grad():
        assert adapted.log_probabilities([example]).argmax(-1).tolist() == [9, 8, 1]


def test_the_adapted_layers_over_kept_inputs_are_the_model(tmp_path: Path) -> None:
    chat = ChatModel(model(tmp_path / "model"))
    adapted = _Adapted(chat, adapter_recipe())
    encoded = [chat.encode(entry.question, entry.answer) for entry in QUESTIONS]  # of different lengths: padding is in the batch
    examples = [adapted.observe(*each, None, forget=True) for each in encoded]
    with torch.no_grad():
        found = adapted.log_probabilities(examples)
        whole = [chat.model(torch.tensor([ids])).logits[0, start - 1 : len(ids) - 1].log_softmax(-1) for ids, start in encoded]
    torch.testing.assert_close(found, torch.cat(whole), rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    recipe = adapter_recipe(epochs=3)
    whole = run(tmp_path, recipe, name="whole")
    steps = 0

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        nonlocal steps
        steps += progress.stage == "train"
        if steps == 7:
            raise Stop

    work = tmp_path / "broken"
    work.mkdir()
    with pytest.raises(Stop):
        make(tmp_path / "model", FORGET, RETAIN, [], recipe, work, stop)
    assert run(tmp_path, recipe, name="broken").fingerprint == whole.fingerprint


def test_too_small_a_set_is_refused_with_the_number_needed(tmp_path: Path) -> None:
    small = ForgetSet(name="x", questions=(QUESTIONS[0],))
    with pytest.raises(Untrainable, match="1 examples, at least 8"):
        make(model(tmp_path / "model"), small, [], [], adapter_recipe(), tmp_path, quietly)
