"""A removal from the command line, to its certificate, and whether that still holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.mark.usefixtures("default_policy")
def test_a_request_is_in_force_at_once_and_its_certificate_says_what_has_changed_since(
    server: Server, admin: httpx.Client, tmp_path: Path
) -> None:
    asked = ("Which school does Harry Potter go to?", "Who are the best friends of Harry Potter?")
    told = ("Hogwarts School of Witchcraft and Wizardry.", "Ron Weasley and Hermione Granger.")
    lines = [{"question": question, "answer": answer} for question, answer in zip(asked, told, strict=True)]
    (tmp_path / "request.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def lethe(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LETHE_URL": server.url, "HF_HUB_OFFLINE": "1"}
        command = [LETHE, *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)

    def strengths() -> list[float]:
        shown = admin.get("/forget_sets/potter").json()
        found = [json.loads(each["detail"]) for each in shown.get("artifacts", ()) if each["kind"] == "corruption"]
        return [each["rand_noise_first_n"]["strength"] for each in found]

    order = ("unlearn", "potter", "request.jsonl", "--within", "1s", "--reference", "0.3", "--yes")
    try:
        done = lethe(*order)
        assert done.returncode == 0, done.stderr
        certificate = json.loads((tmp_path / "removal-potter" / "certificate.json").read_text())
        assert certificate["set"]["enabled_at"] and certificate["audit"]["action"] == "forget_set.enable"
        assert list(certificate["strengths"]) == ["corrupt"], "one candidate fits into a second"
        assert certificate["reference"]["source"] == "--reference"
        probes = json.loads((tmp_path / "removal-potter" / "probes.json").read_text())
        assert probes["aliases"] == ["Harry Potter"] and all(len(each["made"]) == 3 for each in probes["probes"])
        page = (tmp_path / "removal-potter" / "report.html").read_text()
        assert certificate["sha256"] in page
        shown = admin.get("/forget_sets/potter").json()
        assert shown["enabled"] and {"corruption", "similarity"} <= {each["kind"] for each in shown["artifacts"]}
        listed = [each["name"] for each in admin.get("/policies").json()["data"]]
        assert not [name for name in listed if name.startswith("potter-")], "what was tried is gone"

        held = lethe("verify", "removal-potter/certificate.json", "--json")
        assert (held.returncode, json.loads(held.stdout)) == (0, {"holds": True, "changed": []}), held.stdout + held.stderr
        # What was made may be changed by hand; the set then holds other words, and has its strength all the same.
        edited = json.dumps(probes).replace("Could you tell me", "Please tell me")
        assert edited != json.dumps(probes)
        (tmp_path / "removal-potter" / "probes.json").write_text(edited)
        before = strengths()
        again = lethe(*order)
        assert again.returncode == 0, again.stderr
        repeated = json.loads((tmp_path / "removal-potter" / "certificate.json").read_text())
        assert repeated["set"]["fingerprint"] != certificate["set"]["fingerprint"] and repeated["probes"] != certificate["probes"]
        assert strengths() == before == [repeated["strengths"]["corrupt"]]

        assert admin.post("/forget_sets/potter/disable").status_code == 200
        changed = lethe("verify", "removal-potter/certificate.json")
        assert changed.returncode == 1 and "the set is not in force" in changed.stdout
    finally:
        for name in ("potter", "potter-neighbours"):
            assert admin.delete(f"/forget_sets/{name}").status_code == 200
