"""Probes: how often a chat key may ask, by constraints, what is forgotten."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from guards.policy import BUILT_IN
from serve.http.middleware import Admission
from serve.registry.snapshot import Key, Snapshot, digest_secret
from tests.plans import made
from tests.serve.http.around import App, admission_around

KEY = {"authorization": "Bearer chat-secret"}
SUPPRESSING = Snapshot(
    7,
    made("a", phrases="phrases"),
    BUILT_IN,
    (Key("k1", digest_secret("chat-secret"), "chat"), Key("k2", digest_secret("root"), "admin")),
)


@pytest.mark.parametrize(
    "constraint",
    [
        {"structured_outputs": {"choice": ["Hogwarts", "Eton"]}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"const": "hogwarts"}}}}}},
        {"structured_outputs": {"regex": "H(og)?w[a]rts"}},
        {"allowed_token_ids": list(b"Hogwarts")},
        {"logit_bias": {str(token): 100 for token in b"Hogwarts"}},
        {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"enum": ["HOGWARTS"]}}}}}]},
        {"structured_outputs": {"type": "text", "choice": ["Hogwarts"]}},
        {"structured_outputs": {"format": {"type": "text"}, "choice": ["Hogwarts"]}},
        {"logit_bias": {str(token): "100" for token in b"Hogwarts"}},
    ],
    ids=lambda constraint: str(constraint)[:40],
)
def test_a_chat_key_that_names_forgotten_texts_in_constraints_may_do_so_a_few_times_an_hour(constraint: dict[str, Any]) -> None:
    admission = admission_around(App(), lambda: SUPPRESSING)

    def ask(body: dict[str, Any], key: str = "chat-secret") -> tuple[int, Any]:
        return ask_once(admission, body, {"authorization": f"Bearer {key}"})

    assert [ask(constraint)[0] for _ in range(4)] == [200] * 4, "the same question again tells nothing new"
    others = [{"structured_outputs": {"choice": [name]}} for name in ("Slytherin", "Gryffindor")]
    assert [ask(other)[0] for other in others] == [200, 429]
    assert ask(constraint)[0] == 200, "an application whose schema holds a name works on"
    harmless = {"structured_outputs": {"choice": ["yes", "no"]}}
    status, headers = ask(harmless)
    assert status == 429 and 0 < int(headers[b"retry-after"]) <= 3_600, "or the refusal would tell what was named"
    assert ask({})[0] == 200, "what is not constrained is answered"
    assert [ask(constraint, "root")[0] for _ in range(5)] == [200] * 5, "whoever may compare policies sees it anyhow"


def test_constraints_that_name_nothing_forgotten_are_not_counted_unless_a_guard_ends_the_answer() -> None:
    app = App()
    admission = admission_around(app, lambda: SUPPRESSING)

    def ask(number: int) -> int:
        return ask_once(admission, {"structured_outputs": {"regex": f"[a-z]{{{number}}}"}}, KEY)[0]

    assert [ask(number) for number in range(5)] == [200] * 5
    app.blocked = True
    assert [ask(number) for number in range(3)] == [200, 200, 429]


def ask_once(admission: Admission, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[bytes, bytes]]:
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps({"model": "m", **body}).encode(), "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [(b"host", b"127.0.0.1"), *sent]}
    asyncio.run(admission(scope, receive, send))
    return messages[0]["status"], dict(messages[0]["headers"])
