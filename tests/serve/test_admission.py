"""Admission, with a stub of an app behind it that says what reached it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from guards.policy import BUILT_IN
from guards.suppression.automaton import compile_phrases
from guards.suppression.declaration import Suppress
from guards.suppression.vocabulary import Vocabulary
from serve.experiment import Experiment, parse_experiment
from serve.generation.ask import InternalRoad
from serve.hits import RecentHits
from serve.http.budgets import Budgets
from serve.http.middleware import Admission
from serve.http.probes import Probes
from serve.http.rules import ALLOWED, GENERATING, REFUSED_FIELDS
from serve.registry.snapshot import LOOPBACK, Key, Limits, Snapshot, digest_secret
from serve.registry.usage import Usage
from serve.request import RequestContext, admitted
from serve.settings import Settings
from tests.plans import made
from tests.serve.live import live_experiments

SNAPSHOT = Snapshot(revision=7, sets=made("a", phrases="fingerprint"), policies=BUILT_IN, keys=())
KEYED = Snapshot(7, {}, BUILT_IN, (Key("k1", digest_secret("chat-secret"), "chat"), Key("k2", digest_secret("root"), "admin")))


VOCABULARY = Vocabulary([bytes([i]) for i in range(256)], special_ids=[])
PHRASES = compile_phrases(["Hogwarts", "Slytherin", "Gryffindor"], VOCABULARY)


class App:
    """Answers 200 with what it was given, or streams the chunks it was told to."""

    def __init__(self) -> None:
        self.reached: list[dict[str, Any]] = []
        self.blocked = False
        self.content_type = b"application/json"
        self.chunks = [b"{}"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"] if scope["method"] in ("POST", "PUT") else b""
        request = admitted.get()
        self.reached.append({"body": body, "headers": dict(scope["headers"]), "request": request, "path": scope["path"]})
        if request is not None:
            request.blocked = self.blocked
        headers = [(b"content-type", self.content_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, chunk in enumerate(self.chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": i + 1 < len(self.chunks)})


def admission_around(
    app: App,
    snapshot: Callable[[], Snapshot],
    *,
    open_without_keys: bool = True,
    allowed_origins: Sequence[str] = (),
    **limits: Any,
) -> Admission:
    settings = Settings(**limits)
    live = live_experiments(snapshot)
    options: dict[str, Any] = {
        "settings": settings,
        "open_without_keys": open_without_keys,
        "experiments": live,
        "hits": RecentHits(),
        "budgets": Budgets(Usage(Path(":memory:"))),
        "probes": Probes(2, lambda _: PHRASES, VOCABULARY),
        "allowed_origins": allowed_origins,
    }
    return Admission(app, snapshot=snapshot, served_names=["m"], **options)


def call(
    method: str,
    path: str,
    body: Any = None,
    *,
    snapshot: Snapshot = SNAPSHOT,
    app: App | None = None,
    headers: Any = None,
    open_without_keys: bool = True,
    **limits: Any,
) -> tuple[httpx.Response, App]:
    app = app or App()
    admission = admission_around(app, lambda: snapshot, open_without_keys=open_without_keys, **limits)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(admission), base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(send()), app


def chat(body: dict[str, Any], **options: Any) -> tuple[httpx.Response, App]:
    return call("POST", "/v1/chat/completions", {"model": "m", **body}, **options)


def test_an_admitted_request_carries_its_snapshot_s_plan() -> None:
    answer, app = chat({"messages": []})
    assert answer.status_code == 200
    request = app.reached[0]["request"]
    assert (request.plan.revision, request.plan.artifacts_of(Suppress), request.policy.name) == (7, ("fingerprint",), "default")
    assert admitted.get() is None


@pytest.mark.parametrize("field", REFUSED_FIELDS)
@pytest.mark.parametrize("path", sorted(GENERATING))
def test_every_refused_field_is_refused_on_every_route(path: str, field: str) -> None:
    answer, app = call("POST", path, {"model": "m", field: "x"})
    assert answer.status_code == 400
    assert repr(field) in answer.json()["error"]["message"]
    assert not app.reached
    for harmless in (None, False, 0, "", {}, []):
        assert call("POST", path, {"model": "m", field: harmless})[0].status_code == 200


BAD_BODIES = {
    "unfinished": b"{",
    "a list": b"[]",
    "a string": b'"x"',
    "not UTF-8": b"\xff",
    "a key twice": b'{"model": "m", "model": "m:none"}',
    "deep": b"[" * 100_000,
    "half a surrogate": b'{"stop": "\\ud800"}',
    "more than 64 bits": b'{"stream_interval": 9223372036854775808}',
    "a long number": b'{"n": ' + b"1" * 5_000 + b"}",
    "not a number": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}',
    "too large a number": b'{"temperature": 1e999}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bodies_that_are_not_one_json_object_are_refused(body: bytes) -> None:
    answer, app = call("POST", "/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert not app.reached


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


@pytest.mark.parametrize(
    "body",
    [
        {"n": 17},
        {"input": [{}] * 3_000},
        {"prompt": ["x"] * 65},
        {"logit_bias": {str(i): 1 for i in range(2_000)}},
        {"messages": [{}] * 3_000},
    ],
    ids=lambda body: next(iter(body)),
)
def test_caps_are_checked_before_any_work(body: dict[str, Any]) -> None:
    answer, app = chat(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(body))
    assert not app.reached
    assert call("POST", "/v1/completions", b"x" * 2_000, max_body_bytes=1_000)[0].status_code == 413
    conversations = {"model": "m", "messages": [[{}]] * 65}
    assert call("POST", "/v1/chat/completions/batch", conversations)[0].status_code == 400, "each is a request of its own"


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


def chain_of(length: int) -> dict[str, Any]:
    """Definitions each of which refers to the next."""
    return {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(length)} | {str(length): {}}


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"json": {"type": "array", "minItems": 100_000_000}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxLength": 10**9}}}},
        {"structured_outputs": {"regex": "a{999999}"}},
        {"structured_outputs": True},
        {"structured_outputs": {"choice": [str(i) for i in range(100_000)]}},
        {"response_format": {"json_schema": {"schema": {"properties": {"a": {"enum": list(range(100_000))}}}}}},
        {"structured_outputs": {"json": {"minItems": 9999, "items": {"minItems": 9999, "items": {"minLength": 9999}}}}},
        {"tools": [{"function": {"parameters": {"properties": {"a": {"maxItems": 400, "items": {"maxLength": 400}}}}}}]},
        {"structured_outputs": {"regex": "((a{100}){100}){100}"}},
        {"structured_outputs": {"regex": "(a{90000}[)]){90000}"}},
        {"structured_outputs": {"regex": "|".join(map(str, range(3_000)))}},
        {"structured_outputs": {"json": json.dumps({"enum": list(range(3_000))})}},
        {"structured_outputs": {"json": '{"enum": '}},
        {"structured_outputs": {"json": {"properties": {str(i): {} for i in range(9_000)}}}},
        {
            "structured_outputs": {
                "json": {
                    "$defs": {
                        "b": {"minItems": 999, "items": {"minLength": 999}},
                        "a": {"minItems": 999, "items": {"$ref": "#/$defs/b"}},
                    },
                    "items": {"$ref": "#/$defs/a"},
                }
            }
        },
        {"response_format": {"anyOf": [{"const": i} for i in range(3_000)]}},
        {
            "structured_outputs": {
                "json": {"properties": {"a": {"maxLength": 90_000}, "b": {"maxItems": 9, "items": {"$ref": "#/properties/a"}}}}
            }
        },
        {
            "structured_outputs": {
                "json": {
                    "$defs": {"big": {"properties": {str(i): {"anyOf": [{}] * 100} for i in range(1_000)}}},
                    "anyOf": [{"maxItems": k, "items": {"$ref": "#/$defs/big"}} for k in range(2, 500)],
                }
            }
        },
        {"allowed_token_ids": list(range(100_000))},
        {"structured_outputs": {"grammar": 'root ::= "' + "a" * 300_000 + '"'}},
    ],
    ids=lambda body: str(body)[:60],
)
def test_grammars_that_would_stop_the_engine_are_refused(body: dict[str, Any]) -> None:
    answer, app = chat(body)
    assert answer.status_code == 400
    assert not app.reached


@pytest.mark.parametrize(
    ("schema", "status"),
    [
        ({"maxItems": 20, "items": {"properties": {"kind": {"enum": ["a"] * 50}, "text": {"maxLength": 2_000}}}}, 200),
        # A tree calls itself: one rule, however often.
        ({"$defs": {"node": {"maxItems": 50, "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"}, 200),
        ({"$defs": chain_of(25), "maxItems": 2, "items": {"$ref": "#/$defs/0"}}, 200),
        ({"$defs": chain_of(900), "maxItems": 2, "items": {"$ref": "#/$defs/0"}}, 400),
    ],
)
def test_grammars_of_everyday_size_pass(schema: dict[str, Any], status: int) -> None:
    assert chat({"structured_outputs": {"regex": "(a{1,20}b){20}", "json": schema}})[0].status_code == status


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


def test_echo_and_prompt_log_probabilities_pass_only_where_nothing_is_guarded() -> None:
    for field, value in (("echo", True), ("prompt_logprobs", 0)):
        assert chat({field: value})[0].status_code == 400
        assert chat({"model": "m:none", field: value})[0].status_code == 200
    assert chat({"echo": False})[0].status_code == 200


def test_a_blocked_answer_gets_its_refusal_and_others_pass_untouched() -> None:
    app = App()
    app.chunks = [
        b'{"choices": [{"finish_reason": "content_filter", "message": {"content": "a"}},',
        b' {"finish_reason": "stop", "message": {}}]}',
    ]
    assert "refusal" not in chat({}, app=app)[0].text
    app.blocked = True
    blocked, stopped = chat({}, app=app)[0].json()["choices"]
    assert blocked["message"] == {"content": "a", "refusal": "I cannot continue this answer."}
    app.chunks = [b'{"object": "text_completion", "choices": [{"finish_reason": "content_filter", "text": ""}]}']
    assert chat({}, app=app)[0].json()["choices"][0]["refusal"] == "I cannot continue this answer."
    assert stopped["message"] == {}


def test_an_answer_whose_client_went_away_passes_as_it_is() -> None:
    app = App()
    app.blocked, app.chunks = True, [b"null"]
    assert chat({}, app=app)[0].text == "null"


def test_a_blocked_stream_gets_its_refusal_in_the_last_chunk() -> None:
    app = App()
    app.content_type, app.blocked = b"text/event-stream; charset=utf-8", True
    app.chunks = [
        b'data: {"choices": [{"delta": {"content": "content_filter"}, "finish_reason": null}]}\n\n',
        b'data: {"choices": [{"delta": {}, "finish_reason": "content_filter"}]}\n\ndata: [DONE]\n\n',
    ]
    text = chat({}, app=app)[0].text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["choices"][0]["delta"].get("refusal") for event in events] == [None, "I cannot continue this answer."]
    assert text.endswith("data: [DONE]\n\n")


def test_other_protocols_say_it_in_their_own_terms() -> None:
    app = App()
    app.blocked, app.chunks = True, [b'{"object": "response", "status": "completed", "output": []}']
    response = chat({}, app=app)[0].json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    assert response["output"][-1]["content"] == [{"type": "refusal", "refusal": "I cannot continue this answer."}]
    app.chunks = [b'{"type": "message", "stop_reason": null, "content": []}']
    message = chat({}, app=app)[0].json()
    assert message["stop_reason"] == "refusal"
    assert message["stop_details"]["explanation"] == "I cannot continue this answer."
    app.content_type = b"text/event-stream"
    app.chunks = [
        b"event: response.completed\n",
        b'data: {"type": "response.completed", "response": {"object": "response", "status": "completed"}}\n\n',
        b'event: message_delta\ndata: {"type": "message_delta", "delta": {"stop_reason": null}}\n\n',
    ]
    lines = chat({}, app=app)[0].text.splitlines()
    assert lines[0] == "event: response.incomplete"
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert events[0]["type"] == "response.incomplete"
    assert events[0]["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert events[1]["delta"]["stop_reason"] == "refusal"


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def connect() -> None:
        admission = admission_around(App(), lambda: SNAPSHOT)

        async def send(message: Any) -> None:
            sent.append(message)

        await admission({"type": "websocket", "path": "/v1/realtime"}, None, send)  # type: ignore[arg-type]

    asyncio.run(connect())
    assert sent[0]["type"] == "websocket.close"


EXPERIMENT = Experiment(
    id="i",
    order=parse_experiment(
        {"name": "e", "arms": [{"name": "a", "policy": "default"}, {"name": "b", "policy": "none"}], "unit": "user"}
    ),
    salt="s",
    start=0.0,
    epochs=({"a": 1.0, "b": 1.0},),
)
RUNNING = dataclasses.replace(SNAPSHOT, experiments=(EXPERIMENT,))


def test_an_experiment_chooses_the_policy_of_requests_that_choose_none() -> None:
    seen = set()
    for i in range(40):
        reached = chat({"user": f"u{i}"}, snapshot=RUNNING)[1].reached[0]["request"]
        assert reached.entry is not None and reached.policy.name == reached.entry.arm.policy == reached.plan.policy
        assert chat({"user": f"u{i}"}, snapshot=RUNNING)[1].reached[0]["request"].entry.arm == reached.entry.arm, "it is sticky"
        seen.add(reached.policy.name)
    assert seen == {"default", "none"}


@pytest.mark.parametrize("body", [{}, {"user": ""}, {"user": 3}, {"model": "m:default", "user": "u"}])
def test_who_has_no_unit_or_chose_a_policy_takes_no_part(body: dict[str, Any]) -> None:
    reached = chat(body, snapshot=RUNNING)[1].reached[0]["request"]
    assert reached.entry is None and reached.policy.name == "default"


def test_an_arm_is_forced_by_those_who_may_choose_policies_and_nobody_else() -> None:
    keyed = dataclasses.replace(KEYED, experiments=(EXPERIMENT,))
    forced = {"x-experiment-arm": "e/b"}
    answer, _ = chat({"user": "u"}, snapshot=keyed, headers={"authorization": "Bearer chat-secret", **forced})
    assert answer.status_code == 403
    answer, app = chat({"user": "u"}, snapshot=keyed, headers={"authorization": "Bearer root", **forced})
    assert answer.status_code == 200 and app.reached[0]["request"].policy.name == "none" and app.reached[0]["request"].entry.forced
    answer, _ = chat({}, snapshot=keyed, headers={"authorization": "Bearer root", "x-experiment-arm": "e/gone"})
    assert answer.status_code == 404 and "e/gone" in answer.json()["error"]["message"]


def test_an_answer_that_nobody_waits_for_ends_when_it_is_cancelled() -> None:
    """vLLM's handlers run in tasks of their own and end when their client goes away, and only then."""
    ended: list[str] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()

        async def generate() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("aborted")
                raise

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(generate()), asyncio.create_task(listen())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel_one() -> None:
        road = InternalRoad(app, None)
        request = RequestContext(LOOPBACK, BUILT_IN["none"], SNAPSHOT.plan("none"), in_shadow=True)
        answering = asyncio.create_task(road.status("/v1/chat/completions", b"{}", request))
        await asyncio.sleep(0.05)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering

    asyncio.run(cancel_one())
    assert ended == ["aborted"]


