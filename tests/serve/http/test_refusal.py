"""Answers that a guard ended, and errors, in each protocol's own terms."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.serve.http.around import KEYED, App, admission_around, call, chat


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
