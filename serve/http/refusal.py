"""The documented shape of an answer that a guard ended, in each protocol's own terms.

Chat and completions: ``finish_reason: "content_filter"`` with ``refusal`` in the message or the choice. Responses: status
``incomplete``, reason ``content_filter``, and a ``refusal`` in the output. Messages: ``stop_reason: "refusal"`` with
``stop_details.explanation``. vLLM carries the finish reason of a chat through and has no way to say the rest, so the
response is completed on its way out.
Responses that no guard ended pass through untouched and unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Send

from serve.generation.outputs import FINISH_REASON

_ENDINGS = (
    FINISH_REASON.encode(),
    b"response.completed",
    b"message_delta",
    b"_text.done",
    b"content_part.done",
    b"output_item.done",
)
"""What the last chunks of the three protocols contain; a cheap test before parsing."""
_BETWEEN = b"\n\n"


def reporting(send: Send, refusal: str, blocked: Callable[[], bool], *, parsed: bool = False) -> Send:
    """Wrap ``send`` so that a blocked answer says so in its last chunk or in its message.

    Args:
        parsed: the client will parse the answer as JSON (``/v1/responses``, ``/v1/messages``): what a guard cut off is left out.
    """
    held: list[Message] = []
    streaming = True
    events = _Events(refusal, parsed)

    async def report(message: Message) -> None:
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
        elif streaming and blocked():
            message = {**message, "body": events.take(message.get("body", b""), last=not message.get("more_body"))}
        await send(message)

    return report


class _Events:
    """The last events of a blocked stream, completed. In ``/v1/responses`` a refusal is a part of its own, behind the text's."""

    def __init__(self, refusal: str, parsed: bool) -> None:
        self._refusal, self._parsed = refusal, parsed
        self._added = 0  # events more than there were, by which later ones are numbered
        self._begun = b""  # an event whose end has not come

    def take(self, piece: bytes, *, last: bool) -> bytes:
        """A piece of the stream, whole events of it completed."""
        *events, self._begun = (self._begun + piece).split(_BETWEEN)
        done = b"".join(new + _BETWEEN for event in events for new in self.complete(event))
        return done + self._begun if last else done

    def complete(self, event: bytes) -> list[bytes]:
        """What an event becomes: itself, completed; with more behind it; or nothing."""
        if not self._added and not any(ending in event for ending in _ENDINGS):
            return [event]
        lines = event.split(b"\n")
        place = next((i for i, line in enumerate(lines) if line.startswith(b"data: {")), None)
        if place is None:
            return [event]
        document = json.loads(lines[place].removeprefix(b"data: "))
        kind = document.get("type")
        number = document.get("sequence_number")
        if number is not None:
            document["sequence_number"] = number + self._added
        if kind == "response.output_text.done" and self._parsed:
            self._added -= 1  # whoever parses a text does so now, and it is not whole
            return []
        _complete(document, self._refusal, self._parsed)
        if kind == "response.completed":
            lines = [b"event: response.incomplete" if line.startswith(b"event: ") else line for line in lines]
        lines[place] = _data(document)
        completed = [b"\n".join(lines)]
        if kind == "response.content_part.done" and document.get("part", {}).get("type") == "output_text":
            completed += self._refusal_part(document)
        return completed

    def _refusal_part(self, text_done: dict[str, Any]) -> list[bytes]:
        where = {"item_id": text_done.get("item_id"), "output_index": text_done.get("output_index")}
        where["content_index"] = text_done.get("content_index", 0) + 1
        number, part = text_done.get("sequence_number", 0), {"type": "refusal", "refusal": self._refusal}
        events: list[dict[str, Any]] = [
            {"type": "response.content_part.added", "part": {**part, "refusal": ""}},
            {"type": "response.refusal.delta", "delta": self._refusal},
            {"type": "response.refusal.done", "refusal": self._refusal},
            {"type": "response.content_part.done", "part": part},
        ]
        self._added += len(events)
        for i, event in enumerate(events, 1):
            event.update(where, sequence_number=number + i)
        return [f"event: {event['type']}\n".encode() + _data(event) for event in events]


def _data(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode()


def _complete_body(body: bytes, refusal: str, parsed: bool) -> bytes:
    document = json.loads(body)
    if not isinstance(document, dict):
        return body  # vLLM says null to a client that went away
    _complete(document, refusal, parsed)
    return json.dumps(document, ensure_ascii=False).encode()


def _complete(document: dict[str, Any], refusal: str, parsed: bool) -> None:
    kind, item = document.get("type"), document.get("item")
    if kind == "message" and parsed:
        document["content"] = []
    if kind == "response.output_item.done" and isinstance(item, dict) and item.get("type") == "message":
        _say_in_message(item, refusal, parsed)
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


def _say_in_output(response: dict[str, Any], refusal: str, parsed: bool) -> None:
    """Add the refusal to the last message of a response's output; make one if it has none."""
    output = response.setdefault("output", [])
    messages = [item for item in output if isinstance(item, dict) and item.get("type") == "message"]
    if not messages:
        messages = [{"type": "message", "id": f"msg_{response.get('id', '')}", "role": "assistant", "content": []}]
        output += messages
    _say_in_message(messages[-1], refusal, parsed)


def _say_in_message(message: dict[str, Any], refusal: str, parsed: bool) -> None:
    said = [] if parsed else [part for part in message.get("content") or () if part.get("type") != "refusal"]
    message.update(status="incomplete", content=[*said, {"type": "refusal", "refusal": refusal}])
