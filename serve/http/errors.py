"""What goes around an answer, whatever is in it: errors in each protocol's own envelope, headers, and signs of life.

vLLM writes some errors of ``/v1/messages`` in OpenAI's envelope, which Anthropic's clients cannot read; they are written anew here.
A stream that is held back says a comment now and then, so that no proxy takes the silence for a dead connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from starlette.types import Message, Send

Headers = list[tuple[bytes, bytes]]

ANTHROPIC = "/v1/messages"
_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_COMMENT = b": waiting\n\n"


def error_body(path: str, status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """An error in the envelope of the protocol that ``path`` belongs to."""
    if is_anthropic(path):
        kind = _ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


def is_anthropic(path: str) -> bool:
    return path == ANTHROPIC or path.startswith(ANTHROPIC + "/")


def with_own_errors(send: Send, path: str) -> Send:
    """Write errors anew that are not in the envelope of ``path``'s protocol."""
    if not is_anthropic(path):
        return send
    held: list[Message] = []

    async def write(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            held.append(message)
            return
        if not held:
            await send(message)
            return
        held.append(message)
        if message.get("more_body"):
            return
        start, *parts = held
        held.clear()
        body = _anthropic(b"".join(part.get("body", b"") for part in parts), start["status"])
        headers = [(name, value) for name, value in start.get("headers", []) if name.lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    return write


def _anthropic(body: bytes, status: int) -> bytes:
    try:
        error = json.loads(body)
    except ValueError:
        return error_body(ANTHROPIC, status, body.decode("utf-8", "replace"), "")
    inner = error.get("error", error) if isinstance(error, dict) else {}
    message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return error_body(ANTHROPIC, status, str(message or "the request failed"), "")


def without_body(send: Send) -> Send:
    """For HEAD: the headers of the answer to GET, and no body."""

    async def write(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return write


def cross_origin(origin: bytes | None, allowed: Sequence[str]) -> Headers:
    """What lets a page from elsewhere read an answer that did not come through the app, as the app's own middleware would."""
    if origin is None or not ({"*", origin.decode("latin-1")} & set(allowed)):
        return []
    return [(b"access-control-allow-origin", b"*" if "*" in allowed else origin), (b"vary", b"Origin")]


def with_headers(send: Send, request_id: str, origin: bytes | None) -> Send:
    """Our request id on every answer, readable for pages; and streams that proxies pass on as they come."""

    async def write(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"x-request-id"]
            headers.append((b"x-request-id", request_id.encode()))
            if origin is not None:
                headers.append((b"access-control-expose-headers", b"x-request-id"))
            if _streams(message):
                headers.append((b"x-accel-buffering", b"no"))
            message = {**message, "headers": headers}
        await send(message)

    return write


def _streams(start: Message) -> bool:
    content_type = next((value for name, value in start.get("headers", []) if name.lower() == b"content-type"), b"")
    return bytes(content_type).startswith(b"text/event-stream")


class SignsOfLife:
    """Says a comment on a stream on which nothing was said for a while, between two events and never inside one.

    Args:
        after_s: seconds of silence.
    """

    def __init__(self, send: Send, after_s: float) -> None:
        self._send = send
        self._after_s = after_s
        self._said = asyncio.Event()
        self._saying = asyncio.Lock()
        self._between_events = True
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        async with self._saying:
            await self._send(message)
        self._said.set()
        if message["type"] == "http.response.start":
            if _streams(message):
                self._task = asyncio.create_task(self._comment())
        elif message["type"] == "http.response.body":
            if body := message.get("body", b""):
                self._between_events = body.endswith((b"\n\n", b"\r\n\r\n"))
            if not message.get("more_body"):
                self.stop()

    def stop(self) -> None:
        """The answer is over, or its client has gone."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _comment(self) -> None:
        while True:
            self._said.clear()
            try:
                await asyncio.wait_for(self._said.wait(), self._after_s)
            except TimeoutError:
                async with self._saying:
                    if self._between_events:
                        try:
                            await self._send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                        except OSError:
                            return  # the client has gone, and the answer will be told
