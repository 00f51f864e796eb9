"""openai for Python: chat completions."""

from __future__ import annotations

import json
from typing import Literal

import openai
from pydantic import BaseModel
from report import (
    BANNED,
    BANNED_SCHEMA,
    CITY_SCHEMA,
    KEY,
    MODEL,
    QUESTION,
    REFUSAL,
    TURNS,
    URL,
    answered,
    check,
    equal,
    wait_until_idle,
)

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, timeout=120)  # with the library's own retries
messages = [{"role": "user", "content": QUESTION}]
short = {"model": MODEL, "temperature": 0, "max_tokens": 24}
longer = {**short, "max_tokens": 64}  # the small model likes white space in its JSON
long_stream = {"ignore_eos": True, "min_tokens": 400}


class City(BaseModel):
    city: Literal["Paris", "Rome"]


class Banned(BaseModel):
    city: Literal["Harry Potter"]


def tool(**strict: bool) -> dict:
    return {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": CITY_SCHEMA, **strict}}


def assert_called(call, strict: bool) -> None:
    equal((call.type, call.function.name), ("function", "weather"))
    assert call.id
    arguments = json.loads(call.function.arguments)
    assert not strict or City(**arguments)


@check("chat")
def chat() -> str:
    answer = client.chat.completions.create(messages=messages, **short)
    assert "Paris" in answer.choices[0].message.content
    equal((answer.choices[0].finish_reason, answer.choices[0].message.refusal), ("stop", None))
    return answer.choices[0].message.content


@check("chat")
def stream() -> None:
    whole = client.chat.completions.create(messages=messages, **short).choices[0]
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **short))
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), whole.message.content)
    equal([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason], [whole.finish_reason])
    with client.chat.completions.stream(messages=messages, **longer) as helper:
        equal(helper.get_final_completion().choices[0].message.content, whole.message.content)


@check("chat")
def usage() -> None:
    whole = client.chat.completions.create(messages=messages, **short).usage
    chunks = list(client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **short))
    streamed = chunks[-1].usage
    assert whole.completion_tokens > 0
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        equal(getattr(streamed, name), getattr(whole, name))


@check("chat")
def turns() -> str:
    first = client.chat.completions.create(messages=messages, **short).choices[0].message
    again = client.chat.completions.create(messages=[*messages, first, {"role": "user", "content": TURNS[2]}], **short)
    assert "Rome" in again.choices[0].message.content, again.choices[0].message.content
    called = client.chat.completions.create(messages=messages, tools=[tool()], tool_choice="required", **longer).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
    assert client.chat.completions.create(messages=[*messages, called, result], tools=[tool()], **longer).choices[0].message.content
    return again.choices[0].message.content


@check("chat")
def tools_auto() -> None:
    for strict in ({}, {"strict": True}, {"strict": False}):
        answer = client.chat.completions.create(messages=messages, tools=[tool(**strict)], tool_choice="auto", **longer).choices[0]
        assert answer.message.content or answer.message.tool_calls


@check("chat")
def tools_required() -> None:
    for strict in ({}, {"strict": True}):
        answer = client.chat.completions.create(
            messages=messages, tools=[tool(**strict)], tool_choice="required", **longer
        ).choices[0]
        assert_called(answer.message.tool_calls[0], bool(strict))
        equal(answer.finish_reason, "tool_calls")


@check("chat")
def tools_named() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for strict in ({}, {"strict": True}):
        answer = client.chat.completions.create(messages=messages, tools=[tool(**strict)], tool_choice=named, **longer).choices[0]
        assert_called(answer.message.tool_calls[0], bool(strict))


@check("chat")
def tools_streamed() -> None:
    with client.chat.completions.stream(messages=messages, tools=[tool(strict=True)], tool_choice="required", **longer) as helper:
        answer = helper.get_final_completion().choices[0]
    assert_called(answer.message.tool_calls[0], strict=True)
    equal(answer.finish_reason, "tool_calls")


@check("chat")
def structured() -> str:
    answer = client.chat.completions.parse(messages=messages, response_format=City, **longer).choices[0].message
    assert isinstance(answer.parsed, City)
    called = client.chat.completions.parse(
        messages=messages, tools=[openai.pydantic_function_tool(City)], tool_choice="required", **longer
    )
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, City)
    return answer.content


@check("chat")
def refusal() -> None:
    before = answered()
    only = {"type": "json_schema", "json_schema": {"name": "only", "schema": BANNED_SCHEMA}}
    choice = client.chat.completions.create(messages=messages, response_format=only, **longer).choices[0]
    equal((choice.finish_reason, choice.message.refusal), ("content_filter", REFUSAL))
    extra = {"structured_outputs": {"choice": [BANNED]}}
    choice = client.chat.completions.create(messages=messages, extra_body=extra, **short).choices[0]
    equal((choice.finish_reason, choice.message.refusal), ("content_filter", REFUSAL))
    try:
        client.chat.completions.parse(messages=messages, response_format=Banned, **longer)
        raise AssertionError("parse() took a refused answer for a whole one")
    except openai.ContentFilterFinishReasonError:
        pass
    equal(answered() - before, 3)


@check("chat")
def refusal_streamed() -> None:
    before = answered()
    extra = {"structured_outputs": {"choice": [BANNED]}}
    chunks = client.chat.completions.create(messages=messages, stream=True, extra_body=extra, **short)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    equal("".join(choice.delta.refusal or "" for choice in choices), REFUSAL)
    equal([choice.finish_reason for choice in choices if choice.finish_reason], ["content_filter"])
    try:
        with client.chat.completions.stream(messages=messages, response_format=Banned, **longer) as helper:
            helper.until_done()
        raise AssertionError("the helper took a refused answer for a whole one")
    except openai.ContentFilterFinishReasonError:
        pass
    equal(answered() - before, 2)


@check("chat")
def refusal_tool() -> None:
    """A call whose arguments a guard ended must not look like a whole one."""
    banned = {"type": "function", "function": {"name": "weather", "parameters": BANNED_SCHEMA, "strict": True}}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(messages=messages, tools=[banned], tool_choice=choice, **longer).choices[0]
        equal((answer.finish_reason, answer.message.refusal), ("content_filter", REFUSAL))
        assert not answer.message.tool_calls, f"half a call reached the client: {answer.message.tool_calls}"


@check("chat")
def cancel() -> None:
    opened = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=400, stream=True, extra_body=long_stream)
    next(iter(opened))
    opened.close()
    wait_until_idle()


@check("chat")
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    equal(client.models.retrieve(MODEL).id, MODEL)


@check("chat")
def errors() -> None:
    try:
        client.models.retrieve("no-such-model")
        raise AssertionError("a model that does not exist was found")
    except openai.NotFoundError:
        pass
    try:
        client.chat.completions.create(model="no-such-model", messages=messages)
        raise AssertionError("a model that does not exist answered")
    except openai.NotFoundError:
        pass