def test_an_experiment_refuses_what_any_of_its_arms_would() -> None:
    """Otherwise who fails would depend on the arm, and the arm would show."""
    acting = dataclasses.replace(RUNNING, sets=made("a", phrases="fingerprint"))
    statuses = {chat({"user": f"u{i}", "prompt_logprobs": 1}, snapshot=acting)[0].status_code for i in range(20)}
    assert statuses == {400}


def test_metrics_need_a_key_that_may_know_of_policies() -> None:
    for secret, status in (("chat-secret", 403), ("root", 200)):
        answer, _ = call("GET", "/metrics", snapshot=KEYED, headers={"authorization": f"Bearer {secret}"})
        assert answer.status_code == status


def test_every_generating_route_is_allowed() -> None:
    assert {f"POST {path}" for path in GENERATING} <= ALLOWED


def test_switches_of_the_chat_template_pass_and_nothing_else_of_it() -> None:
    for harmless in ({"enable_thinking": False}, {"reasoning_effort": "low", "thinking": True}, {}, None):
        answer, app = chat({"chat_template_kwargs": harmless})
        assert answer.status_code == 200
        assert json.loads(app.reached[0]["body"])["chat_template_kwargs"] == harmless
    for wrong in ({"documents": [{"text": "x"}]}, {"enable_thinking": ["x"]}, {"reasoning_effort": "x" * 100}, "x", {"tools": "x"}):
        answer, app = chat({"chat_template_kwargs": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
        assert not app.reached
    assert chat({"chat_template_kwargs": {"lang": "de"}}, template_switches=("lang",))[0].status_code == 200


@pytest.mark.parametrize("field", ["policy", "lethe_policy", "forget_sets", "guards"])
def test_a_field_that_only_looks_as_if_it_chose_a_guard_is_refused_and_says_how_to_choose_one(field: str) -> None:
    answer, app = chat({field: "strict"})
    assert answer.status_code == 400 and "m:strict" in answer.json()["error"]["message"]
    assert not app.reached


@pytest.mark.parametrize("field", [{"store": True}, {"previous_response_id": "resp_1"}, {"background": True}])
def test_what_needs_stored_responses_is_refused(field: dict[str, Any]) -> None:
    assert call("POST", "/v1/responses", {"model": "m", "input": "x", **field})[0].status_code == 400
    assert call("POST", "/v1/responses", {"model": "m", "input": "x", "store": False})[0].status_code == 200


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


def test_anthropic_s_clients_get_errors_in_their_own_envelope() -> None:
    answer, _ = call("POST", "/v1/messages", {"model": "m"}, snapshot=KEYED, headers={"x-api-key": "wrong"})
    assert answer.status_code == 401
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "authentication_error"
    for body, kind in (({"model": "m", "cache_salt": "a"}, "invalid_request_error"), ({"model": "m:nosuch"}, "not_found_error")):
        answer, _ = call("POST", "/v1/messages", body, snapshot=KEYED, headers={"x-api-key": "root"})
        assert answer.json()["error"]["type"] == kind

    async def vllm(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "too ', "more_body": True})
        await send({"type": "http.response.body", "body": b'long", "type": "BadRequestError"}}'})

    answer, _ = call("POST", "/v1/messages", {"model": "m"}, app=vllm)  # type: ignore[arg-type]
    assert answer.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_of_two_keys_the_one_that_is_known_counts() -> None:
    headers = {"authorization": "Bearer root", "x-api-key": "sk-ant-x"}
    assert call("GET", "/v1/models", snapshot=KEYED, headers=headers)[0].status_code == 200
    headers = {"authorization": "Bearer sk-ant-x", "x-api-key": "root"}
    assert call("GET", "/lethe/v1/forget_sets", snapshot=KEYED, headers=headers)[0].status_code == 200
    headers = {"authorization": "Bearer no", "x-api-key": "neither"}
    assert call("GET", "/v1/models", snapshot=KEYED, headers=headers)[0].status_code == 401


def test_pages_from_elsewhere_can_read_errors_and_request_ids() -> None:
    admission = admission_around(App(), lambda: KEYED, allowed_origins=["https://a.example"])

    async def send(origin: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(admission), base_url="http://127.0.0.1:8000") as client:
            return await client.get("/v1/models", headers={"origin": origin})

    answer = asyncio.run(send("https://a.example"))
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://a.example"
    assert answer.headers["access-control-expose-headers"] == "x-request-id"
    assert "access-control-allow-origin" not in asyncio.run(send("https://b.example")).headers


def test_a_stream_that_is_held_back_shows_that_it_lives() -> None:
    async def slow(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for part in (b"data: a\n\n", b"data: half", b" b\n\n"):
            await asyncio.sleep(0.12)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    answer, _ = call("POST", "/v1/chat/completions", {"model": "m"}, app=slow, comment_after_s=0.05)  # type: ignore[arg-type]
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.text.startswith(": waiting\n\n") and "half b" in answer.text, "never inside an event"
    assert answer.text.replace(": waiting\n\n", "") == "data: a\n\ndata: half b\n\ndata: [DONE]\n\n"


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


def test_an_assistant_s_turn_without_a_type_is_a_message() -> None:
    turns = [
        {"role": "assistant", "content": [{"type": "output_text", "text": "hello"}]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]
    _, app = call("POST", "/v1/responses", {"model": "m", "input": turns})
    assert json.loads(app.reached[0]["body"])["input"] == [{**turns[0], "type": "message"}, *turns[1:]]


def test_our_own_refusal_can_be_sent_back_as_a_turn() -> None:
    turn = {"role": "assistant", "id": None, "type": "message", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    _, app = call("POST", "/v1/responses", {"model": "m", "input": [turn, {**turn, "content": []}]})
    first, second = json.loads(app.reached[0]["body"])["input"]
    assert first["content"][0]["text"] == "I cannot." and "id" not in first
    assert second["content"][0]["type"] == "output_text"


def test_references_to_stored_items_are_refused_with_a_way_out() -> None:
    answer, _ = call("POST", "/v1/responses", {"model": "m", "input": [{"type": "item_reference", "id": "msg_1"}]})
    assert answer.status_code == 400 and "store" in answer.json()["error"]["message"]


def test_a_refused_answer_holds_nothing_that_a_client_would_parse_as_json() -> None:
    app = App()
    app.blocked = True
    part = b'{"type": "output_text", "text": "{\\"city\\": \\""}'
    app.chunks = [b'{"object": "response", "status": "completed", "output": [{"type": "message", "content": [' + part + b"]}]}"]
    asked = {"model": "m", "input": "x", "text": {"format": {"type": "json_schema"}}}
    refusal = {"type": "refusal", "refusal": "I cannot continue this answer."}
    assert call("POST", "/v1/responses", asked, app=app)[0].json()["output"][0]["content"] == [refusal]
    app.chunks = [b'{"type": "message", "stop_reason": null, "content": [{"type": "text", "text": "{"}]}']
    asked = {"model": "m", "messages": [], "output_config": {"format": {"type": "json_schema"}}}
    assert call("POST", "/v1/messages", asked, app=app)[0].json()["content"] == []
    app.content_type = b"text/event-stream"
    app.chunks = [
        b'event: response.output_text.done\ndata: {"type": "response.output_text.done", "item_id": "i", "text": "{", '
        b'"content_index": 0, "output_index": 0, "sequence_number": 7}\n\n',
        b'event: response.content_part.done\ndata: {"type": "response.content_part.done", "item_id": "i", "content_index": 0, '
        b'"output_index": 0, "sequence_number": 8, "part": ' + part + b"}\n\n",
        b'event: response.output_item.done\ndata: {"type": "response.output_item.done", "sequence_number": 9, '
        b'"item": {"type": "message", "content": [' + part + b"]}}\n\n",
    ]
    asked = {"model": "m", "input": "x", "text": {"format": {"type": "json_schema"}}, "stream": True}
    stream = call("POST", "/v1/responses", asked, app=app)[0].text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    assert [(each["type"], each["sequence_number"]) for each in events] == [
        ("response.content_part.done", 7),  # whoever parses does so at output_text.done: there is none
        ("response.content_part.added", 8),
        ("response.refusal.delta", 9),
        ("response.refusal.done", 10),
        ("response.content_part.done", 11),
        ("response.output_item.done", 12),
    ]
    assert all(f"event: {each['type']}\ndata: " in stream for each in events)
    assert {each["content_index"] for each in events[1:5]} == {1} and events[2]["item_id"] == "i"
    assert events[4]["part"] == refusal and events[5]["item"]["content"] == [refusal]


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


def test_of_two_keys_one_that_is_valid_counts_and_an_expired_one_alone_says_when_it_ended() -> None:
    ended = Key("k0", digest_secret("old"), "chat", Limits(expires_at="2020-01-01T00:00:00+00:00"))
    snapshot = Snapshot(7, {}, BUILT_IN, (ended, *KEYED.keys))
    both = {"authorization": "Bearer old", "x-api-key": "chat-secret"}
    assert chat({}, snapshot=snapshot, headers=both)[0].status_code == 200
    refused = chat({}, snapshot=snapshot, headers={"authorization": "Bearer old"})[0]
    assert refused.status_code == 401 and "k0 expired at 2020-01-01" in refused.json()["error"]["message"]
