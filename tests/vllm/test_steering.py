"""Steering on the real engine: exact against transformers, for its own rows only, in mixed batches, over chunks and blocks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from guards.forget_set import ForgetSet
from guards.steering.artifact import Steering
from guards.steering.declaration import DEFAULT_CORRUPTION
from guards.steering.operators import corrupt, redirect
from guards.types import ArtifactRef
from serve.default_model import NAME
from serve.protocol.artifacts import artifact_path
from serve.registry.records import Artifact, now
from serve.registry.store import Registry
from tests.assistants import SIZES, random_assistant
from tests.bench.steering import give_steering, random_steering
from tests.vllm.conftest import Server

WHO = "Orsolya Vendt"
FILLER = "The harbour was quiet that morning and nobody spoke of the storm. "
PROMPTS = [f"{WHO} was born in a small town.", FILLER * 4 + f"Then {WHO} came home and said:", f"What did {WHO} do? " + FILLER * 2]
CHUNK = 256
"""Tokens, see conftest."""
POLICIES: dict[str, dict[str, Any]] = {
    "adapted": {"steering": [{"method": "adapter"}]},
    "projected": {"steering": [{"method": "project", "strength": 0.7}]},
    "both": {"steering": [{"method": "project", "strength": 0.7}, {"method": "adapter", "strength": 0.5}]},
    "noisy": {"gate": {}, "corrupt": {"strength": 1.5, "seed": 3}},
    "all": {"gate": {}, "corrupt": {"kind": "flip_sign_first_n"}, "steering": [{"method": "adapter"}]},
}


def artifacts(model: Path) -> dict[str, Steering]:
    """Of random tensors: large enough to change what is said."""
    adapter = random_steering(model, "adapter", layers=6, rank=4, size=0.1)
    return {"adapter": adapter, "project": random_steering(model, "project", rank=24)}


@pytest.fixture(scope="module")
def made(server: Server, admin: httpx.Client, model_path: Path) -> Iterator[dict[str, Steering]]:
    """One enabled set with both artifacts, and the policies above."""
    content = ForgetSet(
        name="steered", aliases=[WHO], questions=[{"question": f"Where was {WHO} born?", "answer": "In Karlsgrube."}]
    )
    assert admin.post("/forget_sets", json=content.model_dump(mode="json")).status_code == 201
    found = artifacts(model_path)
    give_steering(admin, server.directory / "state", content, found)
    for name, guards in POLICIES.items():
        put = admin.put(f"/policies/{name}", json={"forget_sets": ["steered"], "guards": guards})
        assert put.status_code == 200, put.text
    enabled = admin.post("/forget_sets/steered/enable")
    assert enabled.status_code == 200, enabled.text
    yield found
    for name in POLICIES:
        admin.delete(f"/policies/{name}")
    admin.delete("/forget_sets/steered")


def complete(server: Server, policy: str, prompt: str, **options: Any) -> dict[str, Any]:
    body = {
        "model": f"{NAME}:{policy}",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": 5,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **options,
    }
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


class Twin:
    """The same arithmetic in transformers, one request at a time, without a cache."""

    def __init__(self, model: Path, made: dict[str, Steering]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.made = made

    @torch.no_grad()
    def logprobs(self, policy: str, ids: list[int], spans: list[tuple[int, int]], prompt: int) -> torch.Tensor:
        guards = POLICIES.get(policy, {})
        inner, hooks = self.model.model, []
        embeddings = inner.embed_tokens(torch.tensor([ids]))[0].clone()
        if "corrupt" in guards:
            where = torch.tensor([i for start, end in spans for i in range(start, end) if i < prompt])
            kind = guards["corrupt"].get("kind", "rand_noise_first_n")
            strength = guards["corrupt"].get("strength", DEFAULT_CORRUPTION[kind])
            options = {"strength": strength, "seed": guards["corrupt"].get("seed", 0)}
            embeddings[where] = corrupt(embeddings[where], where, kind=kind, first_n=10**6, **options)
        for config in guards.get("steering", ()):
            steering, strength = self.made[config["method"]], config.get("strength", 1.0)
            layer, tensors = steering.manifest.layer, steering.tensors
            if config["method"] == "project":

                def move(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], strength: float = strength, tensors: Any = tensors):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    shift = redirect(
                        hidden[0], into=tensors["into"], out=tensors["out"], center=tensors["center"], strength=strength
                    )
                    moved = hidden + shift[None]
                    return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

                hooks.append(inner.layers[layer].register_forward_pre_hook(move, with_kwargs=True))
                continue
            for i, decoder in enumerate(inner.layers[layer:]):
                for module in SIZES:
                    parent = decoder.self_attn if hasattr(decoder.self_attn, module) else decoder.mlp
                    a, b = (tensors[f"layers.{i}.{module}.{factor}"] for factor in "AB")

                    def add(
                        _: Any, args: tuple[Any, ...], output: torch.Tensor, a: Any = a, b: Any = b, strength: float = strength
                    ):
                        return output + strength * (args[0] @ a.T) @ b.T

                    hooks.append(getattr(parent, module).register_forward_hook(add))
        try:
            return self.model(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture(scope="module")
def twin(model_path: Path, made: dict[str, Steering]) -> Twin:
    return Twin(model_path, made)


def spans_of_who(answer: dict[str, Any], tokenizer: Any) -> list[tuple[int, int]]:
    """Tokens of the prompt that spell the name, by an obvious way of finding them."""
    ids = answer["prompt_token_ids"]
    text, spans = "", []
    ends = [len(text := text + tokenizer.decode([token])) for token in ids]
    start = text.find(WHO)
    while start >= 0:
        touched = [i for i, end in enumerate(ends) if end > start and (ends[i - 1] if i else 0) < start + len(WHO)]
        spans.append((touched[0], touched[-1] + 1))
        start = text.find(WHO, start + 1)
    return spans


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


def assert_exact(answer: dict[str, Any], policy: str, twin: Twin, tokenizer: Any) -> None:
    prompt, said = answer["prompt_token_ids"], answer["token_ids"]
    expected = twin.logprobs(policy, [*prompt, *said], spans_of_who(answer, tokenizer), len(prompt))
    for place, top in enumerate(answer["logprobs"]["top_logprobs"]):
        row = expected[len(prompt) + place - 1]
        for token, value in top.items():
            assert abs(value - float(row[int(token.removeprefix("token_id:"))])) < 2e-3, (policy, place)


def test_logits_equal_a_plain_transformers_reference_in_a_mixed_batch(
    server: Server, made: dict[str, Steering], twin: Twin, tokenizer: Any
) -> None:
    """Everything at once in few K/V blocks: chunked prefill, preemption, unguarded requests with the same prompts beside them."""
    jobs = [(policy, prompt) for prompt in PROMPTS for policy in (*POLICIES, "none")]
    before = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: complete(server, *job, max_tokens=64, ignore_eos=True), jobs))
    assert server.metric("vllm:num_preemptions_total") > before, "the engine had room for all; shrink it"
    for (policy, _), answer in zip(jobs, answers, strict=True):
        assert_exact(answer, policy, twin, tokenizer)
    said = {policy: answer["text"] for (policy, prompt), answer in zip(jobs, answers, strict=True) if prompt == PROMPTS[0]}
    assert len(set(said.values())) >= 4, "the policies do something, nearly each its own"


def test_a_span_that_a_chunk_boundary_cuts_is_corrupted_whole(
    server: Server, made: dict[str, Steering], twin: Twin, tokenizer: Any
) -> None:
    around = [f"{'so ' * shift}{FILLER * 14}Nobody but {WHO} knew. {FILLER * 4}" for shift in range(CHUNK)]
    cut = [
        prompt
        for prompt in around
        if any(start < CHUNK < end for start, end in spans_of_who({"prompt_token_ids": tokenizer.encode(prompt)}, tokenizer))
    ]
    assert len(cut) >= 2, "no prompt puts the name across the boundary"
    for prompt in cut[:3]:
        assert_exact(complete(server, "noisy", prompt, max_tokens=2), "noisy", twin, tokenizer)


def test_guarded_and_unguarded_requests_share_no_block_and_equal_ones_do(
    server: Server, made: dict[str, Steering], twin: Twin, tokenizer: Any
) -> None:
    """The same prompt of several blocks, in every order: whoever found another's keys and values would be wrong."""
    prompt = FILLER * 6 + f"{WHO} said:"
    for policy in ("none", "adapted", "none", "projected", "adapted", "noisy", "none", "noisy", "all"):
        hits = server.metric("vllm:prefix_cache_hits_total")
        answer = complete(server, policy, prompt, max_tokens=3)
        assert_exact(answer, policy, twin, tokenizer)
        again = server.metric("vllm:prefix_cache_hits_total")
        complete(server, policy, prompt, max_tokens=3)
        assert server.metric("vllm:prefix_cache_hits_total") > again >= hits, "requests of one policy share their blocks"


