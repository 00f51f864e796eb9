"""With nothing forgotten, lethe is plain vLLM: the same JSON from both, but for ids and times."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serve.default_model import NAME
from tests.vllm.asking import FRANCE
from tests.vllm.conftest import Server


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2, "temperature": 0.5, "seed": 1, "logprobs": True, "top_logprobs": 3},
        {"response_format": {"type": "json_object"}, "max_tokens": 24},
        {"stop": ["Paris"]},
        {"temperature": 1, "seed": 3},
        {"stream": True},
    ],
    ids=str,
)
def test_with_nothing_forgotten_the_answers_are_plain_vllm_s(server: Server, plain: Server, options: dict[str, Any]) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": FRANCE}], "temperature": 0, "max_tokens": 32, **options}

    def answer(each: Server) -> Any:
        response = httpx.post(f"{each.url}/v1/chat/completions", json=body, timeout=120)
        assert response.status_code == 200
        if not options.get("stream"):
            return _without_ids(response.json())
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        parsed = [_without_ids(json.loads(event)) for event in events]
        text = "".join(e["choices"][0]["delta"].get("content") or "" for e in parsed)
        parsed[-1]["choices"][0]["delta"].pop("content", None)  # vLLM puts tokens that it has together into one event
        return text, parsed[0], parsed[-1]

    ours, theirs = answer(server), answer(plain)
    assert _rounded(ours) == _rounded(theirs)


def _without_ids(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("id", "created", "system_fingerprint")}


def _rounded(value: Any) -> Any:
    """Numbers to two decimals: log-probabilities differ in the fifth from batch to batch."""
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
