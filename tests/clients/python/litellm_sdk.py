"""litellm as a library: chat completions, through its providers for OpenAI and for vLLM. Argument: the provider."""

from __future__ import annotations

import json
import os
import sys
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched at import

import litellm
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
    not_offered,
    wait_until_idle,
)

messages = [{"role": "user", "content": QUESTION}]
server = {"api_base": f"{URL}/v1", "api_key": KEY, "timeout": 120}
CHOICE = {"extra_body": {"structured_outputs": {"choice": [BANNED]}}}


class City(BaseModel):
    city: Literal["Paris", "Rome"]


def tool(**strict: bool) -> dict:
    return {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": CITY_SCHEMA, **strict}}


def assert_called(message) -> None:
    (call,) = message.tool_calls
    equal(call.function.name, "weather")
    assert City(**json.loads(call.function.arguments))


provider = sys.argv[1]
short = {"model": f"{provider}/{MODEL}", "temperature": 0, "max_tokens": 24, **server}
longer = {**short, "max_tokens": 64}


@check(provider)
def chat() -> str:
    answer = litellm.completion(messages=messages, **short)
    assert "Paris" in answer.choices[0].message.content
    return answer.choices[0].message.content


@check(provider)
def stream() -> None:
    whole = litellm.completion(messages=messages, **short).choices[0]
    chunks = list(litellm.completion(messages=messages, stream=True, **short))
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks), whole.message.content)


@check(provider)
def usage() -> None:
    whole = litellm.completion(messages=messages, **short).usage
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = list(litellm.completion(messages=messages, **options, **short))[-1].usage
    equal((streamed.prompt_tokens, streamed.completion_tokens), (whole.prompt_tokens, whole.completion_tokens))


@check(provider)
def turns() -> str:
    first = litellm.completion(messages=messages, **short).choices[0].message
    follow = [*messages, first, {"role": "user", "content": TURNS[2]}]
    again = litellm.completion(messages=follow, **short).choices[0].message.content
    assert "Rome" in again, again
    return again


@check(provider)
def tools_auto() -> None:
    for strict in ({}, {"strict": True}):
        message = litellm.completion(messages=messages, tools=[tool(**strict)], tool_choice="auto", **short).choices[0].message
        assert message.content or message.tool_calls


@check(provider)
def tools_required() -> None:
    required = {"tools": [tool(strict=True)], "tool_choice": "required"}
    called = litellm.completion(messages=messages, **required, **longer).choices[0].message
    assert_called(called)
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
    assert litellm.completion(messages=[*messages, called, result], tools=[tool()], **short).choices[0].message.content


@check(provider)
def tools_named() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    answer = litellm.completion(messages=messages, tools=[tool(strict=True)], tool_choice=named, **longer)
    assert_called(answer.choices[0].message)


@check(provider)
def structured() -> str:
    answer = litellm.completion(messages=messages, response_format=City, **longer).choices[0].message.content
    assert City.model_validate_json(answer)
    return answer


@check(provider)
def refusal() -> None:
    before = answered()
    only = {"type": "json_schema", "json_schema": {"name": "only", "schema": BANNED_SCHEMA, "strict": True}}
    choice = litellm.completion(messages=messages, response_format=only, **longer).choices[0]
    equal(choice.finish_reason, "content_filter")
    fields = choice.message.provider_specific_fields or {}
    equal(getattr(choice.message, "refusal", None) or fields.get("refusal"), REFUSAL)
    equal(answered() - before, 1)


@check(provider)
def refusal_streamed() -> None:
    before = answered()
    chunks = list(litellm.completion(messages=messages, stream=True, **CHOICE, **short))
    equal([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason], ["content_filter"])
    equal(answered() - before, 1)


@check(provider)
def cancel() -> None:
    extra = {"extra_body": {"ignore_eos": True, "min_tokens": 400}}
    opened = litellm.completion(messages=messages, stream=True, **{**short, "max_tokens": 400}, **extra)
    next(iter(opened))
    opened.completion_stream.close()
    wait_until_idle()


not_offered(provider, "models", "litellm as a library has its own list")