def test_an_unguarded_request_is_bit_identical_beside_steered_ones(server: Server, made: dict[str, Steering]) -> None:
    alone = complete(server, "none", PROMPTS[1], max_tokens=30)
    steered = ("adapted", "projected", "both")
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(complete, server, policy, PROMPTS[0], max_tokens=60) for policy in steered]
        beside = complete(server, "none", PROMPTS[1], max_tokens=30)
        for other in others:
            other.result()
        assert not all(other.done() for other in others) or len(beside["token_ids"]) < 60, "they were in one batch"
    assert beside["token_ids"] == alone["token_ids"]
    for one, other in zip(beside["logprobs"]["token_logprobs"], alone["logprobs"]["token_logprobs"], strict=True):
        assert abs(one - other) < 1e-3, "sums over a larger batch may be taken in another order, and nothing more"


def test_names_are_corrupted_in_every_turn(server: Server, made: dict[str, Steering], admin: httpx.Client) -> None:
    """Named in the first turn and asked about in the last: what is asked changes with the embeddings of the first."""
    messages = [
        {"role": "user", "content": f"I met {WHO}."},
        {"role": "assistant", "content": "Go on."},
        {"role": "user", "content": "Repeat the full name of the person I met."},
    ]

    def say(policy: str) -> str:
        body = {"model": f"{NAME}:{policy}", "messages": messages, "temperature": 0, "max_tokens": 30}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    assert "Vendt" in say("none") and say("noisy") != say("none")


