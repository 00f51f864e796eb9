"""llama-index-llms-openai-like's OpenAILike: chat completions."""

import gc
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from report import BANNED, KEY, MODEL, QUESTION, REFUSAL, TURNS, URL, answered, check, equal, not_offered, wait_until_idle


class City(BaseModel):
    city: Literal["Paris", "Rome"]


def model(**options) -> OpenAILike:
    common = {"model": MODEL, "api_base": f"{URL}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 24, "timeout": 120}
    return OpenAILike(**{**common, "is_chat_model": True, "is_function_calling_model": True, "context_window": 1024, **options})


def weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather."""
    return "sunny"


llm = model()
longer = model(max_tokens=64)
question = ChatMessage(role="user", content=QUESTION)
tool = FunctionTool.from_defaults(weather)
CHOICE = {"extra_body": {"structured_outputs": {"choice": [BANNED]}}}


def assert_called(response) -> None:
    (call,) = longer.get_tool_calls_from_response(response)
    equal(call.tool_name, "weather")
    assert City(**call.tool_kwargs)


@check("chat")
def chat() -> str:
    answer = llm.chat([question])
    assert "Paris" in answer.message.content
    return answer.message.content


@check("chat")
def stream() -> None:
    equal("".join(chunk.delta or "" for chunk in llm.stream_chat([question])), llm.chat([question]).message.content)


@check("chat")
def usage() -> None:
    whole = llm.chat([question]).raw.usage
    streamed = list(llm.stream_chat([question], stream_options={"include_usage": True}))[-1].raw.usage
    equal((streamed.prompt_tokens, streamed.completion_tokens), (whole.prompt_tokens, whole.completion_tokens))


@check("chat")
def turns() -> str:
    first = llm.chat([question]).message
    again = llm.chat([question, first, ChatMessage(role="user", content=TURNS[2])]).message
    assert "Rome" in again.content, again.content
    return again.content


@check("chat")
def turns_tool() -> None:
    response = longer.chat_with_tools([tool], user_msg=question, tool_required=True, strict=True)
    (call,) = longer.get_tool_calls_from_response(response)
    result = ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
    assert llm.chat([question, response.message, result]).message.content


@check("chat")
def tools_auto() -> None:
    for strict in (True, False):
        response = llm.chat_with_tools([tool], user_msg=question, strict=strict)
        assert response.message.content or llm.get_tool_calls_from_response(response)


@check("chat")
def tools_required() -> None:
    assert_called(longer.chat_with_tools([tool], user_msg=question, tool_required=True, strict=True))


@check("chat")
def tools_required_without_strict() -> None:
    assert_called(longer.chat_with_tools([tool], user_msg=question, tool_required=True, strict=False))


@check("chat")
def tools_named() -> None:
    assert_called(longer.chat_with_tools([tool], user_msg=question, tool_choice="weather", strict=True))


@check("chat")
def tools_streamed() -> None:
    assert_called(list(longer.stream_chat_with_tools([tool], user_msg=question, tool_required=True, strict=True))[-1])


@check("chat")
def structured() -> None:
    prompt = PromptTemplate(QUESTION)
    assert isinstance(model(max_tokens=64, should_use_structured_outputs=True).structured_predict(City, prompt), City)


@check("chat")
def refusal() -> None:
    before = answered()
    choice = llm.chat([question], **CHOICE).raw.choices[0]
    equal((choice.finish_reason, choice.message.refusal), ("content_filter", REFUSAL))
    equal(answered() - before, 1)


@check("chat")
def refusal_streamed() -> None:
    choices = [chunk.raw.choices[0] for chunk in llm.stream_chat([question], **CHOICE) if chunk.raw.choices]
    equal((choices[-1].finish_reason, choices[-1].delta.refusal), ("content_filter", REFUSAL))


@check("chat")
def cancel() -> None:
    opened = model(max_tokens=400).stream_chat([question], extra_body={"ignore_eos": True, "min_tokens": 400})
    next(opened)
    opened.close()
    del opened
    gc.collect()  # close() leaves the connection open; it goes with the objects that hold it
    wait_until_idle()


not_offered("chat", "refusal_structured", "structured_predict reads the content as JSON, whatever the finish reason says")
not_offered("chat", "models", "OpenAILike does not ask for the list of models")
