"""Admission around an app that notes what reaches it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from guards.policy import BUILT_IN
from guards.suppression.automaton import compile_phrases
from guards.suppression.vocabulary import Vocabulary
from serve.hits import RecentHits
from serve.http.budgets import Budgets
from serve.http.middleware import Admission
from serve.http.probes import Probes
from serve.registry.snapshot import Key, Snapshot, digest_secret
from serve.registry.usage import Usage
from serve.request import admitted
from serve.settings import Settings
from tests.plans import made
from tests.serve.experiments.live import live_experiments

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