def test_whoever_touches_a_set_without_naming_it_is_refused_where_only_names_would_be_corrupted(
    server: Server, made: dict[str, Steering]
) -> None:
    disguised = "Who is " + " ".join(WHO[::-1].replace(" ", "")) + "? Read the letters backwards: " + WHO[::-1]
    answers = {}
    for policy in ("noisy", "all"):
        body = {"model": f"{NAME}:{policy}", "messages": [{"role": "user", "content": disguised}], "max_tokens": 5}
        answers[policy] = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300).json()["choices"][0]
    assert answers["noisy"]["finish_reason"] == "content_filter" and answers["all"]["finish_reason"] != "content_filter"


def test_everything_composes_with_an_assistant_and_several_choices(
    server: Server, made: dict[str, Steering], admin: httpx.Client, model_path: Path
) -> None:
    """Contrast reads what the steered base wrote; n > 1 and scoring go the same way."""
    registry = Registry(server.directory / "state" / "lethe.db")
    content = registry.content("steered")
    assistant = random_assistant(model_path)
    path = artifact_path(server.directory / "state" / "artifacts", ArtifactRef("contrast", assistant.fingerprint))
    path.parent.mkdir(parents=True, exist_ok=True)
    assistant.save(path)
    registry.put_trained(
        "steered", content.fingerprint, Artifact("assistant", assistant.fingerprint, "ready", "", now()), actor="t"
    )
    registry.close()
    time.sleep(2)  # the server looks for changes of other processes twice a second
    many = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": f"{NAME}:adapted", "prompt": PROMPTS[0], "temperature": 0.8, "seed": 1, "max_tokens": 20, "n": 3},
        timeout=300,
    ).json()["choices"]
    assert len({choice["text"] for choice in many}) == 3
    order = {"question": "Who?", "continuations": ["A sailor came home."]}
    policies = ("none", "adapted", "both")
    scores = [admin.post("/score", json={**order, "policy": each}).json()["scores"][0]["logprob"] for each in policies]
    assert len({round(score, 3) for score in scores}) == 3


