"""langchain-openai's ChatOpenAI: chat completions, and responses with ``use_responses_api``."""

from __future__ import annotations

import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import OpenAIRefusalError
from pydantic import BaseModel
from report import BANNED, KEY, MODEL, QUESTION, REFUSAL, TURNS, URL, answered, check, equal, not_offered, wait_until_idle

options = {"base_url": f"{URL}/v1", "api_key": KEY, "model": MODEL, "temperature": 0, "timeout": 120}
CHOICE = {"extra_body": {"structured_outputs": {"choice": [BANNED]}}}


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]


class Banned(BaseModel):
    """A name."""

    city: Literal["Harry Potter"]


class weather(City):  # noqa: N801 (the tool's name)
    """Weather."""


def assert_called(message) -> None:
    (call,) = message.tool_calls
    equal(call["name"], "weather")
    assert City(**call["args"])
    assert call["id"]


api = sys.argv[1]
llm = ChatOpenAI(**options, max_tokens=24, use_responses_api=api == "responses")
longer = ChatOpenAI(**options, max_tokens=64, use_responses_api=api == "responses")


@check(api)
def chat() -> str:
    message = llm.invoke(QUESTION)
    assert "Paris" in message.text
    return message.text


@check(api)
def stream() -> None:
    equal("".join(chunk.text for chunk in llm.stream(QUESTION)), llm.invoke(QUESTION).text)


@check(api)
def usage() -> None:
    whole = llm.invoke(QUESTION).usage_metadata
    total = None
    for chunk in llm.stream(QUESTION, **({"stream_usage": True} if api == "chat" else {})):
        total = chunk if total is None else total + chunk
    streamed = total.usage_metadata
    assert whole["output_tokens"] > 0
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        equal(streamed[name], whole[name])


@check(api)
def turns() -> str:
    first = llm.invoke(QUESTION)
    again = llm.invoke([HumanMessage(QUESTION), first, HumanMessage(TURNS[2])])
    assert "Rome" in again.text, again.text
    return again.text


@check(api)
def turns_tool() -> None:
    called = longer.bind_tools([weather], tool_choice="required", strict=True).invoke(QUESTION)
    result = ToolMessage("sunny", tool_call_id=called.tool_calls[0]["id"])
    assert llm.bind_tools([weather]).invoke([HumanMessage(QUESTION), called, result]).text


@check(api)
def tools_auto() -> None:
    for strict in ({}, {"strict": True}, {"strict": False}):
        message = llm.bind_tools([weather], **strict).invoke(QUESTION)
        assert message.text or message.tool_calls


@check(api)
def tools_required() -> None:
    assert_called(longer.bind_tools([weather], tool_choice="required", strict=True).invoke(QUESTION))


@check(api)
def tools_required_without_strict() -> None:
    assert_called(longer.bind_tools([weather], tool_choice="required").invoke(QUESTION))


@check(api)
def tools_named() -> None:
    assert_called(longer.bind_tools([weather], tool_choice="weather", strict=True).invoke(QUESTION))


@check(api)
def tools_streamed() -> None:
    total = None
    for chunk in longer.bind_tools([weather], tool_choice="required", strict=True).stream(QUESTION):
        total = chunk if total is None else total + chunk
    assert_called(total)


@check(api)
def structured() -> None:
    assert isinstance(longer.with_structured_output(City).invoke(QUESTION), City)


@check(api)
def structured_by_tool() -> None:
    assert isinstance(longer.with_structured_output(City, method="function_calling", strict=True).invoke(QUESTION), City)


@check(api)
def refusal() -> None:
    before = answered()
    message = llm.invoke(QUESTION, **CHOICE)
    if api == "chat":
        equal(message.response_metadata["finish_reason"], "content_filter")
        equal(message.additional_kwargs["refusal"], REFUSAL)
    else:
        equal(message.response_metadata["incomplete_details"], {"reason": "content_filter"})
    equal(answered() - before, 1)


@check(api)
def refusal_structured() -> str:
    before = answered()
    try:
        found = longer.with_structured_output(Banned).invoke(QUESTION)
        raise AssertionError(f"a refused answer was taken for a whole one: {found!r}")
    except (openai.ContentFilterFinishReasonError, OpenAIRefusalError) as error:
        equal(answered() - before, 1)
        return type(error).__name__


@check(api)
def refusal_streamed() -> None:
    total = None
    for chunk in llm.stream(QUESTION, **CHOICE):
        total = chunk if total is None else total + chunk
    if api == "chat":
        equal(total.response_metadata["finish_reason"], "content_filter")  # it drops delta.refusal
    else:
        equal(total.response_metadata["incomplete_details"], {"reason": "content_filter"})


@check(api)
def cancel() -> None:
    extra = {"ignore_eos": True, "min_tokens": 400}
    opened = ChatOpenAI(**options, max_tokens=400, use_responses_api=api == "responses", extra_body=extra).stream(QUESTION)
    for _ in range(3):
        next(opened)
    opened.close()
    wait_until_idle()


not_offered(api, "models", "ChatOpenAI does not ask for the list of models")
