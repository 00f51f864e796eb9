"""Admission: every request is checked before vLLM sees it, and gets its snapshot.

Deny by default: a route that is not named here answers 403, a body field that could reach past a guard answers 400, a caller
without a key answers 401 once keys exist. What passes carries an `AdmittedRequest` in a context variable, down to the choke point.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from guards.errors import InvalidJson, InvalidPolicy
from guards.policy import DEFAULT, Policy
from guards.strict_json import parse_object, shorten
from guards.types import Plan, TextPlan
from serve.api import refusal
from serve.api.budgets import Budgets, OverBudget
from serve.api.dialects import normalise, wants_json
from serve.api.envelopes import SignsOfLife, cross_origin, error_body, with_headers, with_own_errors, without_body
from serve.api.grammars import TooLarge, check_size
from serve.api.hits import Hit, RecentHits
from serve.api.probes import Probes, TooManyProbes
from serve.experiment import ARM_HEADER, InvalidExperiment
from serve.registry.snapshot import LOOPBACK, Caller, Scope, Snapshot
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.api.experiments import Entry, LiveExperiments

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ADMIN_PREFIX = "/lethe/v1"
GENERATING = {
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
}
ANNOUNCED = {"/v1/chat/completions", "/v1/messages"}
"""Streams in which vLLM sends a first chunk without text: the role."""
OPEN = {"GET /health", "GET /ping", "POST /ping"}
"""Need no key: what a load balancer asks."""
ALLOWED = {
    *(f"POST {path}" for path in GENERATING),
    "POST /v1/messages/count_tokens",
    "GET /v1/models",
    "GET /v1/models/{id}",
    "GET /version",
    "GET /load",
    "GET /metrics",
}
COMPARE = f"POST {ADMIN_PREFIX}/compare"
OWN_SCOPES: dict[str, Scope] = {COMPARE: "compare", f"POST {ADMIN_PREFIX}/feedback": "chat"}
"""Of our own routes, those that need less than an operator's key."""
RETRY_AFTER_S = 5
END_WITHIN_S = 5.0
"""How long an answer that nobody waits for may take to end, before its task is cancelled outright."""
REFUSED_FIELDS = (
    "vllm_xargs",
    "extra_args",
    "cache_salt",
    "priority",
    "prompt_embeds",
    "chat_template",
    "lora_request",
    "kv_transfer_params",
    "ec_transfer_params",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_payload",
    "return_mm_kwargs",
    "request_id",
    "session_id",
    "data_parallel_rank",
    "prompt_logprob_token_ids",
    "trace_decode_token_ids",
    "previous_input_messages",
)
"""Fields that choose K/V, adapters, templates, scheduling or ids: the server's business. None and defaults of no effect pass."""
CHOOSES_NOTHING = ("policy", "lethe_policy", "forget_set", "forget_sets", "guards")
"""Fields that look as if they chose a guard. Passed over in silence, they would leave their sender in the belief that they do."""
STORING = ("store", "background", "previous_response_id", "conversation")
"""Fields of ``/v1/responses`` that need responses to be kept. What is kept would outlive the removal of what it says."""
MOST_TEMPLATE_CHARACTERS = 64
"""Of a value of ``chat_template_kwargs``."""
PROXY_HEADERS = (b"forwarded", b"via", b"x-real-ip")
"""With ``x-forwarded-*``: what proxies add, who may stand on this machine and speak for anybody."""
STRIPPED_HEADERS = {b"x-request-id", b"x-data-parallel-rank", b"x-session-id", b"x-vllm-priority"}
_NO_EFFECT: tuple[Any, ...] = (None, False, 0, "", {}, [])


@dataclass
class Observation:
    """How a request is answered, as the choke point sees it."""

    started: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None  # of a stream, from `started`
    total_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""  # of all choices
    readable: bool = True  # whether ``text`` is what was said: beam search makes no text here
    failed: bool = False  # an error ended it, perhaps after its status was sent


