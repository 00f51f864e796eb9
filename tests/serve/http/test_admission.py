"""Admission, with a stub of an app behind it that says what reached it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from guards.policy import BUILT_IN
from guards.suppression.declaration import Suppress
from serve.http.rules import ALLOWED, GENERATING
from serve.registry.snapshot import Key, Limits, Snapshot, digest_secret
from serve.request import admitted
from tests.plans import made
from tests.serve.http.around import KEYED, SNAPSHOT, App, admission_around, call, chat


def test_an_admitted_request_carries_its_snapshot_s_plan() -> None:
    answer, app = chat({"messages": []})
    assert answer.status_code == 200
    request = app.reached[0]["request"]
    assert (request.plan.revision, request.plan.artifacts_of(Suppress), request.policy.name) == (7, ("fingerprint",), "default")
    assert admitted.get() is None


def test_a_policy_is_selected_in_the_model_s_name_and_the_base_model_reaches_vllm() -> None:
    answer, app = chat({"model": "m:none"})
    assert answer.status_code == 200
    assert json.loads(app.reached[0]["body"])["model"] == "m"
    assert app.reached[0]["request"].plan.artifacts_of(Suppress) == ()
    assert app.reached[0]["headers"][b"content-length"] == str(len(app.reached[0]["body"])).encode()
    assert chat({"model": "m:missing"})[0].status_code == 404
    chat_key = {"authorization": "Bearer chat-secret"}
    assert chat({"model": "m:none"}, snapshot=KEYED, headers=chat_key)[0].status_code == 403
    assert chat({"model": "m:default"}, snapshot=KEYED, headers=chat_key)[0].status_code == 200


@pytest.mark.parametrize(
    "path", ["/tokenize", "/invocations", "/v1/load_lora_adapter", "/collective_rpc", "/v1/chat/completions/", "/V1/models"]
)
def test_routes_that_are_not_named_are_closed_even_to_administrators(path: str) -> None:
    answer, app = call("POST", path, {}, snapshot=KEYED, headers={"authorization": "Bearer root"})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert not app.reached


def test_an_operator_can_open_a_route() -> None:
    assert call("POST", "/tokenize", {}, allow_routes=("POST /tokenize",))[0].status_code == 200


def test_keys_open_what_their_scope_says() -> None:
    def status(path: str, secret: str | None, method: str = "GET") -> int:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return call(method, path, snapshot=KEYED, headers=headers)[0].status_code

    assert status("/health", None) == 200
    assert status("/v1/models", None) == 401
    assert status("/v1/models", "chat-secret") == 200
    assert status("/lethe/v1/forget_sets", "chat-secret") == 403
    assert status("/lethe/v1/forget_sets", "root") == 200
    assert status("/lethe/v1/forget_sets", None) == 401


def test_without_keys_a_server_that_others_can_reach_is_closed() -> None:
    assert call("GET", "/v1/models", open_without_keys=False)[0].status_code == 401
    assert call("GET", "/health", open_without_keys=False)[0].status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://["},
        {"x-forwarded-for": "203.0.113.9"},
        {"x-real-ip": "203.0.113.9", "host": "127.0.0.1:8000"},
        {"forwarded": "for=203.0.113.9"},
        {"via": "1.1 proxy"},
        {"host": "rebound.example:8000"},
    ],
    ids=str,
)
def test_without_keys_no_web_page_and_no_proxy_can_throw_the_switch(headers: dict[str, str]) -> None:
    answer, app = call("POST", "/lethe/v1/forget_sets/a/disable", headers=headers)
    assert answer.status_code == 403
    assert not app.reached
    for own in ({"origin": "http://localhost:3000"}, {"host": "localhost:8000"}, {"host": "[::1]:8000"}):
        assert call("POST", "/lethe/v1/forget_sets/a/disable", headers=own)[0].status_code == 200


def test_what_is_in_force_when_the_body_is_complete_counts() -> None:
    """A client cannot keep an old snapshot, or a revoked key, alive by sending slowly."""
    app, current = App(), [SNAPSHOT]
    admission = admission_around(app, lambda: current[0])
    answers: list[Any] = []

    async def send_slowly(then: Snapshot) -> None:
        pieces = [b'{"model": ', b'"m"}']

        async def receive() -> Any:
            piece = pieces.pop(0)
            if not pieces:
                current[0] = then
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"127.0.0.1")]}
        await admission(scope, receive, send)

    later = Snapshot(revision=8, sets=made("b", phrases="other"), policies=BUILT_IN, keys=())
    asyncio.run(send_slowly(later))
    assert app.reached[0]["request"].plan.artifacts_of(Suppress) == ("other",)
    asyncio.run(send_slowly(KEYED))
    assert answers[-2]["status"] == 401


def test_options_needs_a_key_unless_it_is_a_preflight() -> None:
    assert call("OPTIONS", "/metrics", snapshot=KEYED)[0].status_code == 401
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert call("OPTIONS", "/v1/chat/completions", snapshot=KEYED, headers=preflight)[0].status_code == 200


def test_headers_that_steer_the_engine_do_not_reach_it() -> None:
    headers = {"X-Request-Id": "mine", "X-Data-Parallel-Rank": "1", "X-Session-ID": "s", "X-Vllm-Priority": "-5"}
    answer, app = chat({}, headers=headers)
    reached = app.reached[0]["headers"]
    assert not {b"x-data-parallel-rank", b"x-session-id", b"x-vllm-priority"} & reached.keys()
    assert reached[b"x-request-id"].decode() == answer.headers["x-request-id"] != "mine"


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def connect() -> None:
        admission = admission_around(App(), lambda: SNAPSHOT)

        async def send(message: Any) -> None:
            sent.append(message)

        await admission({"type": "websocket", "path": "/v1/realtime"}, None, send)  # type: ignore[arg-type]

    asyncio.run(connect())
    assert sent[0]["type"] == "websocket.close"


def test_metrics_need_a_key_that_may_know_of_policies() -> None:
    for secret, status in (("chat-secret", 403), ("root", 200)):
        answer, _ = call("GET", "/metrics", snapshot=KEYED, headers={"authorization": f"Bearer {secret}"})
        assert answer.status_code == status


def test_every_generating_route_is_allowed() -> None:
    assert {f"POST {path}" for path in GENERATING} <= ALLOWED


def test_head_is_answered_where_get_is_without_a_body() -> None:
    for snapshot in (SNAPSHOT, KEYED):
        answer, _ = call("HEAD", "/health", snapshot=snapshot)
        assert (answer.status_code, answer.content) == (200, b"")
    assert call("HEAD", "/v1/models", snapshot=KEYED)[0].status_code == 401


def test_a_server_behind_a_path_knows_its_routes() -> None:
    app = App()

    async def send(path: str) -> int:
        transport = httpx.ASGITransport(admission_around(app, lambda: KEYED), root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return (await client.post(path, json={"model": "m"}, headers={"authorization": "Bearer root"})).status_code

    assert asyncio.run(send("/llm/v1/chat/completions")) == 200
    assert asyncio.run(send("/llm/tokenize")) == 404
    assert asyncio.run(send("/llm/lethe/v1/forget_sets")) == 200


def test_of_two_keys_the_one_that_is_known_counts() -> None:
    headers = {"authorization": "Bearer root", "x-api-key": "sk-ant-x"}
    assert call("GET", "/v1/models", snapshot=KEYED, headers=headers)[0].status_code == 200
    headers = {"authorization": "Bearer sk-ant-x", "x-api-key": "root"}
    assert call("GET", "/lethe/v1/forget_sets", snapshot=KEYED, headers=headers)[0].status_code == 200
    headers = {"authorization": "Bearer no", "x-api-key": "neither"}
    assert call("GET", "/v1/models", snapshot=KEYED, headers=headers)[0].status_code == 401


def test_beyond_a_bound_of_requests_under_way_clients_are_told_to_come_later() -> None:
    release = asyncio.Event()

    async def waiting(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def three() -> list[httpx.Response]:
        admission = admission_around(waiting, lambda: SNAPSHOT, max_under_way=2)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(admission), base_url="http://127.0.0.1:8000") as client:
            posts = [asyncio.create_task(client.post("/v1/completions", json={"model": "m"})) for _ in range(3)]
            await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
            release.set()
            answers = await asyncio.gather(*posts)
            return [*answers, await client.post("/v1/completions", json={"model": "m"})]

    *first, last = asyncio.run(three())
    assert sorted(answer.status_code for answer in first) == [200, 200, 429] and last.status_code == 200
    refused = next(answer for answer in first if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0 and refused.json()["error"]["type"] == "rate_limit_error"


def test_of_two_keys_one_that_is_valid_counts_and_an_expired_one_alone_says_when_it_ended() -> None:
    ended = Key("k0", digest_secret("old"), "chat", Limits(expires_at="2020-01-01T00:00:00+00:00"))
    snapshot = Snapshot(7, {}, BUILT_IN, (ended, *KEYED.keys))
    both = {"authorization": "Bearer old", "x-api-key": "chat-secret"}
    assert chat({}, snapshot=snapshot, headers=both)[0].status_code == 200
    refused = chat({}, snapshot=snapshot, headers={"authorization": "Bearer old"})[0]
    assert refused.status_code == 401 and "k0 expired at 2020-01-01" in refused.json()["error"]["message"]
