"""Admission: every request is checked before vLLM sees it, and gets its snapshot.

What `rules` lets pass carries a `RequestContext` in a context variable, down to the choke point. When the answer has gone out, what
it used and what guards did is noted.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guards.errors import InvalidJson
from guards.strict_json import parse_object
from serve.experiments.live import LiveExperiments
from serve.hits import RecentHits
from serve.http import refusal
from serve.http.budgets import Budgets, OverBudget
from serve.http.dialects import wants_json
from serve.http.errors import SignsOfLife, cross_origin, error_body, with_headers, with_own_errors, without_body
from serve.http.probes import Probes
from serve.http.rules import (
    ADMIN_PREFIX,
    ALLOWED,
    COMPARE,
    GENERATING,
    OPEN,
    OWN_SCOPES,
    Refused,
    Rules,
    require,
    same_machine,
)
from serve.registry.snapshot import LOOPBACK, Caller, KeyScope, Snapshot
from serve.request import admitted
from serve.settings import Settings

RETRY_AFTER_S = 5
STRIPPED_HEADERS = {b"x-request-id", b"x-data-parallel-rank", b"x-session-id", b"x-vllm-priority"}


class Admission:
    """ASGI middleware around the whole app.

    Args:
        snapshot: returns what is in force now.
        served_names: names of the base model.
        open_without_keys: the server is bound to the loopback interface only.
        experiments: those that requests may take part in.
        hits: where what guards find is kept for operators.
        budgets: what each key may use.
        probes: how often each may ask what is forgotten.
        allowed_origins: of web pages that may read answers, as vLLM's ``--allowed-origins``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        snapshot: Callable[[], Snapshot],
        served_names: list[str],
        settings: Settings,
        open_without_keys: bool,
        experiments: LiveExperiments,
        hits: RecentHits,
        budgets: Budgets,
        probes: Probes,
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._open_without_keys = open_without_keys
        self._snapshot = snapshot
        self._settings = settings
        self._allowed = ALLOWED | set(settings.allow_routes)
        self._experiments = experiments
        self._hits = hits
        self._budgets = budgets
        self._probes = probes
        self._rules = Rules(settings, served_names, experiments, probes)
        self._allowed_origins = allowed_origins
        self.under_way = 0
        """Requests that are being answered."""
        self._ended = asyncio.Event()
        self._draining = False

    def drain(self) -> None:
        """Answer what is under way and nothing more: the server is about to stop."""
        self._draining = True

    async def drained(self) -> None:
        """Wait until nothing is under way."""
        while self.under_way:
            self._ended.clear()
            await self._ended.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})
            return
        request_id, path = uuid.uuid4().hex, _route(scope)
        named = dict(scope["headers"])
        send = with_headers(with_own_errors(send, path), request_id, named.get(b"origin"))
        if scope["method"] == "HEAD":  # every GET route also answers HEAD
            scope, send = {**scope, "method": "GET"}, without_body(send)
        try:
            await self._admit(scope, receive, send, request_id, path)
        except Refused as refused:
            body = error_body(path, refused.status, refused.message, refused.kind, refused.param)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += cross_origin(named.get(b"origin"), self._allowed_origins)
            if refused.status == 401:
                headers.append((b"www-authenticate", b"Bearer"))
            if refused.retry_after_s is not None:
                headers.append((b"retry-after", str(refused.retry_after_s).encode()))
            await send({"type": "http.response.start", "status": refused.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _admit(self, scope: Scope, receive: Receive, send: Send, request_id: str, path: str) -> None:
        method = scope["method"]
        headers = [(name, value) for name, value in scope["headers"] if name not in STRIPPED_HEADERS]
        scope = {**scope, "headers": headers}
        named = dict(headers)
        preflight = method == "OPTIONS" and b"origin" in named and b"access-control-request-method" in named
        if f"{method} {path}" in OPEN:
            self._refuse_while_draining()  # balancers look elsewhere
        if preflight or f"{method} {path}" in OPEN:
            await self._app(scope, receive, send)
            return
        admin = path.startswith(ADMIN_PREFIX + "/")
        needed = OWN_SCOPES.get(f"{method} {path}", "admin") if admin else None
        if f"{method} {path}" == "GET /metrics":
            needed = "compare"  # its labels name policies and arms
        caller, snapshot = self._identify(headers, needed)
        if not admin and f"{method} {_generic(path)}" not in self._allowed:
            raise Refused(
                404,
                f"{method} {path} is not served here; an operator can allow routes of vLLM with LETHE_ALLOW_ROUTES",
                kind="not_found_error",
            )
        request = None
        if path in GENERATING or f"{method} {path}" == COMPARE:
            self._refuse_while_draining()
            self._refuse_too_many()
        if method in ("POST", "PUT"):
            limits = self._settings
            body = await _read(receive, limits.max_admin_body_bytes if needed == "admin" else limits.max_body_bytes)
            # A body may take its time; what counts is what is in force, and who the caller is, once it is here.
            caller, snapshot = self._identify(headers, needed)
            if not admin:
                fields = _parse(body)
                request = self._rules.check(fields, caller, snapshot, path, named)
                body = json.dumps(fields).encode()
                headers = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
                headers += [(b"content-length", str(len(body)).encode()), (b"x-request-id", request_id.encode())]
                scope["headers"] = headers
                checked = request
                parsed = wants_json(fields)
                send = refusal.reporting(send, checked.policy.refusal, lambda: checked.blocked, parsed=parsed)
            client = _Client(send, _replay(body, receive))
            send, receive = client, client.receive
        scope["lethe.caller"] = caller
        comparing = f"{method} {path}" == COMPARE
        if comparing or path in GENERATING:
            self._refuse_while_draining()  # a body may take its time
            self._refuse_too_many()
            self._within_budget(caller)
        if request is None or path not in GENERATING:
            self.under_way += comparing
            token = admitted.set(request)
            try:
                await self._app(scope, receive, send)
            finally:
                admitted.reset(token)
                self.under_way -= comparing
                self._ended.set()
            return
        self.under_way += 1
        self._experiments.shadow.client_comes()
        token = admitted.set(request)
        alive = SignsOfLife(send, self._settings.comment_after_s)
        try:
            await self._app(scope, receive, alive)
        finally:
            alive.stop()
            self.under_way -= 1
            self._ended.set()
            admitted.reset(token)
            if request.probe is not None and request.blocked:
                self._probes.ended(caller, request.probe)
            self._budgets.spent(caller, request.observation.prompt_tokens + request.observation.tokens)
            request.observation.total_s = request.observation.total_s or time.perf_counter() - request.observation.started
            self._experiments.shadow.client_goes()
            if request.hits:
                plan = request.plan
                self._hits.keep(request_id, caller.name, plan.policy, plan.revision, request.hits, refused=request.blocked)
            self._experiments.completed(request, client.status if client.has_all else None, request_id, path, body)

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise Refused(503, "this server is about to stop; ask another", kind="service_unavailable", retry_after_s=RETRY_AFTER_S)

    def _refuse_too_many(self) -> None:
        if self.under_way >= self._settings.max_under_way:
            raise Refused(
                429,
                f"{self.under_way:,} requests are under way or wait, this server's limit; try again later",
                kind="rate_limit_error",
                retry_after_s=RETRY_AFTER_S,
            )

    def _within_budget(self, caller: Caller) -> None:
        try:
            self._budgets.admit(caller)
        except OverBudget as over:
            raise Refused(429, over.message, kind="rate_limit_error", retry_after_s=over.retry_after_s) from None

    def _identify(self, headers: list[tuple[bytes, bytes]], needed: KeyScope | None) -> tuple[Caller, Snapshot]:
        """Who calls, and what is in force for them, now."""
        named, snapshot = dict(headers), self._snapshot()
        found = (snapshot.caller(secret, open_without_keys=self._open_without_keys) for secret in _secrets(named))
        known = [each for each in found if each is not None]
        caller = next((each for each in known if not each.expired), known[0] if known else None)
        if caller is None:
            raise Refused(
                401,
                "a key is needed: send 'Authorization: Bearer <key>'; make one with `lethe key create`",
                kind="authentication_error",
            )
        if caller.expired:
            raise Refused(
                401,
                f"{caller.name} expired at {caller.limits.expires_at}; make another with `lethe key create`",
                kind="authentication_error",
            )
        if caller is LOOPBACK and not same_machine(named):
            raise Refused(
                403,
                "while no key exists, only programs on this machine are served, not web pages and not what a proxy passes on; "
                "make a key with `lethe key create`",
                kind="permission_error",
            )
        if needed is not None:
            require(caller, needed)
        return caller, snapshot


def _secrets(headers: dict[bytes, bytes]) -> list[str | None]:
    """The keys in the Authorization header and in Anthropic's ``x-api-key``: some clients send both, and mean one."""
    scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
    found = [secret.strip().decode("latin-1")] if scheme.lower() == b"bearer" else []
    found += [headers[b"x-api-key"].decode("latin-1")] if b"x-api-key" in headers else []
    return [*found] or [None]


def _route(scope: Scope) -> str:
    """The path without what a proxy put before it (``--root-path``)."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _generic(path: str) -> str:
    return re.sub(r"^/v1/(responses/[^/]+|models/.+)", lambda found: f"/v1/{found[1].split('/')[0]}/{{id}}", path)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        return parse_object(body) if body.strip() else {}
    except InvalidJson as error:
        raise Refused(400, f"the body cannot be read: {error}") from None


class _Client:
    """Passes messages on both ways, and notes the status of the answer and whether the client was there for all of it.

    Of a client that is gone, vLLM's handlers return nothing, and it is sent as a whole answer all the same.
    """

    def __init__(self, send: Send, receive: Receive) -> None:
        self._send, self._receive = send, receive
        self.status = 500
        self._sent, self._gone = False, False

    @property
    def has_all(self) -> bool:
        return self._sent and not self._gone

    async def receive(self) -> Message:
        message = await self._receive()
        self._gone |= message["type"] == "http.disconnect" and not self._sent
        return message

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self._sent = not message.get("more_body", False)
        await self._send(message)


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client went away before the body was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise Refused(413, f"the body is larger than {limit:,} bytes, this server's limit")
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # disconnects
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