@dataclass
class AdmittedRequest:
    """What admission decided. Constant from here on, but for what the choke point notes: blocked, fired, hits, observation."""

    caller: Caller
    policy: Policy
    plan: Plan
    text: TextPlan | None = None
    has_tools: bool = False
    blocked: bool = False  # an output was ended by a guard, so the response must say so
    fired: list[str] = field(default_factory=list)  # what guards did, as "guard action", in order
    hits: list[Hit] = field(default_factory=list)  # what they found, and where
    observation: Observation = field(default_factory=Observation)
    entry: Entry | None = None  # its place in an experiment
    in_shadow: bool = False  # nobody is shown the answer
    announced: bool = False  # its stream begins with a chunk that says who speaks, which need not wait for the first word
    probe: str | None = None  # what its sender learns if a guard ends the answer (see `serve.api.probes`)


admitted: ContextVar[AdmittedRequest | None] = ContextVar("admitted", default=None)
"""The request that the running task serves; None outside of one."""


class Refused(Exception):
    """A request that goes no further. Becomes an error in its protocol's envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.kind, self.retry_after_s = status, message, param, kind, retry_after_s


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
        owner: the application around ``app``, which puts itself into a request's scope before this is called.
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
        owner: object = None,
    ) -> None:
        self._app = app
        self._open_without_keys = open_without_keys
        self._snapshot = snapshot
        self._served_names = served_names
        self._settings = settings
        self._allowed = ALLOWED | set(settings.allow_routes)
        self._experiments = experiments
        self._hits = hits
        self._budgets = budgets
        self._probes = probes
        self._allowed_origins = allowed_origins
        self._owner = owner
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

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})
            return
        request_id, path = uuid.uuid4().hex, _route(scope)
        named = dict(scope["headers"])
        send = with_headers(with_own_errors(send, path), request_id, named.get(b"origin"))
        if scope["method"] == "HEAD":  # whatever may be got can be asked for without its body
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

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, request_id: str, path: str) -> None:
        method = scope["method"]
        headers = [(name, value) for name, value in scope["headers"] if name not in STRIPPED_HEADERS]
        scope = {**scope, "headers": headers}
        named = dict(headers)
        preflight = method == "OPTIONS" and b"origin" in named and b"access-control-request-method" in named
        if self._draining and (path in GENERATING or f"{method} {path}" in (*OPEN, COMPARE)):  # balancers look elsewhere
            raise Refused(503, "this server is about to stop; ask another", kind="service_unavailable", retry_after_s=RETRY_AFTER_S)
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
        if path in GENERATING:
            self._refuse_too_many()
        if method in ("POST", "PUT"):
            limits = self._settings
            body = await _read(receive, limits.max_admin_body_bytes if needed == "admin" else limits.max_body_bytes)
            # A body may take its time; what counts is what is in force, and who the caller is, once it is here.
            caller, snapshot = self._identify(headers, needed)
            if not admin:
                fields = _parse(body)
                request = self._check_fields(fields, caller, snapshot, path, named)
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
        if f"{method} {path}" == COMPARE:
            self._within_budget(caller)
        if request is None or path not in GENERATING:
            token = admitted.set(request)
            try:
                await self._app(scope, receive, send)
            finally:
                admitted.reset(token)
            return
        self._refuse_too_many()  # a body may take its time
        self._within_budget(caller)
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

    async def answer_unseen(self, path: str, body: bytes, request: AdmittedRequest) -> int:
        """Answer a body that was admitted before under another plan, and show the answer to nobody. Returns the HTTP status.

        When this is cancelled, the app is told that its client went away, as vLLM expects to be told; it ends the answer.
        """
        request_id = uuid.uuid4().hex
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
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
            "headers": [*headers, (b"host", b"shadow"), (b"x-request-id", request_id.encode())],
            "server": None,
            "client": None,
            "app": self._owner,
            "state": {},
            "lethe.caller": request.caller,
        }

        async def nobody(_: Message) -> None:
            pass

        goes = asyncio.Event()

        async def until_it_goes() -> Message:
            await goes.wait()
            return {"type": "http.disconnect"}

        client = _Client(nobody, _replay(body, until_it_goes))
        admitted.set(request)  # this task's own, and its children's
        answering = asyncio.ensure_future(self._app(scope, client.receive, client))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            goes.set()
            await asyncio.wait([answering], timeout=END_WITHIN_S)
            answering.cancel()  # for whatever does not listen
            raise
        return client.status

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

    def _identify(self, headers: list[tuple[bytes, bytes]], needed: Scope | None) -> tuple[Caller, Snapshot]:
        """Who calls, and what is in force for them, now."""
        named, snapshot = dict(headers), self._snapshot()
        found = (snapshot.caller(secret, open_without_keys=self._open_without_keys) for secret in _secrets(named))
        caller = next((each for each in found if each is not None), None)
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
        if caller is LOOPBACK and not _same_machine(named):
            raise Refused(
                403,
                "while no key exists, only programs on this machine are served, not web pages and not what a proxy passes on; "
                "make a key with `lethe key create`",
                kind="permission_error",
            )
        if needed is not None:
            _require(caller, needed)
        return caller, snapshot

    def _check_fields(
        self, fields: dict[str, Any], caller: Caller, snapshot: Snapshot, path: str, headers: dict[bytes, bytes]
    ) -> AdmittedRequest:
        """Apply the rules for bodies; ``fields["model"]`` becomes the base model's name."""
        policy_name = self._select_policy(fields, caller)
        entry = None
        if ARM_HEADER in headers:
            _require(caller, "compare")
        if policy_name is None and path in GENERATING:
            try:
                entry = self._experiments.enter(snapshot, fields, headers, caller)
            except InvalidExperiment as error:  # an arm was forced that does not exist, by somebody who may know
                raise Refused(404, str(error), kind="not_found_error") from None
        policy_name = entry.arm.policy if entry is not None else policy_name or DEFAULT
        try:
            plan = snapshot.plan(policy_name)
        except InvalidPolicy as error:
            raise Refused(404, str(error), param="model", kind="not_found_error") from None
        self._check_template(fields.get("chat_template_kwargs"))
        for name in CHOOSES_NOTHING:
            if name in fields:
                raise Refused(
                    400,
                    f"field {name!r} chooses no guard; the model's name chooses a policy, as in {self._served_names[0]}:strict",
                    param=name,
                )
        for name in STORING:
            if path == "/v1/responses" and fields.get(name) not in _NO_EFFECT:
                raise Refused(
                    400,
                    f"field {name!r} needs stored responses, which are not kept here; send the whole conversation as input",
                    param=name,
                )
        items = fields.get("input")
        if isinstance(items, list) and any(isinstance(item, dict) and item.get("type") == "item_reference" for item in items):
            raise Refused(
                400,
                "an item_reference needs stored responses, which are not kept here; send the items themselves "
                '(AI SDK: "store": false, or its chat models)',
                param="input",
            )
        for name in REFUSED_FIELDS:
            if fields.get(name) not in _NO_EFFECT:
                raise Refused(400, f"field {name!r} is set by the server and not accepted from clients; remove it", param=name)
        # In an experiment, what one arm would refuse all of them refuse: who fails must not depend on the arm.
        plans = [plan] if entry is None else [snapshot.plan(arm.policy) for arm in entry.experiment.order.arms]
        if any(each.engages for each in plans):
            for name in ("prompt_logprobs", "echo"):
                if fields.get(name) is not None and fields[name] is not False:
                    raise Refused(400, f"field {name!r} is not available under policy {policy_name!r}; remove it", param=name)
        if not isinstance(fields.get("structured_outputs", {}), dict | None):
            raise Refused(400, 'structured_outputs must be an object such as {"choice": [...]}', param="structured_outputs")
        try:
            check_size(fields)
        except TooLarge as error:
            raise Refused(400, str(error), param=str(error).split(" ", 1)[0]) from None
        self._check_caps(fields, path)
        normalise(path, fields)
        try:
            probe = self._probes.check(caller, fields, plan) if path in GENERATING else None
        except TooManyProbes as probes:
            raise Refused(429, probes.message, kind="rate_limit_error", retry_after_s=probes.retry_after_s) from None
        text, has_tools = snapshot.text_plans[policy_name], bool(fields.get("tools"))
        policy = snapshot.policies[policy_name]
        announced = path in ANNOUNCED
        return AdmittedRequest(caller, policy, plan, text, has_tools, entry=entry, announced=announced, probe=probe)

    def _check_template(self, chosen: Any) -> None:
        """Let switches of the chat template pass that say nothing: what they name is an operator's list."""
        if chosen in _NO_EFFECT:
            return
        name, allowed = "chat_template_kwargs", self._settings.template_switches
        if not isinstance(chosen, dict):
            raise Refused(400, f'{name} must be an object such as {{"enable_thinking": false}}', param=name)
        for key, value in chosen.items():
            if key not in allowed:
                raise Refused(
                    400,
                    f"{name} may hold {', '.join(allowed)} here, not {shorten(key)}; remove it, or ask the operator to add it to "
                    "LETHE_TEMPLATE_SWITCHES",
                    param=name,
                )
            if not isinstance(value, bool | int | float | str | None) or len(str(value)) > MOST_TEMPLATE_CHARACTERS:
                raise Refused(400, f"{name}.{key} must be a switch, a number or a word, not {shorten(value)}", param=name)

    def _select_policy(self, fields: dict[str, Any], caller: Caller) -> str | None:
        """The policy that a request names; None if it names none."""
        model = fields.get("model")
        if not isinstance(model, str) or model in self._served_names:
            return None
        base, _, policy = model.rpartition(":")
        if base not in self._served_names:
            return None  # vLLM answers 404 with the names that it serves
        if policy != DEFAULT:
            _require(caller, "compare")
        fields["model"] = base
        return policy

    def _check_caps(self, fields: dict[str, Any], path: str) -> None:
        limits = self._settings
        for name, limit in (("n", limits.max_choices), ("best_of", limits.max_choices)):
            value = fields.get(name)
            if isinstance(value, int) and value > limit:
                raise Refused(400, f"{name}={value} exceeds this server's limit of {limit}", param=name)
        for name, limit in (
            ("logit_bias", limits.max_logit_bias),
            ("bad_words", limits.max_logit_bias),
            ("messages", limits.max_prompts if path.endswith("/batch") else limits.max_messages),
            ("input", limits.max_messages),
            ("prompt", limits.max_prompts),
        ):
            value = fields.get(name)
            if name == "prompt" and isinstance(value, list) and value and isinstance(value[0], int):
                continue  # one prompt, as token ids
            if isinstance(value, list | dict) and len(value) > limit:
                raise Refused(400, f"{name} has {len(value)} entries, this server's limit is {limit}", param=name)


