"""Removals that the server carries out: what survives what."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from guards.forget_set import ForgetSet
from serve.control.removals import RemovalOrder, Removals
from serve.registry.records import NotReady, UnknownName
from serve.registry.store import Registry
from tests.serve.control.test_control import until

CONTENT = ForgetSet(name="a", aliases=("Orsolya Vendt",))
COMMAND = """
import json, os, pathlib, sys, time
place = pathlib.Path(next(each for each in sys.argv if each.startswith("--directory=")).split("=")[1])
(place / "progress.json").write_text(json.dumps({"doing": "Looking", "told": [os.environ["LETHE_KEY"]], "answers": 3}))
while not (place / "go").exists():
    time.sleep(0.01)
if (place / "go").read_text() == "fail":
    sys.exit("a bar\\nlethe: there is nothing to ask")
(place / "certificate.json").write_text("{}")
"""


class Rig:
    """A registry, a place where a server would listen, and a command that waits to be told how to end."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registry = Registry(path / "lethe.db")
        self.directory = path / "removals"
        self.commands: list[tuple[str, ...]] = []
        spawn = asyncio.create_subprocess_exec

        async def spawn_ours(*command: str, **options: Any) -> asyncio.subprocess.Process:
            self.commands.append(command)
            return await spawn(sys.executable, "-c", COMMAND, *command, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn_ours)

    @asynccontextmanager
    async def removals(self) -> AsyncIterator[Removals]:
        async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            made = Removals(self.directory, self.registry, f"http://127.0.0.1:{port}")
            try:
                yield made
            finally:
                await made.stop()

    def end(self, how: str) -> None:
        (self.directory / "a" / "go").write_text(how)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(tmp_path, monkeypatch)
    yield made
    made.registry.close()


def test_it_has_a_key_of_its_own_while_there_are_keys_and_no_longer(rig: Rig) -> None:
    async def main() -> None:
        async with rig.removals() as removals:
            rig.registry.create_key("chat", "somebody", actor="t")
            removals.submit(CONTENT, RemovalOrder(within="1s", reference=0.25))
            assert removals.describe("a")["status"] == "waiting"
            removals.run("a")
            await until(lambda: removals.describe("a")["answers"] == 3)
            shown = removals.describe("a")
            assert shown["status"] == "running" and shown["doing"] == "Looking" and shown["told"][0].startswith("lethe-")
            assert [key.label for key in rig.registry.stored_keys()] == ["somebody", "lethe: removal of a"]
            with pytest.raises(NotReady, match="being carried out"):
                await removals.strip("a")
            with pytest.raises(NotReady, match="another removal"):
                removals.submit(CONTENT, RemovalOrder(within="2s"))
            rig.end("well")
            await until(lambda: not removals.busy("a"))
            assert removals.describe("a")["certificate"] == {} and removals.describe("a")["status"] == "done"
            assert [key.label for key in rig.registry.stored_keys()] == ["somebody"]
            assert {"--within=1s", "--reference=0.25", "--yes"} <= set(rig.commands[0])

    asyncio.run(main())


def test_one_that_failed_says_why_and_the_same_order_again_begins_anew(rig: Rig) -> None:
    async def main() -> None:
        async with rig.removals() as removals:
            removals.submit(CONTENT, RemovalOrder())
            removals.run("a")
            await until(lambda: removals.describe("a")["status"] == "running")
            rig.end("fail")
            await until(lambda: removals.describe("a")["status"] == "failed")
            assert "there is nothing to ask" in removals.describe("a")["reason"]
            removals.resume({"a"})
            assert not removals.busy("a"), "it would fail again"
            removals.submit(CONTENT, RemovalOrder())
            rig.end("well")
            removals.run("a")
            await until(lambda: removals.describe("a")["status"] == "done")

    asyncio.run(main())


def test_one_that_a_crash_interrupted_goes_on_also_before_its_set_is_there(rig: Rig) -> None:
    async def main() -> None:
        async with rig.removals() as first:
            rig.registry.create_key("chat", "somebody", actor="t")
            first.submit(CONTENT, RemovalOrder())
            rig.registry.create_key("admin", "lethe: removal of a", actor="removal")  # which the crash has left
            (rig.directory / "gone").mkdir()
            (rig.directory / "gone" / "done.json").write_text("{}")
        async with rig.removals() as second:
            second.resume(set())
            assert second.busy("a") and second.names() == ["a"], "what belongs to a set that is gone is dropped"
            assert [key.label for key in rig.registry.stored_keys()] == ["somebody"]
            rig.end("well")
            await until(lambda: second.describe("a")["status"] == "done")

    asyncio.run(main())


def test_one_that_is_stopped_says_so_and_leaves_no_process_and_no_key(rig: Rig) -> None:
    async def main() -> None:
        async with rig.removals() as removals:
            rig.registry.create_key("chat", "somebody", actor="t")
            removals.submit(CONTENT, RemovalOrder())
            removals.run("a")
            await until(lambda: removals.describe("a")["status"] == "running")
            removals.pause("a")
            assert removals.describe("a")["status"] == "failed" and "on request" in removals.describe("a")["reason"]
            await removals.stop()
            assert [key.label for key in rig.registry.stored_keys()] == ["somebody"]

    asyncio.run(main())


def test_what_cannot_be_is_refused_with_a_reason(rig: Rig) -> None:
    nowhere = Removals(rig.directory, rig.registry, None)
    with pytest.raises(NotReady, match="lethe unlearn"):
        nowhere.submit(CONTENT, RemovalOrder())
    somewhere = Removals(rig.directory, rig.registry, "http://127.0.0.1:1")
    with pytest.raises(UnknownName, match="others"):
        somewhere.submit(CONTENT, RemovalOrder(neighbours="others"))
    with pytest.raises(ValueError, match="within"):
        RemovalOrder(within="soon")
    with pytest.raises(ValueError, match="name one of them"):
        RemovalOrder(goal="refuse", reference=0.3)
    with pytest.raises(ValueError, match="against"):
        RemovalOrder(against="file:///etc/passwd")
    for name in ("..", "a", "a/b"):
        with pytest.raises(UnknownName):
            somewhere.describe(name)
        with pytest.raises(UnknownName):
            somewhere.file(name, "job.json")
    somewhere.submit(CONTENT, RemovalOrder())
    assert json.loads((rig.directory / "a" / "job.json").read_text())["within"] == "45m"
    with pytest.raises(UnknownName, match="there may be"):
        somewhere.file("a", "job.json")
