"""What the check scripts share: where the server is, the questions, and one JSON line a check. Standard library only.

A check is a function. Returning means that the client did what its users rely on; what it returns is the detail of the line.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import time
import urllib.request
from collections.abc import Callable
from typing import Any

URL = os.environ.get("LETHE_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("LETHE_KEY", "none needed")
MODEL = os.environ.get("LETHE_MODEL", "smollm2-135m-instruct")

QUESTION = "What is the capital of France?"
TURNS = (QUESTION, "The capital of France is Paris.", "And of Italy?")
BANNED = "Harry Potter"
"""A phrase that the runner has put in force."""
REFUSAL = "I cannot continue this answer."
CITIES = ["Paris", "Rome"]
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
BANNED_SCHEMA = {**CITY_SCHEMA, "properties": {"city": {"type": "string", "enum": [BANNED]}}}
"""The only answer that this schema allows is the phrase in force: a guard has to end it."""

_loop = asyncio.new_event_loop()


def check(api: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Run a function now, and print what became of it as the check of the function's name."""

    def run(function: Callable[[], Any]) -> Callable[[], Any]:
        started = time.monotonic()
        try:
            detail = function()
            if inspect.iscoroutine(detail):
                detail = _loop.run_until_complete(detail)
            line = {"ok": True, "detail": detail or ""}
        except Exception as error:  # noqa: BLE001 (whatever the client throws is what its user would see)
            line = {"ok": False, "detail": f"{type(error).__name__}: {error}"[:4000]}
        _print(api, function.__name__, **line, seconds=round(time.monotonic() - started, 2))
        return function

    return run


def not_offered(api: str, name: str, reason: str) -> None:
    """The client has no way to do this."""
    _print(api, name, ok=None, detail=reason)


def equal(found: Any, expected: Any) -> None:
    assert found == expected, f"expected {expected!r}, found {found!r}"


def answered() -> int:
    """How many requests to generate the server has answered: tells whether a client retried."""
    return int(_metric("http_requests_total", 'handler="/v1/'))


def wait_until_idle(within_s: float = 20) -> None:
    """Returns when nothing runs in the engine; what a client has left must end."""
    deadline = time.monotonic() + within_s
    while running := _metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline, f"{running:g} requests still run {within_s:g} s after the client left"
        time.sleep(0.2)


def wait_until_running(within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not _metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "the request never ran"
        time.sleep(0.05)


def _metric(name: str, label: str = "") -> float:
    request = urllib.request.Request(f"{URL}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")) and label in line)


def _print(api: str, name: str, **line: Any) -> None:
    print(json.dumps({"api": api, "check": name, **line}, default=str), flush=True)