def _require(caller: Caller, scope: Scope) -> None:
    if scope not in caller.scopes:
        raise Refused(
            403, f"this needs a key of scope {scope!r}; {caller.name} has {sorted(caller.scopes)}", kind="permission_error"
        )


def _secrets(headers: dict[bytes, bytes]) -> list[str | None]:
    """The keys in the Authorization header and in Anthropic's ``x-api-key``: some clients send both, and mean one."""
    scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
    found = [secret.strip().decode("latin-1")] if scheme.lower() == b"bearer" else []
    found += [headers[b"x-api-key"].decode("latin-1")] if b"x-api-key" in headers else []
    return [*found] or [None]


def _route(scope: MutableMapping[str, Any]) -> str:
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


def _same_machine(headers: dict[bytes, bytes]) -> bool:
    """Was this sent by a program on this machine, not by a web page that a browser on it has open, and not through a proxy on it?

    While no key exists, being here is what lets a caller in. A page from elsewhere can make a browser send requests here, and can
    make its own name resolve to this address; the headers that browsers add tell.
    """
    if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return False
    if any(name in PROXY_HEADERS or name.startswith(b"x-forwarded-") for name in headers):
        return False
    try:
        origin = urlsplit(headers.get(b"origin", b"").decode("latin-1")).hostname
        host = urlsplit("//" + headers.get(b"host", b"localhost").decode("latin-1")).hostname
    except ValueError:  # no address at all
        return False
    return all(is_loopback(name) for name in (origin, host) if name is not None) and headers.get(b"origin") != b"null"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine and nothing else."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
