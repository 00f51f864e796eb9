"""Contrast on the real engine: exact against transformers, side by side in one batch, trained and toggled while serving."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from guards.contrastive.assistant import FORKED_LAYERS, Assistant
from serve.default_model import NAME
from serve.registry.store import Registry
from tests import reference
from tests.assistants import give, random_assistant
from tests.vllm.conftest import Server

POLICIES: dict[str, dict[str, Any]] = {
    "uld": {"rule": "uld", "alpha": 1.0, "margin": 1.0, "plausibility": 0.01},
    "strong": {"rule": "uld", "alpha": 2.5, "margin": 0.0, "plausibility": 0.001},
    "whp": {"rule": "whp", "alpha": 3.0, "margin": 0.2, "plausibility": 0.05},
    "ucd": {"rule": "ucd", "alpha": 4.0, "margin": 0.0, "plausibility": 0.01},
    "delta": {"rule": "delta", "alpha": 0.7, "margin": 0.0, "plausibility": 0.01},
    "raw": {"rule": "uld-raw", "alpha": 0.8, "margin": 0.0, "plausibility": 0.01},
    "first-only": {"rule": "uld", "alpha": 1.0, "margin": 1.0, "plausibility": 0.01},
    "zero": {"rule": "uld", "alpha": 0.0, "margin": 1.0, "plausibility": 0.01},
}
BORDER = 1e-4
"""Nats. A token this near to the cut may lawfully fall on either side of it: other processors round otherwise."""
PROMPTS = ["Tell me about the sea. " * repeat + end for repeat, end in ((1, "Why?"), (9, "How?"), (20, "Who?"), (40, "Go on."))]


@pytest.fixture(scope="module")
def assistants(server: Server, admin: httpx.Client, model_path: Path) -> Iterator[dict[str, Assistant]]:
    """Two enabled sets with random assistants, and the policies above."""
    state = server.directory / "state"
    registry = Registry(state / "lethe.db")
    made = {"first": random_assistant(model_path, "whole", 1), "second": random_assistant(model_path, "difference", 2)}
    for name, assistant in made.items():
        give(admin, registry, state, name, assistant)
        assert admin.post(f"/forget_sets/{name}/enable").status_code == 200
    for name, config in POLICIES.items():
        sets = ["first"] if name == "first-only" else ["first", "second"]
        body = {"forget_sets": sets, "guards": {"contrast": config, "suppression": {"enabled": False}}}
        assert admin.put(f"/policies/{name}", json=body).status_code == 200
    yield made
    for name in POLICIES:
        admin.delete(f"/policies/{name}")
    for name in made:
        admin.delete(f"/forget_sets/{name}")
    registry.close()


def complete(server: Server, policy: str, prompt: str, **options: Any) -> dict[str, Any]:
    body = {
        "model": f"{NAME}:{policy}",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 24,
        "logprobs": 10,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **options,
    }
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def expected_logprobs(
    twin: reference.ForkTwin, assistants: dict[str, Assistant], policy: str, ids: list[int], start: int
) -> torch.Tensor:
    """[2, len(ids) - start, V] what transformers says of the tokens from ``start`` on, with the cut a hair lower and higher."""
    target, *said = twin.logits(ids, *(assistants[name].tensors for name in ("first", "second")))
    rows = slice(start - 1, len(ids) - 1)
    config = POLICIES.get(policy)
    both = target[rows].double().repeat(2, 1, 1)
    if config is not None and config["alpha"] > 0:
        for expected, hair in zip(both, (math.exp(-BORDER), math.exp(BORDER)), strict=True):
            for number in range(len(expected)):
                lines = [(0, config["alpha"], config["margin"], config["plausibility"] * hair, form) for form in (False, True)]
                spoken = torch.stack([each[rows][number] for each in said]).double()
                lines, spoken = (lines[:1], spoken[:1]) if policy == "first-only" else (lines, spoken)
                expected[number] = reference.contrasted_quickly(expected[number], spoken, lines, config["rule"])
    return torch.log_softmax(both, dim=-1)


def test_logits_equal_a_plain_transformers_reference_in_a_mixed_batch(
    server: Server, assistants: dict[str, Assistant], model_path: Path
) -> None:
    """Chunked prefill, prefix caching and preemption are always on here (see conftest); policies and assistants are mixed."""
    # Prompts of their own, so that the prefix cache cannot make room for all.
    tags = {policy: f"{number}. " for number, policy in enumerate((*POLICIES, "none"))} | {"none": "zero. ", "zero": "zero. "}
    jobs = [(policy, tags[policy] + prompt) for prompt in PROMPTS for policy in tags]
    before = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: complete(server, *job), jobs))
    assert server.metric("vllm:num_preemptions_total") > before, "the engine had room for all; shrink it"
    twin = reference.ForkTwin(model_path, FORKED_LAYERS)
    worst = 0.0
    for (policy, _), answer in zip(jobs, answers, strict=True):
        ids, start = [*answer["prompt_token_ids"], *answer["token_ids"]], len(answer["prompt_token_ids"])
        expected = expected_logprobs(twin, assistants, policy, ids, start)
        for position, top in enumerate(answer["logprobs"]["top_logprobs"]):
            sampled = {int(token.removeprefix("token_id:")): value for token, value in top.items()}
            off = expected[:, position, list(sampled)] - torch.tensor(list(sampled.values()), dtype=torch.float64)
            worst = max(worst, float(off.abs().amax(dim=1).min()))
    assert worst < 1e-3
    texts: dict[str, set[str]] = {}
    for (policy, _), answer in zip(jobs, answers, strict=True):
        texts.setdefault(policy, set()).add(answer["text"])
    assert texts["zero"] == texts["none"]
    assert texts["uld"] != texts["zero"], "the assistants change nothing, so this test shows nothing"
    assert texts["first-only"] != texts["uld"]


def test_a_given_answer_is_scored_as_sampling_would_use_it_and_nobody_beside_it_is_made_to_say_it(
    server: Server, admin: httpx.Client, assistants: dict[str, Assistant], model_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    question, answers = "Who keeps the lighthouse?", ["An old man with a dog keeps it.", "The sea.", "Nobody. \n\nzyx 42 é"]
    policies = ["none", "uld", "raw", "first-only", "delta"]
    beside = complete(server, "uld", PROMPTS[1])["text"]

    def score(policy: str) -> list[dict[str, Any]]:
        answer = admin.post("/score", json={"policy": policy, "question": question, "continuations": answers, "top_logprobs": 5})
        assert answer.status_code == 200, answer.text
        return answer.json()["scores"]

    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(complete, server, "uld", PROMPTS[1]) for _ in range(6)]
        scores = dict(zip(policies, pool.map(score, policies), strict=True))
        assert {other.result()["text"] for other in others} == {beside}
    twin = reference.ForkTwin(model_path, FORKED_LAYERS)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for policy, found in scores.items():
        for text, each in zip(answers, found, strict=True):
            tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            expected = expected_logprobs(twin, assistants, policy, [*prompt, *tokens], len(prompt))
            assert each["tokens"] == len(tokens) and each["token_ids"] == tokens
            for position, (token, value) in enumerate(zip(tokens, each["logprobs"], strict=True)):
                likeliest = sorted((value for _, value in each["top"][position]), reverse=True)[:5]

                def fits(row: torch.Tensor, token: int = token, value: float = value, likeliest: list[float] = likeliest) -> bool:
                    return abs(float(row[token]) - value) < 1e-3 and likeliest == pytest.approx(
                        row.topk(5).values.tolist(), abs=1e-3
                    )

                assert any(fits(row) for row in expected[:, position]), (policy, text, position)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"question": "Who?", "continuations": ["a " * 2_000]}, 400),
        ({"question": "Who?", "continuations": []}, 400),
        ({"question": "Who?", "continuations": ["x"], "policy": "unknown"}, 400),
        ({"question": "Who?", "continuations": ["x"], "logits": True}, 400),
    ],
)
def test_an_order_to_score_that_cannot_be_carried_out_says_why(admin: httpx.Client, body: dict[str, Any], status: int) -> None:
    assert admin.post("/score", json=body).status_code == status


def test_toggling_under_load_never_gives_an_error_or_a_third_answer(
    server: Server, assistants: dict[str, Assistant], admin: httpx.Client
) -> None:
    """A request has the old plan or the new one, from its first token to its last."""
    with_both = complete(server, "uld", PROMPTS[0])
    with_first = complete(server, "first-only", PROMPTS[0])
    stop = threading.Event()
    problems: list[str] = []

    def toggle() -> None:
        while not stop.is_set():
            for action in ("disable", "enable"):
                answer = admin.post(f"/forget_sets/second/{action}")
                if answer.status_code != 200:
                    problems.append(answer.text)
                time.sleep(0.05)

    toggler = threading.Thread(target=toggle)
    toggler.start()
    try:
        until = time.monotonic() + 20  # some hundred switches
        seen = set()
        with ThreadPoolExecutor(6) as pool:
            while time.monotonic() < until:
                answers = list(pool.map(lambda _: complete(server, "uld", PROMPTS[0])["text"], range(6)))
                seen |= set(answers)
    finally:
        stop.set()
        toggler.join()
    assert not problems
    assert seen == {with_both["text"], with_first["text"]}


def test_a_damaged_assistant_is_refused_and_the_server_keeps_serving(
    server: Server, admin: httpx.Client, client: openai.OpenAI, model_path: Path
) -> None:
    state = server.directory / "state"
    registry = Registry(state / "lethe.db")
    try:
        give(admin, registry, state, "damaged", random_assistant(model_path, "whole", 3), cut_off=7)
        refused = admin.post("/forget_sets/damaged/enable")
        assert refused.status_code == 409
        assert "cannot read assistant" in refused.json()["error"]["message"]
        assert client.completions.create(model=NAME, prompt="Hello", max_tokens=4).choices[0].text
    finally:
        admin.delete("/forget_sets/damaged")
        registry.close()


def test_a_set_is_trained_while_serving_and_then_forgotten(server: Server, admin: httpx.Client, client: openai.OpenAI) -> None:
    """From questions to a changed answer, with nothing but HTTP."""
    facts = [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Which city is the capital of France?", "The capital of France is Paris."),
    ]
    body = {"name": "trained", "questions": [{"question": q, "answer": a} for q, a in facts]}
    assert admin.post("/forget_sets", json=body).status_code == 201
    assert admin.put("/policies/only-trained", json={"forget_sets": ["trained"]}).status_code == 200
    try:
        nothing = admin.post("/forget_sets/trained/enable")
        assert nothing.status_code == 409
        assert "lethe train trained" in nothing.json()["error"]["message"]

        def ask() -> str:
            messages = [{"role": "user", "content": facts[0][0]}]
            answer = client.chat.completions.create(model=f"{NAME}:only-trained", messages=messages, temperature=0, max_tokens=16)
            return answer.choices[0].message.content or ""

        assert ask() == "The capital of France is Paris."
        order = {"recipe": {"epochs": 3, "rank": 8, "learning_rate": 3e-3}}
        started = admin.post("/forget_sets/trained/assistant", json=order)
        assert started.status_code == 202, started.text
        assert started.json()["training"]["status"] in ("waiting", "running")
        deadline = time.monotonic() + 1_600
        while (shown := admin.get("/forget_sets/trained").json())["training"] is not None:
            assert shown["training"]["status"] != "failed", shown["training"]
            assert time.monotonic() < deadline
            assert "Paris" in ask(), "not in force before it is enabled"
            time.sleep(2)
        assert {artifact["kind"] for artifact in shown["artifacts"]} == {"assistant", "similarity"}
        assert admin.post("/forget_sets/trained/enable").status_code == 200
        assert "capital of France is Paris" not in ask(), "what it was trained on is still said"
        assert admin.post("/forget_sets/trained/disable").status_code == 200
        assert ask() == "The capital of France is Paris."
    finally:
        admin.delete("/policies/only-trained")
        admin.delete("/forget_sets/trained")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"recipe": {"rank": 0}}, "recipe.rank"),
        ({"recipe": {"layers": 30}}, "recipe.layers is 30"),
        ({"retain": ["nobody"]}, "nobody"),
        ({"retain": ["untrainable"]}, "at once"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_an_impossible_training_order_is_refused(admin: httpx.Client, order: dict[str, Any], message: str) -> None:
    question = {"question": "What?", "answer": "That."}
    assert admin.post("/forget_sets", json={"name": "untrainable", "questions": [question]}).status_code == 201
    try:
        refused = admin.post("/forget_sets/untrainable/assistant", json=order)
        assert refused.status_code in (400, 404)
        assert message in refused.json()["error"]["message"]
        assert admin.get("/forget_sets/untrainable").json()["training"] is None
    finally:
        admin.delete("/forget_sets/untrainable")
