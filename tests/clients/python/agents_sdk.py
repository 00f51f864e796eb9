"""openai-agents: responses (its default) and chat completions."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.exceptions import ModelBehaviorError, ModelRefusalError
from openai import AsyncOpenAI
from pydantic import BaseModel
from report import BANNED, KEY, MODEL, QUESTION, TURNS, URL, answered, check, equal, not_offered, wait_until_idle

set_tracing_disabled(True)
REFUSALS = (ModelRefusalError, ModelBehaviorError)
Names = Literal["Paris", "Rome"]


class City(BaseModel):
    city: Names


class Banned(BaseModel):
    city: Literal["Harry Potter"]


@function_tool
def weather(city: Names) -> str:
    """Weather."""
    return "sunny"


def agent(kind, max_tokens: int = 24, extra_body: dict | None = None, tool_choice: str | None = None, **options) -> Agent:
    model = kind(model=MODEL, openai_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, timeout=120))
    settings = ModelSettings(
        temperature=0, max_tokens=max_tokens, extra_body=extra_body, tool_choice=tool_choice, include_usage=True
    )
    return Agent(name="a", model=model, model_settings=settings, **options)


def says_refused(error: Exception, before: int) -> str:
    assert isinstance(error, ModelRefusalError) or "content_filter" in str(error), error
    equal(answered() - before, 1)
    return str(error)


def called(result) -> list[str]:
    return [item.raw_item.name for item in result.new_items if item.type == "tool_call_item"]


api = sys.argv[1]
kind = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}[api]


@check(api)
async def chat() -> str:
    result = await Runner.run(agent(kind), QUESTION)
    assert "Paris" in result.final_output
    return result.final_output


@check(api)
async def stream() -> None:
    whole = await Runner.run(agent(kind), QUESTION)
    result = Runner.run_streamed(agent(kind), QUESTION)
    raw = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
    parts = [event.delta for event in raw if event.type == "response.output_text.delta"]
    equal(("".join(parts), result.final_output), (whole.final_output, whole.final_output))


@check(api)
async def usage() -> None:
    whole = (await Runner.run(agent(kind), QUESTION)).context_wrapper.usage
    result = Runner.run_streamed(agent(kind), QUESTION)
    async for _ in result.stream_events():
        pass
    streamed = result.context_wrapper.usage
    assert whole.output_tokens
    equal((streamed.input_tokens, streamed.output_tokens), (whole.input_tokens, whole.output_tokens))


@check(api)
async def turns() -> str:
    first = await Runner.run(agent(kind), QUESTION)
    again = await Runner.run(agent(kind), [*first.to_input_list(), {"role": "user", "content": TURNS[2]}])
    assert "Rome" in again.final_output, again.final_output
    return again.final_output


@check(api)
async def tools_auto() -> None:
    result = await Runner.run(agent(kind, tools=[weather]), QUESTION, max_turns=3)
    assert result.final_output is not None


@check(api)
async def tools_required() -> None:
    """A call, its result, and the answer that follows: the agent's whole loop."""
    result = await Runner.run(agent(kind, 64, tools=[weather], tool_choice="required"), QUESTION, max_turns=3)
    equal(called(result)[0], "weather")


@check(api)
async def tools_named() -> None:
    result = await Runner.run(agent(kind, 64, tools=[weather], tool_choice="weather"), QUESTION, max_turns=3)
    equal(called(result)[0], "weather")


@check(api)
async def structured() -> None:
    result = await Runner.run(agent(kind, 64, output_type=City), QUESTION)
    assert isinstance(result.final_output, City)


@check(api)
async def refusal() -> str:
    """With a type for the answer, any other error says that the model wrote bad JSON."""
    before = answered()
    try:
        result = await Runner.run(agent(kind, 64, output_type=Banned), QUESTION)
        raise AssertionError(f"a refused answer was taken for a whole one: {result.final_output!r}")
    except REFUSALS as error:
        return says_refused(error, before)


@check(api)
async def refusal_streamed() -> str:
    before = answered()
    result = Runner.run_streamed(agent(kind, extra_body={"structured_outputs": {"choice": [BANNED]}}), QUESTION)
    try:
        async for _ in result.stream_events():
            pass
        raise AssertionError(f"a refused answer was taken for a whole one: {result.final_output!r}")
    except REFUSALS as error:
        return says_refused(error, before)


@check(api)
async def cancel() -> None:
    extra = {"ignore_eos": True, "min_tokens": 400}
    result = Runner.run_streamed(agent(kind, 400, extra_body=extra), QUESTION)
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            result.cancel()
            break
    await asyncio.to_thread(wait_until_idle)  # the loop has to go on closing the connection


not_offered(api, "models", "an agent does not ask for the list of models")
