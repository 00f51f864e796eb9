"""instructor around openai's client: chat completions."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel
from report import KEY, MODEL, QUESTION, URL, answered, check, equal, not_offered

messages = [{"role": "user", "content": QUESTION}]
options = {"model": MODEL, "temperature": 0, "max_tokens": 64, "messages": messages}
plain = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, timeout=120)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]


class Banned(BaseModel):
    """A name."""

    city: Literal["Harry Potter"]


def patched(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(plain, mode=mode)


@check("chat")
def structured() -> None:
    assert isinstance(patched(instructor.Mode.JSON_SCHEMA).create(response_model=City, max_retries=0, **options), City)


@check("chat")
def structured_by_tool() -> None:
    assert isinstance(patched(instructor.Mode.TOOLS).create(response_model=City, max_retries=0, **options), City)


@check("chat")
def structured_streamed() -> None:
    parts = list(patched(instructor.Mode.JSON_SCHEMA).create_partial(response_model=City, max_retries=0, **options))
    assert parts[-1].city in ("Paris", "Rome")


@check("chat")
def usage() -> None:
    _, completion = patched(instructor.Mode.JSON_SCHEMA).create_with_completion(response_model=City, **options)
    assert completion.usage.completion_tokens


@check("chat")
def refusal() -> str:
    """instructor looks at no finish reason but "length"; what it raises must at least carry the answer that says why."""
    for mode in (instructor.Mode.JSON_SCHEMA,):
        before = answered()
        try:
            found = patched(mode).create(response_model=Banned, max_retries=0, **options)
            raise AssertionError(f"a refused answer was taken for a whole one: {found!r}")
        except InstructorRetryException as error:
            equal(error.last_completion.choices[0].finish_reason, "content_filter")
            equal(answered() - before, 1)
    return "raises InstructorRetryException, whose last_completion says content_filter"


for name in ("chat", "stream", "turns", "tools_auto", "cancel", "models"):
    not_offered("chat", name, "these are openai's own client")
not_offered(
    "chat", "refusal_without_retry", "by default it asks again after every answer that it cannot parse, whatever the finish reason"
)
