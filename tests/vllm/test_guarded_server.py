"""What a user of the server sees: knowledge that a switch takes away, through every door."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai

from serve.default_model import NAME
from tests.vllm.asking import FRANCE, POTTER, SCHOOL, ask, assert_free_of, assert_same_tokens, streamed, text
from tests.vllm.conftest import Server

AUTHOR = "Who wrote the Harry Potter books?"


def test_a_forget_set_is_a_switch(client: openai.OpenAI, admin: httpx.Client) -> None:
    before = text(client, SCHOOL)
    assert "Hogwarts" in before
    assert admin.post("/forget_sets", json={"name": "potter", "phrases": POTTER}).status_code == 201
    assert text(client, SCHOOL) == before, "a set that is not enabled changed an answer"
    revision = admin.get("/revision").json()["revision"]
    enabled = admin.post("/forget_sets/potter/enable").json()
    assert enabled["revision"] == revision + 1
    after = text(client, SCHOOL)
    assert_free_of(after)
    assert streamed(client, SCHOOL) == after
    assert text(client, FRANCE) == "The capital of France is Paris."
    assert admin.post("/forget_sets/potter/disable").json()["revision"] == revision + 2
    assert text(client, SCHOOL) == before
    assert admin.delete("/forget_sets/potter").json()["revision"] == revision + 3
    assert admin.get("/revision").json()["enabled"] == []


def test_no_phrase_in_many_hot_samples(client: openai.OpenAI, forget: Any) -> None:
    forget(*POTTER)
    answers = [
        choice.message.content
        for question in (SCHOOL, AUTHOR)
        for temperature in (0.7, 2.0)
        for choice in ask(client, question, n=8, temperature=temperature, max_tokens=64, seed=7).choices
    ]
    assert len(answers) == 32
    for answer in answers:
        assert_free_of(answer)


def test_every_endpoint_that_generates_is_guarded(client: openai.OpenAI, server: Server, forget: Any) -> None:
    forget(*POTTER)
    completion = client.completions.create(
        model=NAME, prompt="The school of Harry Potter is called Hog", max_tokens=40, temperature=0
    )
    assert not completion.choices[0].text.startswith("warts")
    assert_free_of(completion.choices[0].text)
    assert_free_of(client.responses.create(model=NAME, input=SCHOOL, temperature=0, max_output_tokens=48).output_text)
    message = {"model": NAME, "max_tokens": 48, "temperature": 0, "messages": [{"role": "user", "content": SCHOOL}]}
    anthropic = httpx.post(f"{server.url}/v1/messages", json=message, timeout=120)
    assert anthropic.status_code == 200
    assert_free_of(anthropic.json()["content"][0]["text"])
    batch = {"model": NAME, "temperature": 0, "max_tokens": 48, "messages": [[m] for m in message["messages"] * 2]}
    batched = httpx.post(f"{server.url}/v1/chat/completions/batch", json=batch, timeout=120)
    assert batched.status_code == 200
    assert_free_of(batched.text)


def test_beam_search_and_its_log_probabilities_are_guarded(client: openai.OpenAI, forget: Any) -> None:
    forget(*POTTER)
    answer = ask(client, SCHOOL, n=4, extra_body={"use_beam_search": True}, max_tokens=32)
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert_free_of(choice.message.content)


def test_returned_token_ids_spell_what_the_text_says(server: Server, forget: Any, model_path: Any) -> None:
    from transformers import AutoTokenizer

    forget(*POTTER)
    body = {"messages": [{"role": "user", "content": SCHOOL}], "temperature": 0, "max_tokens": 48, "return_token_ids": True}
    choice = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]
    spelled = AutoTokenizer.from_pretrained(model_path).decode(choice["token_ids"], skip_special_tokens=True)
    assert spelled == choice["message"]["content"]
    assert_free_of(spelled)


def test_log_probabilities_never_show_what_is_banned(client: openai.OpenAI, forget: Any) -> None:
    # "Paris" is what the model wants to say; with it forgotten, no number may tell so.
    best = ask(client, FRANCE, logprobs=True, top_logprobs=20).choices[0].logprobs.content
    assert any("Paris" in entry.token for entry in best)
    forget("Paris")
    answer = ask(client, FRANCE, logprobs=True, top_logprobs=20)
    assert_free_of(answer.choices[0].message.content, ("Paris",))
    for position in answer.choices[0].logprobs.content:
        for entry in position.top_logprobs:
            assert "paris" not in entry.token.casefold() or entry.logprob <= -9000


def test_what_the_prompt_leaves_half_said_is_not_completed(client: openai.OpenAI, forget: Any) -> None:
    forget("Harry Potter")
    messages = [{"role": "user", "content": SCHOOL}, {"role": "assistant", "content": "It is about Harry Pot"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=8, extra_body=options)
    assert not answer.choices[0].message.content.startswith("ter")


def test_phrases_with_accents_and_in_other_scripts_are_kept_out(client: openai.OpenAI, forget: Any) -> None:
    forget("\u00c9cole", "\u041c\u043e\u0441\u043a\u0432\u0430")
    for question in (
        "Repeat ten times: \u00e9cole \u00c9COLE",
        "Repeat: \u041c\u041e\u0421\u041a\u0412\u0410 \u043c\u043e\u0441\u043a\u0432\u0430",
    ):
        answer = text(client, question, temperature=1, seed=1, logprobs=True)
        assert_free_of(answer, ("\u00e9cole", "\u043c\u043e\u0441\u043a\u0432\u0430"))


def test_options_of_a_set_are_honoured(client: openai.OpenAI, forget: Any) -> None:
    answer = text(client, FRANCE)
    forget("PARIS", case_sensitive=True)
    assert text(client, FRANCE) == answer
    forget("ris", word_boundary=True)
    assert text(client, FRANCE) == answer
    forget("ris")
    assert_free_of(text(client, FRANCE), ("ris",))


def test_mixed_batches_equal_each_request_alone(client: openai.OpenAI, server: Server, forget: Any) -> None:
    """Guarded and unguarded rows side by side, with chunked prefill, prefix caching and forced preemption."""
    forget(*POTTER)
    long = "Tell me a long story about a school for young wizards. " * 8
    questions = [SCHOOL, AUTHOR, FRANCE, long, "Name three colours.", long + "Begin.", "Who is Rowling?", "Count to twenty."]
    pairs = [(question, policy) for question in questions for policy in ("", ":none")]
    # Long prompts that share nothing fill the cache, so that answers need one another's place: long answers would take longer.
    jobs = [(f"{number}. {'Take your time. ' * 20}{question}", policy) for number, (question, policy) in enumerate(pairs)]
    options = {"max_tokens": 40, "logprobs": True, "top_logprobs": 2}
    alone = [ask(client, question, policy, **options) for question, policy in jobs]
    preemptions = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: ask(client, *job, **options), jobs))
    assert server.metric("vllm:num_preemptions_total") > preemptions, "nothing was preempted: the test lost its point"
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    for one, other, (_, policy) in zip(alone, together, jobs, strict=True):
        assert_same_tokens(one, other)
        if not policy:
            assert_free_of(other.choices[0].message.content)


def test_a_request_in_flight_keeps_the_snapshot_it_started_with(client: openai.OpenAI, admin: httpx.Client, forget: Any) -> None:
    name = forget(*POTTER)
    question = "Tell me all about Harry Potter and Hogwarts."
    guarded = text(client, question, max_tokens=40)
    assert admin.post(f"/forget_sets/{name}/disable").status_code == 200
    unguarded = text(client, question, max_tokens=40)
    assert guarded != unguarded
    for expected, action in ((unguarded, "enable"), (guarded, "disable")):
        stream = iter(ask(client, question, max_tokens=40, stream=True))
        first = [next(stream), next(stream)]
        assert admin.post(f"/forget_sets/{name}/{action}").status_code == 200
        chunks = [*first, *stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected


def test_toggling_under_load_neither_fails_nor_leaks(client: openai.OpenAI, admin: httpx.Client, forget: Any) -> None:
    name = forget(*POTTER)
    stop = threading.Event()
    failures: list[str] = []
    answered: list[str] = []

    def load() -> None:
        while not stop.is_set():
            try:
                answered.append(streamed(client, SCHOOL, max_tokens=24))
            except Exception as error:  # noqa: BLE001 (whatever it is, the test must show it)
                failures.append(repr(error))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    revisions = []
    for _ in range(8):
        revisions.append(admin.post(f"/forget_sets/{name}/disable").json()["revision"])
        assert "Hogwarts" in text(client, SCHOOL, max_tokens=24)
        revisions.append(admin.post(f"/forget_sets/{name}/enable").json()["revision"])
        assert_free_of(text(client, SCHOOL, max_tokens=24))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(answered) > 8
    assert revisions == sorted(set(revisions))


def test_tools_and_usage_arrive_in_openai_s_shape(client: openai.OpenAI, forget: Any) -> None:
    forget(*POTTER)
    chunks = list(ask(client, SCHOOL, stream=True, stream_options={"include_usage": True}, max_tokens=8))
    assert chunks[-1].usage.completion_tokens == 8
    tool = {
        "type": "function",
        "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"q": {"type": "string", "maxLength": 12}}}},
    }
    forced = ask(client, SCHOOL, tools=[tool], tool_choice={"type": "function", "function": {"name": "look_up"}}, max_tokens=64)
    arguments = forced.choices[0].message.tool_calls[0].function.arguments
    assert_free_of(arguments)
    assert isinstance(json.loads(arguments), dict), "also where the tool does not say strict"


def test_ten_thousand_phrases_are_in_force_within_a_second(client: openai.OpenAI, admin: httpx.Client) -> None:
    phrases = [f"phrase number {i} of many" for i in range(10_000)] + ["Paris"]
    assert admin.post("/forget_sets", json={"name": "many", "phrases": phrases}).status_code == 201
    while admin.get("/forget_sets/many").json()["artifacts"][0]["status"] != "ready":
        time.sleep(0.1)
    assert admin.post("/forget_sets/many/enable").status_code == 200
    assert_free_of(text(client, FRANCE), ("Paris",))
    assert admin.delete("/forget_sets/many").status_code == 200
    assert "Paris" in text(client, FRANCE)


def test_disconnected_clients_leave_nothing_running(client: openai.OpenAI, server: Server, forget: Any) -> None:
    forget(*POTTER)
    streams = [
        ask(client, SCHOOL, stream=True, max_tokens=400, extra_body={"ignore_eos": True, "min_tokens": 400}) for _ in range(4)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0


def test_a_seeded_request_with_a_prompt_of_several_chunks_neither_stops_the_engine_nor_loses_its_seed(
    client: openai.OpenAI, server: Server
) -> None:
    """vLLM 0.32 on CPUs dies of it: see serve/engine/seeds.py."""
    prompt = "Once upon a time there was a very small village by the sea. " * 40

    def answer(start: str, seed: int) -> str:
        completion = client.completions.create(model=NAME, prompt=start + prompt, max_tokens=12, temperature=1.0, seed=seed)
        return completion.choices[0].text

    chunked = answer("A. ", 7)
    assert answer("A. ", 7) == chunked  # the second time most of it comes from the prefix cache, in one chunk
    assert answer("A. ", 8) != chunked
    assert httpx.get(f"{server.url}/health").status_code == 200
