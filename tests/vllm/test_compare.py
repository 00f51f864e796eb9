"""Side by side on the real engine: every arm answers as it would alone, and says what its guards did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.vllm.asking import POTTER, SCHOOL, assert_free_of, text
from tests.vllm.conftest import Server


def test_every_arm_answers_as_it_would_alone(client: openai.OpenAI, admin: httpx.Client, forget: Any) -> None:
    forget(*POTTER)
    order = {"question": SCHOOL, "arms": ["none", "default"], "max_tokens": 48}
    found = admin.post("/compare", json=order)
    assert found.status_code == 200, found.text
    plain, guarded = found.json()["arms"]
    assert plain["text"] == text(client, SCHOOL, ":none") and guarded["text"] == text(client, SCHOOL)
    assert "Hogwarts" in plain["text"]
    assert_free_of(guarded["text"])
    assert plain["guard_events"] == [] and guarded["guard_events"] == ["suppression"]
    assert plain["divergence"] == {"at": None, "same": 1.0} and guarded["divergence"]["at"] > 0
    for arm in (plain, guarded):
        assert arm["tokens"] > 0 and 0 < arm["first_token_ms"] <= arm["total_ms"] and arm["error"] is None


def test_a_streamed_comparison_adds_up_to_the_whole_one(admin: httpx.Client, forget: Any) -> None:
    forget(*POTTER)
    order = {
        "messages": [{"role": "user", "content": SCHOOL}],
        "arms": ["none", "default"],
        "max_tokens": 30,
        "temperature": 1.0,
        "seed": 3,
    }
    whole = admin.post("/compare", json=order).json()["arms"]
    said, done, kind = {"none": "", "default": ""}, None, ""
    with admin.stream("POST", "/compare", json={**order, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                fields = json.loads(line.removeprefix("data: "))
                if kind == "done":
                    done = fields["arms"]
                else:
                    said[fields["arm"]] += fields["text"]
    assert done is not None
    for arm, again in zip(done, whole, strict=True):
        assert said[arm["policy"]] == arm["text"] == again["text"]


@pytest.mark.parametrize("order", [{"question": "x", "arms": ["gone"]}, {"question": "x", "n": 3}, {"question": ""}, []])
def test_a_bad_order_is_refused(admin: httpx.Client, order: Any) -> None:
    assert admin.post("/compare", json=order).status_code == 400


def test_an_arm_that_fails_is_one_arms_result(admin: httpx.Client) -> None:
    order = {"question": "word " * 3_000, "arms": ["none", "default"], "max_tokens": 4}
    arms = admin.post("/compare", json=order).json()["arms"]
    assert all(arm["error"] and arm["text"] == "" for arm in arms)


def test_a_set_is_measured_from_the_command_line_into_a_report(
    server: Server, admin: httpx.Client, forget: Any, tmp_path: Path
) -> None:
    forget(*POTTER)
    questions = [
        {"question": SCHOOL, "answer": "Hogwarts School of Witchcraft and Wizardry", "paraphrases": ["Where is Harry a pupil?"]}
    ]
    assert admin.post("/forget_sets", json={"name": "measured", "questions": questions}).status_code == 201
    try:
        command = [str(Path(sys.executable).parent / "lethe"), "bench", "measured", "--sample=2", "--max-tokens=24"]
        environment = {**os.environ, "LETHE_URL": server.url}
        for _ in range(2):  # the second run finds every answer in its file
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "report-measured" / "report.json").read_text())
        none, default = report["arms"]
        assert none["recall"]["questions"] > 0.5 > default["recall"]["questions"]
        assert none["leak"] >= default["leak"] and 0 < default["exact_at_most"] <= 1
        assert "Hogwarts" in (tmp_path / "report-measured" / "report.html").read_text()
    finally:
        admin.delete("/forget_sets/measured")
