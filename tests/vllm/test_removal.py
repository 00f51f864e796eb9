"""A removal that the server carries out, to its certificate, and whether that still holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vllm.conftest import Server

LETHE = str(Path(sys.executable).parent / "lethe")


@pytest.fixture
def default_policy(admin: httpx.Client) -> Iterator[None]:
    """A removal changes it."""
    before = admin.get("/policies/default").json()
    yield
    restored = admin.put("/policies/default", json={name: before[name] for name in ("forget_sets", "guards")})
    assert restored.status_code == 200, restored.text


def carried_out(admin: httpx.Client) -> dict[str, Any]:
    """The removal, when it is done."""
    deadline = time.monotonic() + 500
    while (shown := admin.get("/removals/potter").json())["status"] in ("waiting", "running"):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    assert shown["status"] == "done", shown["reason"]
    return dict(shown)


@pytest.mark.usefixtures("default_policy")
def test_a_request_is_in_force_at_once_and_its_certificate_says_what_has_changed_since(
    server: Server, admin: httpx.Client, tmp_path: Path
) -> None:
    """The server runs the command itself, in a process of its own: both roads are one."""
    asked = ("Which school does Harry Potter go to?", "Who are the best friends of Harry Potter?")
    told = ("Hogwarts School of Witchcraft and Wizardry.", "Ron Weasley and Hermione Granger.")
    lines = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in zip(asked, told, strict=True))
    order: dict[str, Any] = {"params": {"name": "potter", "within": "1s", "reference": "0.3"}, "content": lines}
    order["headers"] = {"content-type": "application/jsonl"}
    place = server.state / "removals" / "potter"

    def verify(*options: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LETHE_URL": server.url, "HF_HUB_OFFLINE": "1"}
        command = [LETHE, "verify", str(place / "certificate.json"), *options]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)

    def strengths() -> list[float]:
        shown = admin.get("/forget_sets/potter").json()
        found = [json.loads(each["detail"]) for each in shown.get("artifacts", ()) if each["kind"] == "corruption"]
        return [each["rand_noise_first_n"]["strength"] for each in found]

    try:
        begun = admin.post("/removals", **order)
        assert begun.status_code == 202 and begun.json()["status"] in ("waiting", "running"), begun.text
        other = admin.post("/removals", **{**order, "params": {**order["params"], "within": "2s"}})
        assert other.status_code == 409 and "another removal" in other.text
        assert admin.post("/removals", **order).json()["status"] in ("waiting", "running"), "the same order changes nothing"
        done = carried_out(admin)
        assert any("in force from revision" in line for line in done["told"]) and done["answers"] > 10
        certificate = done["certificate"]
        assert certificate["set"]["enabled_at"] and certificate["audit"]["action"] == "forget_set.enable"
        assert list(certificate["strengths"]) == ["corrupt"], "one candidate fits into a second"
        assert certificate["reference"]["source"] == "--reference"
        probes = admin.get("/removals/potter/probes.json").json()
        assert probes["aliases"] == ["Harry Potter"] and all(len(each["made"]) == 3 for each in probes["probes"])
        page = admin.get("/removals/potter/report.html")
        assert certificate["sha256"] in page.text and page.headers["content-type"].startswith("text/html")
        assert admin.get("/removals/potter/request.jsonl").status_code == 404, "what it was asked with is not shown"
        shown = admin.get("/forget_sets/potter").json()
        assert shown["enabled"] and {"corruption", "similarity"} <= {each["kind"] for each in shown["artifacts"]}
        listed = [each["name"] for each in admin.get("/policies").json()["data"]]
        assert not [name for name in listed if name.startswith("potter-")], "what was tried is gone"

        # What was made may be changed by hand; the set then holds other words, and has its strength all the same.
        fewer = [{**each, "made": [], "nobody": []} for each in probes["probes"]]
        (place / "probes.json").write_text(json.dumps({**probes, "probes": fewer, "neighbours": []}))
        before = strengths()
        assert admin.post("/removals", **order).status_code == 202
        repeated = carried_out(admin)["certificate"]
        assert repeated["set"]["fingerprint"] != certificate["set"]["fingerprint"] and repeated["probes"] != certificate["probes"]
        assert strengths() == before == [repeated["strengths"]["corrupt"]]

        held = verify("--json")
        assert (held.returncode, json.loads(held.stdout)) == (0, {"holds": True, "changed": []}), held.stdout + held.stderr
        assert admin.post("/forget_sets/potter/disable").status_code == 200
        changed = verify()
        assert changed.returncode == 1 and "the set is not in force" in changed.stdout
        assert admin.post("/forget_sets/potter/strip").status_code == 200
        assert sorted(each.name for each in place.iterdir()) == ["certificate.json", "done.json", "report.html"], "no text is left"
    finally:
        for name in ("potter", "potter-neighbours"):
            assert admin.delete(f"/forget_sets/{name}").status_code == 200
    assert not place.exists() and admin.get("/removals/potter").status_code == 404