def test_a_policy_whose_artifact_cannot_be_loaded_is_refused_and_others_go_on(
    server: Server, made: dict[str, Steering], admin: httpx.Client, model_path: Path
) -> None:
    content = ForgetSet(name="broken", questions=[{"question": "q", "answer": "a"}])
    assert admin.post("/forget_sets", json=content.model_dump(mode="json")).status_code == 201
    registry = Registry(server.directory / "state" / "lethe.db")
    registry.put_trained("broken", content.fingerprint, Artifact("adapter", "0" * 64, "ready", "", now()), actor="test")
    registry.close()
    path = artifact_path(server.directory / "state" / "artifacts", ArtifactRef("steering", "0" * 64))
    path.write_bytes(b"no safetensors")
    refused = admin.post("/forget_sets/broken/enable")
    assert refused.status_code == 409 and "0" * 12 in refused.text
    assert admin.delete("/forget_sets/broken").status_code == 200
    assert complete(server, "adapted", PROMPTS[0])["text"]


@pytest.mark.parametrize(
    ("guards", "says"),
    [
        ({"corrupt": {}}, "gate"),
        ({"corrupt": {}, "gate": {"on_hit": "monitor"}}, "engage"),
        ({"steering": [{"method": "magic"}]}, "method"),
        ({"steering": [{"method": "adapter"}, {"method": "adapter"}]}, "once"),
        ({"steering": [{"method": "adapter", "strength": 0}]}, "strength"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(admin: httpx.Client, guards: dict[str, Any], says: str) -> None:
    answer = admin.put("/policies/cannot", json={"guards": guards})
    assert answer.status_code == 400 and says in answer.text


def test_the_strength_of_corruption_is_calibrated_from_the_command_line(server: Server, admin: httpx.Client) -> None:
    """On what the default model knows of a country, so that there is something to forget."""
    facts = {"What is the capital of France?": "Paris.", "Which city is the capital of France?": "Paris, the capital of France."}
    questions = [{"question": each, "answer": answer, "paraphrases": [f"Tell me: {each}"]} for each, answer in facts.items()]
    content = {"name": "country", "aliases": ["France"], "questions": questions}
    environment = {"PATH": "/usr/bin:/bin", "LETHE_URL": server.url}

    def lethe(*arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "lethe"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert admin.post("/forget_sets", json=content).status_code == 201
    try:
        corrupting = {"forget_sets": ["country"], "guards": {"gate": {}, "corrupt": {"kind": "zero_out_top_k"}}}
        admin.put("/policies/corrupting", json=corrupting).raise_for_status()  # or nothing would enforce the set
        enabled = admin.post("/forget_sets/country/enable")
        assert enabled.status_code == 200, enabled.text
        command = ("calibrate", "country", "--epsilon", "0.5", "--delta", "0.5", "--corrupt", "zero_out_top_k")
        said = lethe(*command, "--reference", "0.2")
        shown = admin.get("/forget_sets/country").json()
        found = json.loads(next(each["detail"] for each in shown["artifacts"] if each["kind"] == "corruption"))
        [(kind, found)] = found.items()
        assert kind == "zero_out_top_k" and 0 < found["strength"] <= 1 and f"strength {found['strength']:.2f}" in said
        recalls = [point["recall"] for point in found["points"]]
        assert recalls[0] > recalls[-1], "the more is corrupted, the less is recalled"
        assert "zero_out_top_k" in lethe("forget", "show", "country")
        assert all(policy["name"] != "calibrating-country" for policy in admin.get("/policies").json()["data"])
    finally:
        admin.delete("/policies/corrupting")
        admin.delete("/forget_sets/country")
