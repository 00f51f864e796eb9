"""Faults of storage and abuse, on the running server with a set in force: closed or correct, and said what to do.

The state directory lies on a disk of its own where this process may mount one; filling it and mounting it read-only need that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from serve.default_model import NAME
from tests.vllm.asking import POTTER, SCHOOL, assert_free_of, text
from tests.vllm.conftest import Server


@pytest.fixture
def disk(server: Server) -> Path:
    """The state directory, if it is a disk of its own, which may be filled and taken away."""
    if not os.path.ismount(server.state):
        pytest.skip("this process may not mount a disk, and the machine's own is not to be filled")
    return server.state


@pytest.fixture
def in_force(forget: Any, client: openai.OpenAI) -> Callable[[], None]:
    """Puts POTTER in force; returns a check that no answer holds any of it."""
    forget(*POTTER)

    def holds() -> None:
        assert_free_of(text(client, SCHOOL), POTTER)

    holds()
    return holds


@pytest.fixture
def other(admin: httpx.Client) -> Iterator[str]:
    """A set that is not in force."""
    assert admin.post("/forget_sets", json={"name": "other", "phrases": ["Draco Malfoy"]}).status_code == 201
    wait_for(lambda: admin.get("/forget_sets/other").json()["artifacts"][0]["status"] == "ready")
    yield "other"
    assert admin.delete("/forget_sets/other").status_code == 200


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError("it never happened")


def fault(admin: httpx.Client) -> str | None:
    return admin.get("/revision").json()["fault"]


def refused(admin: httpx.Client, name: str) -> str:
    """Enabling a set must be refused now; returns why."""
    answer = admin.post(f"/forget_sets/{name}/enable")
    assert answer.status_code == 503, answer.text
    return str(answer.json()["error"]["message"])


def test_a_full_disk_changes_nothing_and_says_what_to_do(
    disk: Path, admin: httpx.Client, in_force: Callable[[], None], other: str
) -> None:
    before = admin.get("/revision").json()
    filler = disk / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65_536)
            file.flush()
    try:
        assert "the disk is full; free some space" in refused(admin, other)
        added = admin.post("/forget_sets", json={"name": "big", "phrases": [f"Tom Riddle {i}" for i in range(20_000)]})
        assert added.status_code == 503, added.text
        in_force()
        assert admin.get("/revision").json()["revision"] == before["revision"]
    finally:
        filler.unlink()
    assert admin.post(f"/forget_sets/{other}/enable").status_code == 200
    in_force()


def test_a_state_directory_that_may_only_be_read_changes_nothing_and_says_what_to_do(
    disk: Path, admin: httpx.Client, in_force: Callable[[], None], other: str
) -> None:
    wait_for(lambda: remounted(disk, "ro"))  # a transaction under way keeps it writable for a moment
    try:
        assert "writable" in refused(admin, other)
        in_force()
    finally:
        assert remounted(disk, "rw")
    assert admin.post(f"/forget_sets/{other}/enable").status_code == 200
    in_force()


def remounted(place: Path, how: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=False, capture_output=True).returncode == 0


def test_artifacts_that_are_changed_or_deleted_stay_in_force(server: Server, in_force: Callable[[], None]) -> None:
    files = sorted((server.state / "artifacts" / "phrases").glob("*.safetensors"))
    assert files
    kept = {file: file.read_bytes() for file in files}
    try:
        for i, file in enumerate(files):
            file.write_bytes(b"nothing") if i % 2 else file.unlink()
        in_force()
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


def test_a_damaged_database_leaves_in_force_what_is_and_refuses_changes(
    server: Server, admin: httpx.Client, in_force: Callable[[], None], other: str
) -> None:
    database = server.state / "lethe.db"
    whole = database.read_bytes()
    with database.open("r+b") as file:
        file.seek(4_096)
        file.write(b"\xa5" * (len(whole) - 4_096))
    try:
        wait_for(lambda: fault(admin))
        assert "lethe restore" in str(fault(admin))
        assert "lethe restore" in refused(admin, other)
        in_force()
        assert server.metric("lethe_registry_fault") == 1
    finally:
        database.write_bytes(whole)
    wait_for(lambda: fault(admin) is None)
    assert admin.post(f"/forget_sets/{other}/enable").status_code == 200


def test_yesterday_s_database_takes_nothing_out_of_force(
    server: Server, admin: httpx.Client, client: openai.OpenAI, in_force: Callable[[], None], other: str
) -> None:
    database = server.state / "lethe.db"
    yesterday = database.read_bytes()
    assert admin.post(f"/forget_sets/{other}/enable").status_code == 200  # since yesterday
    today, revision = database.read_bytes(), admin.get("/revision").json()["revision"]
    replace(database, yesterday)
    try:
        wait_for(lambda: fault(admin))
        assert "an older copy was put in its place" in str(fault(admin))
        assert "an older copy" in refused(admin, other)
        shown = admin.get("/revision").json()
        assert shown["revision"] == revision and other in shown["enabled"]
        assert_free_of(text(client, "Who is Draco Malfoy?"), ("Draco Malfoy",))
        in_force()
    finally:
        replace(database, today)
    wait_for(lambda: fault(admin) is None)
    assert admin.post(f"/forget_sets/{other}/disable").status_code == 200


def replace(file: Path, content: bytes) -> None:
    """Put another file in its place, as a copying program does."""
    beside = file.with_suffix(".copied")
    beside.write_bytes(content)
    shutil.copystat(file, beside)
    os.replace(beside, file)


def test_a_training_that_is_killed_says_so_and_leaves_the_server_as_it_is(
    server: Server, admin: httpx.Client, in_force: Callable[[], None]
) -> None:
    lessons = [{"question": f"Who is wizard {i}?", "answer": "Nobody knows him."} for i in range(20)]
    assert admin.post("/forget_sets", json={"name": "trained", "questions": lessons}).status_code == 201
    try:
        assert admin.post("/forget_sets/trained/assistant").status_code == 202
        found: list[psutil.Process] = []

        def begun() -> bool:
            assert server.process is not None
            children = psutil.Process(server.process.pid).children(recursive=True)
            found[:] = [each for each in children if "guards.contrastive.train" in " ".join(each.cmdline())]
            return bool(found)

        wait_for(begun)
        found[-1].send_signal(signal.SIGKILL)
        wait_for(lambda: admin.get("/forget_sets/trained").json()["training"]["status"] == "failed")
        assert "killed" in admin.get("/forget_sets/trained").json()["training"]["reason"]
        in_force()
    finally:
        assert admin.delete("/forget_sets/trained").status_code == 200


def test_many_who_throw_switches_while_many_stream_break_neither(
    server: Server, admin: httpx.Client, in_force: Callable[[], None]
) -> None:
    for i in range(8):
        assert admin.post("/forget_sets", json={"name": f"switch-{i}", "phrases": [f"Alohomora {i}"]}).status_code == 201
    before, failures = admin.get("/revision").json()["revision"], list[str]()

    def throw(number: int) -> int:
        changes = 0
        with httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=300) as client:
            for i in range(4):
                action = "enable" if (number + i) % 2 else "disable"
                answer = client.post(f"/forget_sets/switch-{number % 8}/{action}")
                if answer.status_code != 200:
                    failures.append(answer.text)
                changes += 1
        return changes

    def stream(number: int) -> str:
        body = {"model": NAME, "messages": [{"role": "user", "content": SCHOOL}], "max_tokens": 48, "stream": True, "seed": number}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=300) as answer:
            assert answer.status_code == 200
            said = answer.read().decode()
        assert "data: [DONE]" in said and '"error"' not in said
        return said

    try:
        with ThreadPoolExecutor(48) as pool:
            streams = [pool.submit(stream, number) for number in range(16)]
            changes = [pool.submit(throw, number) for number in range(32)]
            said = [each.result() for each in streams]
            assert sum(each.result() for each in changes) == 128
        assert not failures
        pieces = ["".join(piece.split('"')[0] for piece in each.split('"content":"')[1:]) for each in said]
        for piece in pieces:
            assert piece
            assert_free_of(piece, POTTER)
        rows = admin.get("/audit", params={"after": before, "limit": 1_000}).json()
        assert rows["intact"]
        assert [row["revision"] for row in rows["data"]] == list(range(before + 1, before + 1 + len(rows["data"])))
        state = {f"switch-{i}": False for i in range(8)}
        for row in rows["data"]:
            state[row["subject"]] = row["action"] == "forget_set.enable"
        shown = admin.get("/revision").json()
        assert {name for name, enabled in state.items() if enabled} == {n for n in shown["enabled"] if n.startswith("switch-")}
        in_force()
    finally:
        for i in range(8):
            assert admin.delete(f"/forget_sets/switch-{i}").status_code == 200


def test_two_hundred_clients_that_go_away_leave_nothing_running(server: Server, in_force: Callable[[], None]) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": SCHOOL}], "max_tokens": 400, "ignore_eos": True, "stream": True}

    def go_away(number: int) -> None:
        timeout = httpx.Timeout(300, read=0.3 + number % 5 / 5)
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=timeout) as client:
            fields = body if number % 2 else {**body, "stream": False, "n": 4}
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=fields) as answer:
                for _ in answer.iter_bytes():
                    break

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(go_away, range(200)))
    wait_for(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0, 120)
    in_force()
