"""The documented shape of an answer that a guard ended, in each protocol's own terms.

Chat and completions: ``finish_reason: "content_filter"`` with ``refusal`` in the message or the choice. Responses: status
``incomplete``, reason ``content_filter``, and a ``refusal`` in the output. Messages: ``stop_reason: "refusal"`` with
``stop_details.explanation``. vLLM carries the finish reason of a chat through and has no way to say the rest, so the
response is completed on its way out.
Responses that no guard ended pass through untouched and unread.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

FINISH_REASON = "content_filter"
_ENDINGS = (
    FINISH_REASON.encode(),
    b"response.completed",
    b"message_delta",
    b"_text.done",
    b"content_part.done",
    b"output_item.done",
)
"""What the last chunks of the three protocols contain; a cheap test before parsing."""
_TEXT_DONE = b"event: response.output_text.done"
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def reporting(send: Send, refusal: str, blocked: Callable[[], bool], *, parsed: bool = False) -> Send:
    """Wrap ``send`` so that a blocked answer says so in its last chunk or in its message.

    Args:
        parsed: the client will parse the answer as JSON (``/v1/responses``, ``/v1/messages``): what a guard cut off is left out.
    """
    held: list[MutableMapping[str, Any]] = []
    streaming = True

    async def report(message: MutableMapping[str, Any]) -> None:
        nonlocal streaming
        if message["type"] == "http.response.start":
            content_type = dict(message.get("headers", [])).get(b"content-type", b"")
            streaming = content_type.startswith(b"text/event-stream")
            if not streaming and blocked():
                held.append(message)  # its content-length is about to change
                return
        elif held:
            held.append(message)
            if message.get("more_body"):
                return
            start, *parts = held
            body = _complete_body(b"".join(part.get("body", b"") for part in parts), refusal, parsed)
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})
            return
        elif streaming and blocked() and any(ending in message.get("body", b"") for ending in _ENDINGS):
            lines = message["body"].split(b"\n")
            message = {**message, "body": b"\n".join(_complete_line(line, refusal, parsed) for line in lines)}
        await send(message)

    return report


def _complete_body(body: bytes, refusal: str, parsed: bool) -> bytes:
    document = json.loads(body)
    if not isinstance(document, dict):
        return body  # vLLM says null to a client that went away
    _complete(document, refusal, parsed)
    return json.dumps(document, ensure_ascii=False).encode()


def _complete_line(line: bytes, refusal: str, parsed: bool) -> bytes:
    if parsed and line.startswith(_TEXT_DONE):
        return b"event: response.refusal.done"
    if line.startswith(b"event: response.completed"):
        return b"event: response.incomplete"
    if not line.startswith(b"data: {"):
        return line
    document = json.loads(line.removeprefix(b"data: "))
    _complete(document, refusal, parsed)
    return b"data: " + json.dumps(document, ensure_ascii=False).encode()


def _complete(document: dict[str, Any], refusal: str, parsed: bool) -> None:
    if parsed:
        _drop_what_would_be_parsed(document, refusal)
    for choice in document.get("choices") or ():
        if choice.get("finish_reason") == FINISH_REASON:
            parts = [choice[part] for part in ("message", "delta") if isinstance(choice.get(part), dict)]
            for part in parts or [choice]:  # of /v1/completions, a choice is all there is
                part["refusal"] = refusal
    if document.get("type") == "response.completed":
        document["type"] = "response.incomplete"
    response = document if document.get("object") == "response" else document.get("response")
    if isinstance(response, dict) and response.get("status") == "completed":
        response.update(status="incomplete", incomplete_details={"reason": FINISH_REASON})
        _say_in_output(response, refusal, parsed)
    message = document.get("delta") if document.get("type") == "message_delta" else document
    if document.get("type") in ("message", "message_delta") and isinstance(message, dict) and message.get("stop_reason") is None:
        message["stop_reason"] = "refusal"
        message["stop_details"] = {"type": "refusal", "category": None, "explanation": refusal}


def _drop_what_would_be_parsed(document: dict[str, Any], refusal: str) -> None:
    """Turn the ends of a text into those of a refusal, in the events of ``/v1/responses``; leave text out of ``/v1/messages``."""
    part = {"type": "refusal", "refusal": refusal}
    kind = document.get("type")
    if kind == "response.output_text.done":
        for name in ("text", "logprobs"):
            document.pop(name, None)
        document.update(type="response.refusal.done", refusal=refusal)
    elif kind == "response.content_part.done":
        document["part"] = part
    elif kind == "response.output_item.done" and document.get("item", {}).get("type") == "message":
        document["item"].update(content=[part], status="incomplete")
    elif kind == "message":
        document["content"] = []


def _say_in_output(response: dict[str, Any], refusal: str, parsed: bool) -> None:
    """Add the refusal to the last message of a response's output; make one if it has none."""
    output = response.setdefault("output", [])
    messages = [item for item in output if isinstance(item, dict) and item.get("type") == "message"]
    if not messages:
        messages = [{"type": "message", "id": f"msg_{response.get('id', '')}", "role": "assistant", "content": []}]
        output += messages
    messages[-1]["status"] = "incomplete"
    if parsed:
        messages[-1]["content"] = []
    messages[-1].setdefault("content", []).append({"type": "refusal", "refusal": refusal})
