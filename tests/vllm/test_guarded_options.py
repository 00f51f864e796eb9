"""Options of a request: none of them brings a phrase back, and what reaches past a guard is refused."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from serve.default_model import NAME
from serve.http.rules import REFUSED_FIELDS
from tests.vllm.asking import FRANCE, POTTER, SCHOOL, ask, assert_free_of, streamed
from tests.vllm.conftest import Server


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {str(i): 100 for i in (15424, 22058, 39417)}},
        {"min_tokens": 40},
        {"ignore_eos": True},
        {"bad_words": [" the", "The"]},
        {"stop": ["zzz"], "include_stop_str_in_output": True},
        {"skip_special_tokens": False},
        {"repetition_penalty": 0.1},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "[A-Za-z ]{20,40}"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option_of_a_request_brings_a_phrase_back(client: openai.OpenAI, forget: Any, options: dict[str, Any]) -> None:
    forget(*POTTER)
    answer = ask(client, "Repeat after me: Harry Potter goes to Hogwarts, says Rowling.", extra_body=options)
    assert_free_of(answer.choices[0].message.content)
    assert_free_of(streamed(client, SCHOOL, extra_body=options))


@pytest.mark.parametrize("constraint", ["choice", "allowed_token_ids"])
def test_when_only_the_phrase_is_left_the_answer_is_refused(
    client: openai.OpenAI, forget: Any, model_path: Any, constraint: str
) -> None:
    from transformers import AutoTokenizer

    forget("Harry Potter")
    extra: dict[str, Any] = {"structured_outputs": {"choice": ["Harry Potter"]}}
    messages = [{"role": "user", "content": SCHOOL}]
    if constraint == "allowed_token_ids":
        messages.append({"role": "assistant", "content": "Harry"})
        (token_id,) = AutoTokenizer.from_pretrained(model_path).encode(" Potter")
        extra = {"allowed_token_ids": [token_id], "continue_final_message": True, "add_generation_prompt": False}

    def answer(**options: Any) -> Any:
        return client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, extra_body=extra, **options)

    for choice in answer(logprobs=True).choices + answer(n=3, temperature=1).choices:
        assert choice.finish_reason == "content_filter"
        assert choice.message.refusal == "I cannot continue this answer."
        assert_free_of("Harry" + choice.message.content, ("Harry Potter",))
    chunks = [chunk for chunk in answer(stream=True) if chunk.choices]
    assert_free_of("Harry" + "".join(chunk.choices[0].delta.content or "" for chunk in chunks), ("Harry Potter",))
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["content_filter"]
    assert chunks[-1].choices[0].delta.refusal == "I cannot continue this answer."


@pytest.mark.parametrize("beams", [True, "true", "false", "off", 0, "no"])
def test_no_word_about_beam_search_switches_a_guard_off(server: Server, forget: Any, beams: Any) -> None:
    """vLLM reads "false" as False, and some routes ignore the field: what a client says must not decide what is watched."""
    forget("Harry Potter")
    only = {"use_beam_search": beams, "structured_outputs": {"choice": ["Harry Potter"]}, "max_tokens": 8, "temperature": 0.2}
    messages = [{"role": "user", "content": SCHOOL}]
    for path, body in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/completions", {"prompt": "Which school?"}),
        ("/v1/responses", {"input": "Which school?"}),
        ("/v1/messages", {"messages": messages}),
    ):
        answer = httpx.post(f"{server.url}{path}", json={"model": NAME, **only, **body}, timeout=120)
        assert answer.status_code < 500, f"{path}: {answer.text}"
        assert_free_of(answer.text, ("Harry Potter",))


def test_a_prompt_that_ends_in_half_a_character_is_refused(client: openai.OpenAI, forget: Any) -> None:
    """vLLM's detokenizer would repeat the whole prompt as output."""
    forget(*POTTER)
    for prompt in ("I like Harry Potter \ufffd", [57, 702, 15688, 8325, 676, 98, 225]):
        with pytest.raises(openai.BadRequestError, match="half a character"):
            client.completions.create(model=NAME, prompt=prompt, max_tokens=4, temperature=0)


def test_neither_stop_strings_nor_escapes_let_a_phrase_out(client: openai.OpenAI, server: Server, forget: Any) -> None:
    forget("Harry Potter")
    held = {"structured_outputs": {"regex": "Harry Potter"}, "return_token_ids": True}
    chunks = [c for c in ask(client, SCHOOL, stream=True, stop=["x" * 24], logprobs=True, extra_body=held) if c.choices]
    shown = "".join(entry.token for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content)
    assert_free_of(shown, ("Harry Potter",))
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": SCHOOL}],
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "none",
        "structured_outputs": {"regex": r'\{"q": "Harry \\u0050otter"\}'},
        "max_tokens": 24,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"


def test_a_refused_response_says_so_in_its_own_terms(client: openai.OpenAI, forget: Any) -> None:
    forget("Harry Potter")
    only_choice = {"structured_outputs": {"choice": ["Harry Potter"]}}
    response = client.responses.create(model=NAME, input=SCHOOL, max_output_tokens=8, extra_body=only_choice)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
    assert_free_of(response.output_text, ("Harry Potter",))
    events = list(client.responses.create(model=NAME, input=SCHOOL, max_output_tokens=8, extra_body=only_choice, stream=True))
    assert events[-1].type == "response.incomplete"
    assert_free_of("".join(event.delta for event in events if event.type == "response.output_text.delta"), ("Harry Potter",))


@pytest.mark.parametrize("field", [*REFUSED_FIELDS, "prompt_logprobs", "echo"])
def test_fields_that_reach_past_a_guard_are_refused_by_name(client: openai.OpenAI, forget: Any, field: str) -> None:
    forget(*POTTER)
    value: Any = {"lethe": {}} if field.endswith(("args", "kwargs", "params", "request")) else 1
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, SCHOOL, extra_body={field: value})
    assert refused.value.body["param"] == field
    assert field in refused.value.body["message"]


@pytest.mark.parametrize(("field", "value"), [("temperature", 1e30), ("repetition_penalty", 1e-30), ("repetition_penalty", 1e30)])
def test_values_that_would_lift_the_floor_are_refused(client: openai.OpenAI, forget: Any, field: str, value: float) -> None:
    forget(*POTTER)
    with pytest.raises(openai.BadRequestError, match=field):
        ask(client, SCHOOL, extra_body={field: value})


def test_echo_and_prompt_log_probabilities_work_where_nothing_is_forgotten(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="The capital of France is", max_tokens=1, echo=True, logprobs=1)
    assert answer.choices[0].text.startswith("The capital of France is")


def test_a_client_s_request_id_is_not_an_internal_one(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": FRANCE}], "max_tokens": 1}
    answers = [
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-request-id": "mine"}, timeout=60) for _ in range(2)
    ]
    assert len({answer.headers["x-request-id"] for answer in answers} | {answer.json()["id"] for answer in answers}) == 4
    assert not any("mine" in answer.text + answer.headers["x-request-id"] for answer in answers)
