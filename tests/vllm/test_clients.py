"""The wire formats that clients rely on, with openai and httpx alone; ``python -m tests.clients`` has the other clients."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from serve.default_model import NAME
from tests.vllm.conftest import Server

QUESTION = "What is the capital of France?"
REFUSAL = "I cannot continue this answer."
MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT = {"model": NAME, "temperature": 0, "max_tokens": 24, "messages": MESSAGES}
RESPONSE = {"model": NAME, "temperature": 0, "max_output_tokens": 24, "input": QUESTION}
ONLY = {"type": "object", "properties": {"city": {"enum": ["Harry Potter"]}}, "required": ["city"], "additionalProperties": False}
ENDLESS = {"ignore_eos": True, "min_tokens": 400, "stream": True}


class Banned(BaseModel):
    city: Literal["Harry Potter"]


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(server: Server, path: str, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, as (event or "", data); the bytes must be server-sent events and nothing else."""
    found: list[tuple[str, dict[str, Any]]] = []
    with httpx.stream("POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=120) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for block in "".join(answer.iter_text()).strip().split("\n\n"):
            fields = [line.partition(": ")[::2] for line in block.split("\n") if not line.startswith(":")]
            assert {name for name, _ in fields} <= {"event", "data"}, block
            named = dict(fields)
            if named.get("data", "[DONE]") != "[DONE]":
                found.append((named.get("event", ""), json.loads(named["data"])))
    return found


def test_a_chat_s_stream_says_what_the_whole_answer_says(server: Server) -> None:
    whole = post(server, "/v1/chat/completions", CHAT)
    chunks = [data for _, data in events(server, "/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == whole["choices"][0]["message"]["content"]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_response_s_stream_says_what_the_whole_response_says(server: Server) -> None:
    whole = post(server, "/v1/responses", RESPONSE)
    found = events(server, "/v1/responses", RESPONSE)
    assert all(event == data["type"] for event, data in found)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    text = "".join(data["delta"] for event, data in found if event == "response.output_text.delta")
    assert text == whole["output"][-1]["content"][0]["text"]
    assert found[-1][0] == "response.completed"
    assert found[-1][1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_message_s_stream_says_what_the_whole_message_says(server: Server) -> None:
    whole = post(server, "/v1/messages", CHAT)
    found = events(server, "/v1/messages", CHAT)
    assert all(event == data["type"] for event, data in found)
    assert (found[0][0], found[-1][0]) == ("message_start", "message_stop")
    text = "".join(data["delta"]["text"] for event, data in found if event == "content_block_delta")
    assert text == whole["content"][0]["text"]
    (last,) = [data for event, data in found if event == "message_delta"]
    assert last["delta"]["stop_reason"] == whole["stop_reason"] == "end_turn"
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_second_turn_takes_back_what_the_first_one_gave(client: openai.OpenAI, server: Server) -> None:
    follow = {"role": "user", "content": "And of Italy?"}
    first = client.chat.completions.create(**CHAT).choices[0].message
    again = client.chat.completions.create(**{**CHAT, "messages": [*MESSAGES, first, follow]}).choices[0].message.content
    assert "Rome" in again
    given = client.responses.create(**RESPONSE).output
    assert client.responses.create(**{**RESPONSE, "input": [*MESSAGES, *given, follow]}).output_text == again
    content = post(server, "/v1/messages", CHAT)["content"]
    turns = [*MESSAGES, {"role": "assistant", "content": content}, follow]
    assert post(server, "/v1/messages", {**CHAT, "messages": turns})["content"][0]["text"] == again


@pytest.mark.parametrize("extra", [{}, {"type": "message"}, {"type": "message", "id": "msg_1", "status": "completed"}])
def test_an_assistant_s_turn_without_an_id_is_taken(client: openai.OpenAI, extra: dict[str, str]) -> None:
    """As the AI SDK, among others, sends what was said before to /v1/responses."""
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "The capital of France is Paris."}], **extra}
    follow = {"role": "user", "content": [{"type": "input_text", "text": "And of Italy?"}]}
    turns = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}, said, follow]
    assert "Rome" in client.responses.create(**{**RESPONSE, "input": turns}).output_text


@pytest.mark.parametrize("strict", [{}, {"strict": True}, {"strict": False}, {"strict": None}], ids=str)
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_arguments_of_a_forced_tool_are_an_object(client: openai.OpenAI, strict: dict[str, bool | None], choice: str) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {**parameters, "additionalProperties": False}, **strict},
    }
    forced = {"type": "function", "function": {"name": "weather"}} if choice == "named" else choice
    message = client.chat.completions.create(**{**CHAT, "max_tokens": 64}, tools=[tool], tool_choice=forced).choices[0].message
    if choice == "auto":
        assert message.content or message.tool_calls
    else:
        assert isinstance(json.loads(message.tool_calls[0].function.arguments), dict)


def test_openai_s_helpers_show_a_refused_answer_as_one(server: Server, forget: Any) -> None:
    forget("Harry Potter")
    sent: list[httpx.Request] = []
    hooks = {"request": [sent.append]}
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="-", http_client=openai.DefaultHttpxClient(event_hooks=hooks)
    ) as client:
        chat = {**CHAT, "response_format": Banned}
        with pytest.raises(openai.ContentFilterFinishReasonError):
            client.chat.completions.parse(**chat)
        with pytest.raises(openai.ContentFilterFinishReasonError), client.chat.completions.stream(**chat) as stream:
            stream.until_done()
        response = client.responses.parse(**RESPONSE, text_format=Banned)
        assert (response.output_parsed, response.incomplete_details.reason) == (None, "content_filter")
        with client.responses.stream(**RESPONSE, text_format=Banned) as stream:
            assert list(stream)[-1].type == "response.incomplete"
    assert len(sent) == 4, "the library asked again"


def test_a_refused_message_says_so_streamed_or_not(server: Server, forget: Any) -> None:
    forget("Harry Potter")
    body = {**CHAT, "output_config": {"format": {"type": "json_schema", "schema": ONLY}}}
    assert post(server, "/v1/messages", body)["stop_reason"] == "refusal"
    deltas = [data for event, data in events(server, "/v1/messages", body) if event == "message_delta"]
    assert [data["delta"]["stop_reason"] for data in deltas] == ["refusal"]


def assert_idle(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "max_tokens": 400}),
        ("/v1/responses", {**RESPONSE, "max_output_tokens": 400}),
        ("/v1/messages", {**CHAT, "max_tokens": 400}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stream_that_its_client_closes_ends_in_the_engine(server: Server, path: str, body: dict[str, Any]) -> None:
    with httpx.stream("POST", f"{server.url}{path}", json={**body, **ENDLESS}, timeout=120) as answer:
        lines: Iterator[str] = (line for line in answer.iter_lines() if "delta" in line)
        next(lines)
    assert_idle(server)


def test_a_model_is_found_by_its_name(client: openai.OpenAI) -> None:
    assert NAME in [model.id for model in client.models.list()]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"model": "no-such-model"}, 404, "not_found_error"),
        ({"model": f"{NAME}:no-such-policy"}, 404, "not_found_error"),
        ({"cache_salt": "a"}, 400, "invalid_request_error"),
        ({"messages": "none"}, 400, "invalid_request_error"),
    ],
)
def test_errors_of_messages_are_in_anthropic_s_envelope(server: Server, changes: dict[str, Any], status: int, kind: str) -> None:
    answer = httpx.post(f"{server.url}/v1/messages", json={**CHAT, **changes}, timeout=60)
    assert answer.status_code == status
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)
