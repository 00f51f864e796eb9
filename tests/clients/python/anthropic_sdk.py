"""anthropic for Python: messages."""

from __future__ import annotations

from typing import Literal

import anthropic
from pydantic import BaseModel
from report import BANNED_SCHEMA, CITY_SCHEMA, KEY, MODEL, QUESTION, TURNS, URL, answered, check, equal, wait_until_idle

client = anthropic.Anthropic(base_url=URL, api_key=KEY, timeout=120)  # with the library's own retries
messages = [{"role": "user", "content": QUESTION}]
short = {"model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0}}
longer = {**short, "max_tokens": 64}


class City(BaseModel):
    city: Literal["Paris", "Rome"]


class Banned(BaseModel):
    city: Literal["Harry Potter"]


def tool(**strict: bool) -> dict:
    return {"name": "weather", "description": "Weather", "input_schema": CITY_SCHEMA, **strict}


def text(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def assert_called(message) -> None:
    (call,) = [block for block in message.content if block.type == "tool_use"]
    equal((call.name, message.stop_reason), ("weather", "tool_use"))
    assert City(**call.input)


@check("messages")
def chat() -> str:
    message = client.messages.create(messages=messages, **short)
    equal((message.type, message.role, message.stop_reason), ("message", "assistant", "end_turn"))
    assert "Paris" in text(message)
    return text(message)


@check("messages")
def stream() -> None:
    whole = client.messages.create(messages=messages, **short)
    with client.messages.stream(messages=messages, **short) as helper:
        equal("".join(helper.text_stream), text(whole))
        equal(helper.get_final_message().stop_reason, whole.stop_reason)


@check("messages")
def usage() -> None:
    whole = client.messages.create(messages=messages, **short).usage
    with client.messages.stream(messages=messages, **short) as helper:
        streamed = helper.get_final_message().usage
    assert whole.output_tokens > 0
    equal((streamed.input_tokens, streamed.output_tokens), (whole.input_tokens, whole.output_tokens))
    counted = client.messages.count_tokens(model=MODEL, messages=messages)
    equal(counted.input_tokens, whole.input_tokens)


@check("messages")
def turns() -> str:
    first = client.messages.create(messages=messages, **short)
    answer = {"role": "assistant", "content": first.content}
    again = client.messages.create(messages=[*messages, answer, {"role": "user", "content": TURNS[2]}], **short)
    assert "Rome" in text(again), text(again)
    called = client.messages.create(messages=messages, tools=[tool(strict=True)], tool_choice={"type": "any"}, **longer)
    (use,) = [block for block in called.content if block.type == "tool_use"]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]}
    follow = [*messages, {"role": "assistant", "content": called.content}, result]
    assert client.messages.create(messages=follow, tools=[tool()], **short).content
    return text(again)


@check("messages")
def tools_auto() -> None:
    for strict in ({}, {"strict": True}):
        message = client.messages.create(messages=messages, tools=[tool(**strict)], tool_choice={"type": "auto"}, **short)
        assert message.content and message.stop_reason


@check("messages")
def tools_required() -> None:
    assert_called(client.messages.create(messages=messages, tools=[tool(strict=True)], tool_choice={"type": "any"}, **longer))


@check("messages")
def tools_required_without_strict() -> None:
    assert_called(client.messages.create(messages=messages, tools=[tool()], tool_choice={"type": "any"}, **longer))


@check("messages")
def tools_named() -> None:
    named = {"type": "tool", "name": "weather"}
    assert_called(client.messages.create(messages=messages, tools=[tool(strict=True)], tool_choice=named, **longer))


@check("messages")
def tools_streamed() -> None:
    with client.messages.stream(messages=messages, tools=[tool(strict=True)], tool_choice={"type": "any"}, **longer) as helper:
        assert_called(helper.get_final_message())


@check("messages")
def structured() -> str:
    message = client.messages.parse(messages=messages, output_format=City, **longer)
    assert isinstance(message.parsed_output, City)
    return text(message)


@check("messages")
def refusal() -> None:
    before = answered()
    only = {"format": {"type": "json_schema", "schema": BANNED_SCHEMA}}
    message = client.messages.create(messages=messages, output_config=only, **longer)
    equal(message.stop_reason, "refusal")
    equal(answered() - before, 1)


@check("messages")
def refusal_parsed() -> None:
    """Anthropic's own answer that is refused has no text that parse() would trip over."""
    message = client.messages.parse(messages=messages, output_format=Banned, **longer)
    equal((message.stop_reason, message.parsed_output), ("refusal", None))


@check("messages")
def refusal_streamed() -> None:
    before = answered()
    only = {"format": {"type": "json_schema", "schema": BANNED_SCHEMA}}
    with client.messages.stream(messages=messages, output_config=only, **longer) as helper:
        equal(helper.get_final_message().stop_reason, "refusal")
    equal(answered() - before, 1)


@check("messages")
def refusal_tool() -> None:
    banned = {"name": "weather", "input_schema": BANNED_SCHEMA, "strict": True}
    message = client.messages.create(messages=messages, tools=[banned], tool_choice={"type": "any"}, **longer)
    equal(message.stop_reason, "refusal")
    assert not [block for block in message.content if block.type == "tool_use"], "half a call reached the client"


@check("messages")
def cancel() -> None:
    extra = {"ignore_eos": True, "min_tokens": 400}
    with client.messages.stream(model=MODEL, messages=messages, max_tokens=400, extra_body=extra) as helper:
        next(helper.text_stream)
    wait_until_idle()


@check("messages")
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    equal(client.models.retrieve(MODEL).id, MODEL)


@check("messages")
def errors() -> None:
    for changes, kind, name in (
        ({"model": "no-such-model"}, anthropic.NotFoundError, "not_found_error"),
        ({"model": MODEL + ":no-such-policy"}, anthropic.NotFoundError, "not_found_error"),
        ({"extra_body": {"cache_salt": "a"}}, anthropic.BadRequestError, "invalid_request_error"),
    ):
        try:
            client.messages.create(messages=messages, **{**short, **changes})
            raise AssertionError("answered")
        except kind as error:
            equal((error.body["type"], error.body["error"]["type"]), ("error", name))
