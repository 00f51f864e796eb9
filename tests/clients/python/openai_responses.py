"""openai for Python: responses."""

from __future__ import annotations

import json
from typing import Literal

import openai
from pydantic import BaseModel
from report import (
    BANNED_SCHEMA,
    CITY_SCHEMA,
    KEY,
    MODEL,
    QUESTION,
    TURNS,
    URL,
    answered,
    check,
    equal,
    wait_until_idle,
)

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, timeout=120)  # with the library's own retries
long_stream = {"ignore_eos": True, "min_tokens": 400}


class City(BaseModel):
    city: Literal["Paris", "Rome"]


class Banned(BaseModel):
    city: Literal["Harry Potter"]


brief = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
less_brief = {**brief, "max_output_tokens": 64}  # the small model likes white space in its JSON


def response_tool(**strict) -> dict:
    return {"type": "function", "name": "weather", "description": "Weather", "parameters": CITY_SCHEMA, **strict}


def assert_response_called(response, strict: bool) -> None:
    (call,) = [item for item in response.output if item.type == "function_call"]
    equal(call.name, "weather")
    assert call.call_id
    arguments = json.loads(call.arguments)
    assert not strict or City(**arguments)


@check("responses")
def chat() -> str:
    response = client.responses.create(input=QUESTION, **brief)
    equal(response.status, "completed")
    assert "Paris" in response.output_text
    return response.output_text


@check("responses")
def stream() -> None:
    whole = client.responses.create(input=QUESTION, **brief)
    events = list(client.responses.create(input=QUESTION, stream=True, **brief))
    equal("".join(event.delta for event in events if event.type == "response.output_text.delta"), whole.output_text)
    equal((events[0].type, events[-1].type), ("response.created", "response.completed"))
    with client.responses.stream(input=QUESTION, **less_brief) as helper:
        equal(helper.get_final_response().output_text, whole.output_text)


@check("responses")
def usage() -> None:
    whole = client.responses.create(input=QUESTION, **brief).usage
    streamed = list(client.responses.create(input=QUESTION, stream=True, **brief))[-1].response.usage
    assert whole.output_tokens > 0
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        equal(getattr(streamed, name), getattr(whole, name))


@check("responses")
def turns() -> str:
    first = client.responses.create(input=QUESTION, **brief)
    follow = [{"role": "user", "content": TURNS[2]}]
    again = client.responses.create(input=[{"role": "user", "content": QUESTION}, *first.output, *follow], **brief)
    assert "Rome" in again.output_text, again.output_text
    bare = [{"role": "assistant", "content": [{"type": "output_text", "text": TURNS[1]}]}]  # as other clients send it
    equal(
        client.responses.create(input=[{"role": "user", "content": QUESTION}, *bare, *follow], **brief).output_text,
        again.output_text,
    )
    asked = [{"role": "user", "content": QUESTION}]
    called = client.responses.create(input=asked, tools=[response_tool()], tool_choice="required", **less_brief).output
    result = {"type": "function_call_output", "call_id": called[-1].call_id, "output": "sunny"}
    assert client.responses.create(input=[*asked, *called, result], tools=[response_tool()], **less_brief).output
    return again.output_text


@check("responses")
def tools_auto() -> None:
    for strict in ({}, {"strict": True}, {"strict": False}, {"strict": None}):
        assert client.responses.create(input=QUESTION, tools=[response_tool(**strict)], tool_choice="auto", **less_brief).output


@check("responses")
def tools_required() -> None:
    for strict in ({}, {"strict": True}):
        response = client.responses.create(input=QUESTION, tools=[response_tool(**strict)], tool_choice="required", **less_brief)
        assert_response_called(response, bool(strict))


@check("responses")
def tools_named() -> None:
    named = {"type": "function", "name": "weather"}
    for strict in ({}, {"strict": True}):
        response = client.responses.create(input=QUESTION, tools=[response_tool(**strict)], tool_choice=named, **less_brief)
        assert_response_called(response, bool(strict))


@check("responses")
def tools_streamed() -> None:
    with client.responses.stream(
        input=QUESTION, tools=[response_tool(strict=True)], tool_choice="required", **less_brief
    ) as helper:
        assert_response_called(helper.get_final_response(), strict=True)


@check("responses")
def structured() -> str:
    response = client.responses.parse(input=QUESTION, text_format=City, **less_brief)
    assert isinstance(response.output_parsed, City)
    return response.output_text


@check("responses")
def refusal() -> None:
    before = answered()
    only = {"format": {"type": "json_schema", "name": "only", "schema": BANNED_SCHEMA}}
    response = client.responses.create(input=QUESTION, text=only, **less_brief)
    equal((response.status, response.incomplete_details.reason), ("incomplete", "content_filter"))
    response = client.responses.parse(input=QUESTION, text_format=Banned, **less_brief)
    equal((response.output_parsed, response.status, response.incomplete_details.reason), (None, "incomplete", "content_filter"))
    equal(answered() - before, 2)


@check("responses")
def refusal_streamed() -> None:
    before = answered()
    with client.responses.stream(input=QUESTION, text_format=Banned, **less_brief) as helper:
        events = list(helper)
    equal(events[-1].type, "response.incomplete")
    equal(events[-1].response.incomplete_details.reason, "content_filter")
    equal(answered() - before, 1)


@check("responses")
def cancel() -> None:
    opened = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=400, stream=True, extra_body=long_stream)
    for _ in zip(range(6), opened, strict=False):
        pass
    opened.close()
    wait_until_idle()
