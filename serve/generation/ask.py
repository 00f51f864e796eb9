"""The one road by which the server asks itself: shadow answers, comparisons and scores are requests to vLLM's own app.

They go in behind admission, under a `RequestContext` of their own, and are answered as a client's would be. Keys and budgets are
the business of whoever asks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.types import ASGIApp, Message

from guards.errors import GuardError
from serve.request import RequestContext, admitted

END_WITHIN_S = 5.0
"""How long an answer that nobody waits for may take to end, before its task is cancelled outright."""


class NotAnswered(GuardError):
    """The app answered with an error. ``status``: of its answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class InternalRoad:
    """One per API process.

    Args:
        app: everything behind admission.
        owner: the application around it, which middlewares expect in a request's scope.
    """

    def __init__(self, app: ASGIApp, owner: object) -> None:
        self._app = app
        self._owner = owner

    async def status(self, path: str, body: bytes, request: RequestContext) -> int:
        """Have a body answered and throw the answer away. Returns the HTTP status."""
        status = 500
        async with aclosing(self._messages(path, body, request)) as messages:
            async for message in messages:
                status = message.get("status", status)
        return status

    async def whole(self, path: str, fields: Mapping[str, Any], request: RequestContext) -> dict[str, Any]:
        """The answer to a request that does not stream. Raises NotAnswered."""
        status, parts = 500, []
        async with aclosing(self._messages(path, json.dumps(fields).encode(), request)) as messages:
            async for message in messages:
                status = message.get("status", status)
                parts.append(message.get("body", b""))
        return _parsed(status, b"".join(parts))

    async def events(self, path: str, fields: Mapping[str, Any], request: RequestContext) -> AsyncGenerator[dict[str, Any], None]:
        """The server-sent events of a request that streams. Raises NotAnswered."""
        status, waiting = 500, b""
        async with aclosing(self._messages(path, json.dumps(fields).encode(), request)) as messages:
            async for message in messages:
                status = message.get("status", status)
                waiting += message.get("body", b"")
                if status >= 400:
                    continue
                *lines, waiting = waiting.split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        yield json.loads(line.removeprefix(b"data: "))
        if status >= 400:
            _parsed(status, waiting)

    async def _messages(self, path: str, body: bytes, request: RequestContext) -> AsyncGenerator[Message, None]:
        """What the app sends. Closed early, it tells the app that its client went away, as vLLM expects to be told."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"host", b"internal"),
            ],
            "server": None,
            "client": None,
            "app": self._owner,
            "state": {},
            "lethe.caller": request.caller,
        }
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        goes, waiting = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await goes.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            admitted.set(request)  # this task's own, and its children's
            try:
                await self._app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        answering = asyncio.create_task(answer())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await answering
        finally:
            goes.set()
            try:
                await asyncio.wait([answering], timeout=END_WITHIN_S)
            finally:
                if answering.cancel():  # for whatever does not listen
                    await asyncio.wait([answering], timeout=END_WITHIN_S)


def _parsed(status: int, body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = (
        json.loads(body) if body.startswith(b"{") else {"error": {"message": body[:500].decode("utf-8", "replace")}}
    )
    if status >= 400:
        raise NotAnswered(status, str(found.get("error", {}).get("message", found)))
    return found
