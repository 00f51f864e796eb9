"""Forget sets over HTTP and from the command line: any form of file, what is refused unless forced, and the notes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from guards.errors import InvalidForgetSet
from guards.forget_set import ForgetSet
from serve.cli import app as command_line
from serve.cli import forget
from serve.http import admin_routes as admin
from serve.registry.snapshot import LOOPBACK
from serve.registry.store import Registry

CSV = {"content-type": "text/csv"}
LINES = {"content-type": "application/jsonl"}


class StoringControl:
    """Changes go straight to the registry: nothing is compiled."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.snapshot = registry.snapshot()

    async def create(self, content: ForgetSet, *, actor: str) -> int:
        return self._registry.create_set(content, actor=actor)

    async def replace(self, content: ForgetSet, *, actor: str) -> int:
        return self._registry.replace_set(content, [], actor=actor)

    def training(self, name: str) -> None:
        return None


@pytest.fixture
def served(tmp_path: Path) -> Any:
    registry = Registry(tmp_path / "lethe.db")
    app = FastAPI()
    nothing: Any = SimpleNamespace()
    control: Any = StoringControl(registry)
    admin.attach(app, control, registry, nothing, nothing, nothing)

    async def with_caller(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "lethe.caller": LOOPBACK}, receive, send)

    yield with_caller, registry
    registry.close()


@pytest.fixture
def call(served: Any) -> Callable[..., httpx.Response]:
    def send(method: str, path: str, **options: Any) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(served[0])
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000/lethe/v1") as client:
                return await client.request(method, path, **options)

        return asyncio.run(request())

    return send


def test_a_json_object_is_checked_as_a_file_is(call: Any) -> None:
    refused = call("POST", "/forget_sets", json={"name": "a", "phrases": ["the", "Maria Kowalczyk"]})
    assert refused.status_code == 400 and '"the" (' in refused.json()["error"]["problems"][0]
    added = call("POST", "/forget_sets", params={"force": "true"}, json={"name": "a", "phrases": ["the", "Maria Kowalczyk"]})
    assert added.status_code == 201 and added.json()["phrases"] == 2
    assert any('"the" occurs' in note for note in added.json()["notes"])
    plain = call("PUT", "/forget_sets/a", json={"phrases": ["Maria\u200b Kowalczyk"]})
    assert plain.status_code == 200 and "1 invisible character" in plain.json()["notes"][0]


def test_json_lines_and_a_column_of_a_csv_file_are_taken(call: Any, served: Any) -> None:
    lines = call("POST", "/forget_sets", params={"name": "a"}, content='{"phrase": "Jan Nowak"}\r', headers=LINES)
    assert lines.status_code == 201 and lines.json()["notes"] == []
    table = 'name;born\n"Kowalczyk, Maria";1984\n;1985\n'.encode("utf-16")
    wrong = call("PUT", "/forget_sets/a", content=table, headers=CSV)
    assert wrong.status_code == 400 and "columns name, born" in wrong.json()["error"]["message"]
    right = call("PUT", "/forget_sets/a", params={"column": "name", "as": "alias"}, content=table, headers=CSV)
    assert right.status_code == 200 and "1 empty cell" in right.json()["notes"][0]
    assert served[1].content("a").aliases == ("Kowalczyk, Maria",)
    assert call("POST", "/forget_sets", content=table, headers=CSV).status_code == 400, "no name"


@pytest.fixture
def lethe(served: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    class Client:
        """Runs each request of the command line in the app."""

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def __getattr__(self, method: str) -> Any:
            def send(path: str, **options: Any) -> httpx.Response:
                async def request() -> httpx.Response:
                    transport = httpx.ASGITransport(served[0])
                    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/lethe/v1") as client:
                        return await client.request(method.upper(), path, **options)

                return asyncio.run(request())

            return send

    monkeypatch.setattr(forget, "connect", Client)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(command_line, list(arguments), env={"COLUMNS": "200"})


def test_the_command_line_says_what_it_dropped_and_what_occurs_in_ordinary_text(lethe: Any, served: Any, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes('name,born\r\n"Kowalczyk, Maria",1984\r\n,\r\nbread,\r\n,2\r\n'.encode("utf-8-sig"))
    refused = lethe("forget", "add", "a", str(file))
    assert isinstance(refused.exception, InvalidForgetSet) and '--column "name"' in str(refused.exception)
    added = lethe("forget", "add", "a", str(file), "--column", "name")
    assert added.exit_code == 0, added.output
    assert "Note: 1 empty cell of column 'name' skipped" in added.output
    assert 'Note: "bread" occurs 3 times' in added.output
    assert served[1].content("a").phrases == ("Kowalczyk, Maria", "bread")


def test_the_command_line_forces_and_replaces(lethe: Any, served: Any, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\n".join(["Maria Kowalczyk", "the"]))
    options = ("forget", "add", "a", str(file), "--as", "phrase", "--replace")
    assert "--force" in str(lethe(*options).exception)
    for _ in range(2):
        assert lethe(*options, "--force").exit_code == 0
    assert served[1].content("a").phrases == ("Maria Kowalczyk", "the")
    many = tmp_path / "many.json"
    many.write_text(
        json.dumps(["bread", "onion", "salt", "flour", "sugar", "milk", "butter", "lemon", "garden", "kitchen", "bowl", "soup"])
    )
    said = lethe("forget", "add", "b", str(many), "--force").output
    assert said.count(" occurs ") == 10 and "more phrases occur in it" in said
