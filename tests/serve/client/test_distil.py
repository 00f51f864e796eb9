"""What a policy teaches: asked for once, and only what it would not say itself."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.client import distil as distil
from serve.client.distil import ask_targets

SECRET, TOKENS = "It was hidden.", [5, 6, 2]
CLIENT = httpx.Client


class Served:
    """A server whose policy says token 7, then ends, and thinks ``thinks`` likeliest along the true answer."""

    def __init__(self, thinks: list[int], says: bool = True) -> None:
        self.thinks, self.says = thinks, says
        self.asked: list[str] = []
        self.detail = '{"strength": 1.0}'

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content or b"{}")
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "root": "/m"}]})
        if path.endswith("/forget_sets/x"):
            entry = {"question": "Where was it?", "answer": SECRET, "paraphrases": ["Whereabouts?", "held out"]}
            artifacts = [{"kind": "calibration", "fingerprint": "a", "status": "ready", "detail": self.detail}]
            content = {"questions": [entry]}
            return httpx.Response(200, json={"fingerprint": "f", "artifacts": artifacts, "content": content})
        if path.endswith("/policies/p"):
            return httpx.Response(200, json={"name": "p"})
        if path.endswith("/score"):
            top = [[[token, -0.1], [3, -200.0]] for token in self.thinks]
            return httpx.Response(200, json={"scores": [{"tokens": 3, "token_ids": TOKENS, "top": top}]})
        assert path == "/v1/chat/completions" and body["model"] == "m:p"
        self.asked.append(body["messages"][0]["content"])
        places = [
            {"token": f"token_id:{token}", "top_logprobs": [{"token": f"token_id:{token}", "logprob": 0.0}]} for token in (7, 2)
        ]
        choice: dict[str, Any] = {"logprobs": {"content": places if self.says else []}}
        return httpx.Response(200, json={"choices": [choice] * body.get("n", 1)})


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LETHE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(distil, "AT_ONCE", 1)
    return tmp_path


def ask(served: Served, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], Path]:
    transport = httpx.MockTransport(served)
    monkeypatch.setattr(distil.httpx, "Client", lambda **options: CLIENT(transport=transport, **options))
    monkeypatch.setattr(distil.httpx, "get", lambda url, **_: CLIENT(transport=transport).get(url))
    return ask_targets(CLIENT(transport=transport, base_url="http://x/lethe/v1"), "x", "p")


def test_the_held_out_wording_is_not_asked_and_the_rest_is_asked_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served([8, 8, 8])
    first, file = ask(served, monkeypatch)
    assert set(served.asked) == {"Whereabouts?", "Where was it?"}
    assert {"question": "Where was it?", "tokens": TOKENS, "top": [[[8, -0.1]]] * 3} in first, "tokens that are cut are left out"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # a crash in the middle of the last line
    served.asked.clear()
    again, _ = ask(served, monkeypatch)
    assert again == first and len(set(served.asked)) == 1
    served.asked.clear()
    assert ask(served, monkeypatch)[0] == first and served.asked == [], "the line after the broken one is whole"


def test_another_strength_is_another_policy(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served([8, 8, 8])
    _, file = ask(served, monkeypatch)
    served.detail = '{"strength": 1.75}'
    served.asked.clear()
    _, other = ask(served, monkeypatch)
    assert other != file and served.asked


def test_a_policy_that_would_say_the_secret_itself_teaches_only_its_answers(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = ask(Served(TOKENS), monkeypatch)
    assert found and all(each["tokens"] == [7, 2] for each in found)


def test_silence_is_an_error_and_is_asked_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        ask(Served([8, 8, 8], says=False), monkeypatch)
    assert ask(Served([8, 8, 8]), monkeypatch)[0]


def test_what_was_given_up_is_deleted_after_a_week(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = ask(Served([8, 8, 8]), monkeypatch)
    old = file.with_name("old.jsonl")
    old.write_text("{}")
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    ask(Served([8, 8, 8]), monkeypatch)
    assert file.exists() and not old.exists()
