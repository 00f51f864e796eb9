"""Malformed bodies on every route: a 4xx that says why, or an answer; never a 5xx, and the server goes on."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from serve.default_model import NAME
from tests.vllm.asking import FRANCE, POTTER, text
from tests.vllm.conftest import Server
from tests.vllm.test_z_keys_and_restart import routes

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "/v1/chat/completions": ({"messages": MESSAGES, "max_tokens": 1}, sorted(ChatCompletionRequest.model_fields)),
    "/v1/completions": ({"prompt": "hi", "max_tokens": 1}, sorted(CompletionRequest.model_fields)),
    "/v1/responses": ({"input": "hi", "max_output_tokens": 1}, sorted(ResponsesRequest.model_fields)),
    "/v1/messages": ({"messages": MESSAGES, "max_tokens": 1}, sorted(AnthropicMessagesRequest.model_fields)),
    "/v1/chat/completions/batch": ({"messages": [MESSAGES], "max_tokens": 1}, sorted(ChatCompletionRequest.model_fields)),
    "/v1/messages/count_tokens": ({"messages": MESSAGES}, ["messages", "system", "tools", "model"]),
}
JUNK: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**30, -(10**30), 1e308, float("nan"), float("inf")),
    *("", "x", "\ud800", "\0", "٣", "a" * 3_000),
    *([], [[]], [None], [-1], [10**9], ["x"] * 40, [{"type": "function"}], [{"role": "user"}]),
    *({}, {"": {}}, {"-1": 1}, {"x": "y"}, {"type": "text"}, {"type": "json_schema"}, {"a": {"b": {"c": [1]}}}),
    {"type": "function", "function": {"name": "f"}},
]
values = st.one_of(st.sampled_from(JUNK), st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists))
"""Of what a client might send by mistake, and of what nobody would."""
bounded = settings(
    max_examples=90, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def dumped(body: Any) -> bytes:
    return json.dumps(body).encode()  # NaN and lone surrogates as Python writes them, which some clients do too


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("policy", ["", ":fuzzed"])
def test_no_malformed_field_of_a_generating_route_is_a_server_error(
    server: Server, admin: httpx.Client, forget: Any, path: str, policy: str
) -> None:
    forget(*POTTER)
    fuzzed = {"guards": {"gate": "similarity", "stream": {"on_hit": "redact"}}}
    assert admin.put("/policies/fuzzed", json=fuzzed).status_code == 200
    body, fields = BODIES[path]
    with httpx.Client(base_url=server.url, timeout=120) as client:

        @bounded
        @given(st.dictionaries(st.sampled_from(fields), values, min_size=1, max_size=2))
        def send(changed: dict[str, Any]) -> None:
            sent = {"model": NAME + policy, **body, **changed}
            answer = client.post(path, content=dumped(sent), headers={"content-type": "application/json"})
            assert answer.status_code < 500, f"{sent}: {answer.text[:500]}"
            assert answer.status_code != 200 or '"code":500' not in answer.text, f"{sent}: {answer.text[:500]}"

        try:
            send()
        finally:
            assert admin.delete("/policies/fuzzed").status_code == 200


def test_no_malformed_body_or_name_is_a_server_error_on_any_route(server: Server) -> None:
    walked = sorted((method, path) for method, path in routes(server))
    assert len(walked) > 50
    names = st.sampled_from(["x", "%00", "%ff", "..%2f..", "a" * 500, "%F0%9F%98%80", "'", "1"])
    content = st.one_of(values.map(dumped), st.sampled_from([b"", b"{", b"\xff\xfe{}", b"[" * 5_000, b'{"a":' * 5_000]))
    kinds = st.sampled_from(["application/json", "application/jsonl", "text/csv", "text/plain", "multipart/form-data", ""])
    with httpx.Client(base_url=server.url, timeout=120) as client:

        @settings(bounded, max_examples=6 * len(walked))
        @given(st.sampled_from(walked), names, content, kinds)
        def send(route: tuple[str, str], name: str, body: bytes, kind: str) -> None:
            method, path = route
            address = re.sub(r"{[\w:]+}", name, path)
            answer = client.request(method, address, content=body, headers={"content-type": kind})
            assert answer.status_code < 500, f"{method} {address} {body[:200]!r}: {answer.text[:500]}"

        send()


def test_the_engine_works_after_all_that(client: openai.OpenAI) -> None:
    assert "Paris" in text(client, FRANCE)
