"""litellm as a library: responses, and messages through its provider for Anthropic."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched at import

import litellm
from report import BANNED_SCHEMA, KEY, MODEL, QUESTION, URL, check, equal

messages = [{"role": "user", "content": QUESTION}]
server = {"api_base": f"{URL}/v1", "api_key": KEY, "timeout": 120}
ONLY = {"output_config": {"format": {"type": "json_schema", "schema": BANNED_SCHEMA}}}


@check("responses")
def chat() -> str:
    answer = litellm.responses(model=f"openai/{MODEL}", input=QUESTION, temperature=0, max_output_tokens=24, **server)
    assert "Paris" in answer.output[-1].content[0].text
    return answer.output[-1].content[0].text


@check("messages")
def chat() -> str:  # noqa: F811
    options = {"api_base": URL, "api_key": KEY, "temperature": 0, "max_tokens": 24}
    answer = litellm.completion(model=f"anthropic/{MODEL}", messages=messages, **options)
    assert "Paris" in answer.choices[0].message.content
    return answer.choices[0].message.content


@check("messages")
def refusal() -> None:
    options = {"api_base": URL, "api_key": KEY, "temperature": 0, "max_tokens": 24}
    answer = litellm.completion(model=f"anthropic/{MODEL}", messages=messages, **ONLY, **options)
    equal(answer.choices[0].finish_reason, "content_filter")
