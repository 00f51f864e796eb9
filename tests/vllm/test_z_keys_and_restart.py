"""Keys, routes and crashes. Last, because it restarts the shared server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.default_model import NAME
from serve.http.rules import ADMIN_PREFIX, ALLOWED, OPEN, OWN_SCOPES
from serve.registry.store import Registry
from tests.vllm.asking import FRANCE, POTTER, SCHOOL, assert_free_of, text
from tests.vllm.conftest import Server

LETHE = str(Path(sys.executable).parent / "lethe")


@pytest.fixture
def keys(server: Server) -> Any:
    """A key of each scope; from here on the server demands one."""
    registry = Registry(server.directory / "state" / "lethe.db")
    made = {scope: registry.create_key(scope, "test", actor="test") for scope in ("chat", "compare", "admin")}
    time.sleep(1.5)
    yield {scope: secret for scope, (_, secret) in made.items()}
    for key_id, _ in made.values():
        registry.revoke_key(key_id, actor="test")
    registry.close()
    time.sleep(1.5)


def routes(server: Server) -> set[tuple[str, str]]:
    """Every (method, path) that the app really has, as vLLM logged them at start."""
    log = next(server.directory.glob(f"server-{server.port}.log")).read_text()
    found = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", log)
    return {(method, path) for path, methods in found for method in methods.split(", ") if method not in ("HEAD", "OPTIONS")}


def test_without_a_key_every_route_is_closed_but_health(server: Server, keys: dict[str, str]) -> None:
    walked = routes(server)
    assert len(walked) > 30
    for method, path in walked:
        answer = httpx.request(method, server.url + re.sub(r"{\w+}", "x", path), json={})
        open_to_all = f"{method} {path}" in OPEN
        assert (answer.status_code == 401) is not open_to_all, f"{method} {path} answered {answer.status_code}"
    wrong = {"authorization": "Bearer lethe-" + "x" * 43}
    assert httpx.get(f"{server.url}/v1/models", headers=wrong).status_code == 401


def test_a_chat_key_reaches_only_what_is_allowed_by_name(server: Server, keys: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {keys['chat']}"}
    for method, path in routes(server):
        if f"{method} {path}" in ALLOWED | OPEN or path == "/v1/responses/{response_id}" or path.endswith("/cancel"):
            continue
        if OWN_SCOPES.get(f"{method} {path}") == "chat" or path.startswith("/v1/models/"):
            continue
        answer = httpx.request(method, server.url + re.sub(r"{\w+}", "x", path), json={}, headers=headers)
        ours = path.startswith(ADMIN_PREFIX) or path == "/metrics"
        assert answer.status_code == (403 if ours else 404), f"{method} {path} answered {answer.status_code}"
        assert ours or "not served here" in answer.text, "vLLM itself was not asked"


def test_scopes_decide_who_may_choose_a_policy(server: Server, keys: dict[str, str]) -> None:
    def ask(scope: str, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": FRANCE}], "max_tokens": 4}
        headers = {"authorization": f"Bearer {keys[scope]}"}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def models(scope: str) -> list[str]:
        listed = httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {keys[scope]}"}).json()
        return [model["id"] for model in listed["data"]]

    assert ask("chat", NAME).status_code == 200
    assert ask("chat", f"{NAME}:default").status_code == 200
    refused = ask("chat", f"{NAME}:none")
    assert refused.status_code == 403
    assert "compare" in refused.json()["error"]["message"]
    assert ask("compare", f"{NAME}:none").status_code == 200
    assert ask("compare", f"{NAME}:missing").status_code == 404

    def compare(scope: str) -> int:
        headers = {"authorization": f"Bearer {keys[scope]}"}
        order = {"question": FRANCE, "max_tokens": 4}
        return httpx.post(f"{server.url}/lethe/v1/compare", json=order, headers=headers, timeout=60).status_code

    assert [compare(scope) for scope in ("chat", "compare", "admin")] == [403, 200, 200]
    score = httpx.post(f"{server.url}/lethe/v1/score", json={}, headers={"authorization": f"Bearer {keys['compare']}"})
    assert score.status_code == 403
    assert ask("chat", "other").status_code == 404
    assert models("chat") == [NAME]
    assert models("compare") == [NAME, f"{NAME}:default", f"{NAME}:none"]
    anthropic = httpx.post(
        f"{server.url}/v1/messages",
        json={"model": NAME, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]},
        headers={"x-api-key": keys["chat"]},
        timeout=60,
    )
    assert anthropic.status_code == 200


def test_the_command_line_does_what_the_admin_api_does(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "LETHE_URL": server.url, "LETHE_STATE_DIR": str(server.directory / "state")}

    def lethe(*arguments: str, status: int = 0) -> str:
        done = subprocess.run([LETHE, *arguments], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    demo = Path(__file__).parents[2] / "deploy" / "demo" / "harry-potter.jsonl"
    assert "ready" in lethe("forget", "add", "demo", str(demo))
    assert "exists" in lethe("forget", "add", "demo", str(demo), status=1)
    lethe("forget", "enable", "demo")
    assert_free_of(text(client, SCHOOL))
    assert "HOGWARTS" in lethe("check", "at HOGWARTS", status=1)
    assert "Nothing" in lethe("check", "at home")
    assert "demo" in lethe("forget", "list")
    assert "since" in lethe("forget", "show", "demo")
    assert "intact" in lethe("audit")
    backup = str(tmp_path / "backup.tar")
    assert "artifact files" in lethe("backup", backup)
    lethe("forget", "disable", "demo")
    assert "Hogwarts" in text(client, SCHOOL)
    assert "becomes what it was" in lethe("restore", backup, "--yes")
    time.sleep(1.5)
    assert_free_of(text(client, SCHOOL))
    assert "backup_of_revision" in lethe("audit")
    checks = json.loads(lethe("doctor", "--json"))["checks"]
    assert "a server runs on it" in next(check["found"] for check in checks if check["what"] == "registry")
    assert json.loads(lethe("policy", "show", "default", "--all"))["guards"]["suppression"] == {"enabled": True}
    lethe("forget", "remove", "demo")
    assert "no forget set" in lethe("forget", "show", "demo", status=1)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"phrase": "fine"}\n{"phrase": "  "}\nnot json\n\xff\n')
    report = lethe("forget", "add", "bad", str(bad), status=1)
    assert all(f"line {number}:" in report for number in (2, 3, 4))
    assert "bad" not in lethe("forget", "list")


def test_what_was_in_force_survives_kill_9(server: Server, client: openai.OpenAI, admin: httpx.Client) -> None:
    assert admin.post("/forget_sets", json={"name": "lasting", "phrases": POTTER}).status_code == 201
    revision = admin.post("/forget_sets/lasting/enable").json()["revision"]
    server.kill()
    files = list((server.state / "artifacts" / "phrases").glob("*.safetensors"))
    assert files
    for i, file in enumerate(files):  # what a disk may do meanwhile
        file.write_bytes(b"nothing") if i % 2 else file.unlink()
    # From here on as users have it: engine and worker in processes of their own, started anew.
    server.start(VLLM_ENABLE_V1_MULTIPROCESSING="1", FORKED_ENGINES="")
    server.wait()
    shown = admin.get("/revision").json()
    assert (shown["revision"], shown["enabled"], shown["policies"]) == (revision, ["lasting"], {"default": ["lasting"], "none": []})
    assert_free_of(text(client, SCHOOL))
    assert admin.get("/audit").json()["intact"]
    assert admin.delete("/forget_sets/lasting").status_code == 200


def test_an_unsafe_way_to_start_is_refused_with_the_fix(server: Server, tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    model = next(word for word in server._command if word.startswith("--model="))
    cases = (
        ("--host=0.0.0.0", "lethe key create"),
        ('--speculative-config={"method": "ngram", "num_speculative_tokens": 2}', "speculative"),
        ("--api-key=x", "lethe key create"),
    )

    def start(number: int) -> subprocess.CompletedProcess[str]:
        own = {**environment, "LETHE_STATE_DIR": str(tmp_path / f"state-{number}")}
        return subprocess.run([LETHE, "serve", model, cases[number][0]], env=own, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(len(cases)) as pool:
        for done, (_, message) in zip(pool.map(start, range(len(cases))), cases, strict=True):
            assert done.returncode == 1
            assert message in done.stderr


def test_a_server_that_is_told_to_stop_lets_answers_end_and_takes_no_more(server: Server) -> None:
    # Long enough that the answer is still under way when the other request has been refused.
    body = {"model": NAME, "messages": [{"role": "user", "content": FRANCE}], "max_tokens": 150, "ignore_eos": True, "stream": True}
    assert server.process is not None
    asked = httpx.Client(base_url=server.url, timeout=120)
    with asked, asked.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while asked.get("/health").status_code == 200:
            assert time.monotonic() < deadline
        refused = asked.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        said = list(lines)
    assert said[-2:] == ["data: [DONE]", ""] or said[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in "".join(said)
    assert server.process.wait(timeout=60) == 0
