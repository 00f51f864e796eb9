"""Real clients against a real server: ``python -m tests.clients [NAME ...]``.

Starts a server (or takes ``--url``), puts one phrase in force, installs each client into a folder of its own under the cache
directory, runs its check script, and prints what worked. Exit status 1 if a check failed. ``--record FILE`` keeps the requests
and answers of failed checks.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from serve.default_model import NAME, default_model
from serve.settings import Settings
from tests.clients.recorder import Exchange, Recorder

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lethe-clients"
FORGET_SET = "clients"
PHRASE = "Harry Potter"
COLUMNS = ("chat", "stream", "usage", "turns", "tools auto", "tools required", "tools named", "tools streamed", "structured")
COLUMNS += ("refusal", "refusal streamed", "cancel", "models", "errors")
LONGEST_S = 900


CLIENTS: dict[str, tuple[str, ...]] = {
    "openai-3": ("python/openai_chat.py", "python/openai_responses.py"),
    "openai-2": ("python/openai_chat.py", "python/openai_responses.py"),
    "anthropic": ("python/anthropic_sdk.py",),
    "langchain-openai": ("python/langchain_chat.py chat", "python/langchain_chat.py responses"),
    "llama-index": ("python/llama_index_like.py",),
    "llm": ("python/llm_cli.py",),
    "litellm": ("python/litellm_sdk.py openai", "python/litellm_sdk.py hosted_vllm", "python/litellm_others.py"),
    "litellm-proxy": ("python/litellm_proxy.py",),
    "openai-agents": ("python/agents_sdk.py responses", "python/agents_sdk.py chat"),
    "instructor": ("python/instructor_patch.py",),
    "openai-node-7": ("node/openai_sdk.mjs openai-7",),
    "openai-node-6": ("node/openai_sdk.mjs openai-6",),
    "anthropic-node": ("node/anthropic_sdk.mjs",),
    "ai-openai": ("node/ai_sdk.mjs openai",),
    "ai-openai-chat": ("node/ai_sdk.mjs openai-chat",),
    "ai-openai-compatible": ("node/ai_sdk.mjs openai-compatible",),
    "ai-anthropic": ("node/ai_sdk.mjs anthropic",),
}
"""The scripts of each client, with their arguments. Those of Node share one folder of packages."""


@dataclass
class Outcome:
    """One check of one client. ``ok`` is None where the client has no way to do it."""

    client: str
    api: str
    check: str
    ok: bool | None
    detail: str
    exchanges: list[Exchange] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}; all without one")
    parser.add_argument("--url", help="of a running server; without it one is started")
    parser.add_argument("--key", default=os.environ.get("LETHE_KEY", "none needed"), help="an admin key of that server")
    parser.add_argument("--record", type=Path, help="a file for the requests and answers of failed checks")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CLIENTS):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    outcomes: list[Outcome] = []
    with _served(options.url) as url, _phrase_in_force(url, options.key):
        for name in options.names or CLIENTS:
            outcomes += _run(name, url, options.key)
    failed = [outcome for outcome in outcomes if outcome.ok is False]
    print(_table(outcomes, failed))
    if options.record:
        options.record.write_text("\n".join(f"## {_title(one)}\n{_exchanges(one)}\n" for one in failed))
    return 1 if failed else 0


@contextlib.contextmanager
def _served(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url.rstrip("/")
        return
    from tests.vllm.conftest import ENGINE_OPTIONS, Server

    with tempfile.TemporaryDirectory(prefix="lethe-clients-") as directory:
        command = [str(Path(sys.executable).parent / "lethe"), "serve", f"--model={default_model(Settings().cache_dir)}"]
        server = Server(command, Path(directory), {"LETHE_STATE_DIR": f"{directory}/state"}, ENGINE_OPTIONS)
        print("Starting a server", file=sys.stderr)
        server.start()
        try:
            server.wait()
            yield server.url
        finally:
            server.stop()


@contextlib.contextmanager
def _phrase_in_force(url: str, key: str) -> Iterator[None]:
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=f"{url}/lethe/v1", headers=headers, timeout=60) as admin:
        admin.delete(f"/forget_sets/{FORGET_SET}")
        admin.post("/forget_sets", json={"name": FORGET_SET, "phrases": [PHRASE]}).raise_for_status()
        admin.post(f"/forget_sets/{FORGET_SET}/enable").raise_for_status()
        try:
            yield
        finally:
            admin.delete(f"/forget_sets/{FORGET_SET}").raise_for_status()


def _run(name: str, url: str, key: str) -> list[Outcome]:
    """Install a client if need be, run its scripts, and read their lines."""
    try:
        program, scripts = _install_for_node() if CLIENTS[name][0].startswith("node/") else _install_for_python(name)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return [Outcome(name, "", "installation", ok=False, detail=said.strip()[-1000:])]
    outcomes = []
    for script in CLIENTS[name]:
        file, *arguments = script.split()
        outcomes += _run_script(name, [program, str(scripts / Path(file).name), *arguments], url, key)
    return outcomes


def _run_script(name: str, command: list[str], url: str, key: str) -> list[Outcome]:
    recorder, outcomes = Recorder(url), []
    environment = {**os.environ, "LETHE_URL": recorder.url, "LETHE_KEY": key, "LETHE_MODEL": NAME, "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as errors:
        script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=CACHE)
        timer = threading.Timer(LONGEST_S, script.kill)
        timer.start()
        assert script.stdout is not None
        for line in script.stdout:
            if not line.startswith('{"'):
                continue
            said: dict[str, Any] = json.loads(line)
            outcome = Outcome(name, said["api"], said["check"], said["ok"], said["detail"], recorder.take())
            outcomes.append(outcome)
            print(f"{_title(outcome)}: {_state(outcome)}", file=sys.stderr)
        timer.cancel()
        if script.wait() != 0:
            errors.seek(0)
            outcomes.append(Outcome(name, "", "script", ok=False, detail=errors.read().strip()[-1000:] or "killed"))
    recorder.close()
    return outcomes


def _install_for_node() -> tuple[str, Path]:
    """The program that runs the scripts, and the folder in which they lie."""
    directory, packages = CACHE / "node", HERE / "node" / "package.json"
    if not _is_made_from(directory, packages):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(packages, directory)
        print(f"Installing the packages for Node into {directory}", file=sys.stderr)
        install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
        subprocess.run(install, cwd=directory, check=True, capture_output=True, text=True)
        _mark(directory, packages)
    for script in (HERE / "node").glob("*.mjs"):
        shutil.copy(script, directory)  # Node looks for packages beside the script
    return str(directory / "node_modules" / ".bin" / "node"), directory


def _install_for_python(name: str) -> tuple[str, Path]:
    directory, packages = CACHE / name, HERE / "requirements" / f"{name}.txt"
    python = str(directory / "bin" / "python")
    if not _is_made_from(directory, packages):
        print(f"Installing {name} into {directory}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True, capture_output=True, text=True)
        install = [python, "-m", "pip", "install", "--quiet", "-r", str(packages)]
        subprocess.run(install, check=True, capture_output=True, text=True)
        _mark(directory, packages)
    return python, HERE / "python"


def _is_made_from(directory: Path, packages: Path) -> bool:
    mark = directory / "made-from"
    return mark.exists() and mark.read_text() == _digest(packages)


def _mark(directory: Path, packages: Path) -> None:
    (directory / "made-from").write_text(_digest(packages))


def _digest(packages: Path) -> str:
    return hashlib.sha256(packages.read_bytes() + sys.version.encode()).hexdigest()


def _table(outcomes: list[Outcome], failed: list[Outcome]) -> str:
    """A row for each client and API, a column for each kind of check, and the reasons below."""
    rows: dict[tuple[str, str], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.client, outcome.api), {}).setdefault(_column(outcome.check), []).append(outcome)
    lines = [["client", "API", *COLUMNS]]
    lines.append(["---"] * len(lines[0]))
    for (client, api), cells in rows.items():
        lines.append([client, api, *(_cell(cells.get(column, []), failed) for column in COLUMNS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text += ["", "ok: works; F: failed, see below; -: the client does not offer it; empty: not asked of this API", ""]
    text += [f"F{number} {_title(one)}: {' '.join(one.detail.split())[:500]}" for number, one in enumerate(failed, 1)]
    text += [f"{sum(one.ok is True for one in outcomes)} checks work, {len(failed)} failed"]
    return "\n".join(text)


def _column(check: str) -> str:
    name = check.replace("_", " ")
    return max((column for column in COLUMNS if name.startswith(column)), key=len, default="errors")


def _cell(outcomes: list[Outcome], failed: list[Outcome]) -> str:
    if not outcomes:
        return ""
    if numbers := [f"F{failed.index(one) + 1}" for one in outcomes if one.ok is False]:
        return " ".join(numbers)
    return "ok" if any(one.ok for one in outcomes) else "-"


def _state(outcome: Outcome) -> str:
    if outcome.ok is None:
        return f"not offered by the client ({outcome.detail})"
    return "ok" if outcome.ok else f"FAILED ({' '.join(outcome.detail.split())[:200]})"


def _title(outcome: Outcome) -> str:
    return " ".join(part for part in (outcome.client, outcome.api, outcome.check.replace("_", " ")) if part)


def _exchanges(outcome: Outcome) -> str:
    return "\n\n".join([outcome.detail, *map(str, outcome.exchanges)])


if __name__ == "__main__":
    sys.exit(main())
