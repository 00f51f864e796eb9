"""Benchmark: what suppression costs, as ratios to plain vLLM measured in the same run.

    .venv/bin/python -m tests.bench.suppression [--rounds 5] [--allow-dirty]

Starts plain vLLM, lethe, and plain vLLM once more (the control: what it differs by is noise), sends the same load to one of them
at a time in turns, and reports medians over the turns: of the wall clock, and of the processor time that all of a server's
processes used, which a busy neighbour on a shared machine disturbs less.
Appends one line to results.jsonl and redraws suppression.png beside this file. Refuses a dirty tree: a figure without its code is
worth nothing.
"""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from serve.default_model import NAME, default_model
from serve.settings import Settings
from tests.vllm.conftest import Server

HERE = Path(__file__).parent
COUNTS = (1, 1_000, 10_000, 100_000)
BATCHES = (1, 8, 32)
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
"""Both engines compute on the same core (only one of them works at a time): on shared machines cores differ by a tenth."""
OPTIONS = ("--max-model-len=2048", "--max-num-seqs=32", "--disable-uvicorn-access-log")
PROMPT = "Tell me a long story about the sea, the wind and the people who live there."


def phrases(count: int) -> list[str]:
    """Phrases of two to four everyday words: the ones before the last are words that the model really writes."""
    rng = random.Random(count)
    common = ["the sea", "the wind", "of", "and", "people", "story", "old man", "woman", "ship", "harbour", "night", "day", "light"]
    syllables = ["ba", "ko", "ri", "nu", "te", "la", "mo", "si", "va", "ru", "pe", "do"]
    rare = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(count)]
    return [" ".join([*rng.choices(common, k=rng.randint(1, 3)), word]) for word in rare]


@dataclass(frozen=True)
class Load:
    """What one load cost."""

    tokens_per_s: float
    first_token_ms: float  # median over the batch
    cpu_s: float  # of all the server's processes


def generate(server: Server, batch: int, policy: str, tokens: int, nonce: str = "") -> Load:
    """Send one full batch.

    ``nonce`` starts every prompt, so that no load profits from the prefix cache of an earlier one.
    """

    def one(number: int) -> tuple[int, float]:
        body = {
            "model": NAME + policy,
            "messages": [{"role": "user", "content": f"{nonce}{number}. {PROMPT}"}],
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


def add_sets(server: Server, progress: Progress) -> list[dict[str, Any]]:
    """One set and one policy per count. Returns compile time, memory and the time from enable to in force."""
    admin = httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=600)
    task, figures = progress.add_task("Compiling phrases", total=len(COUNTS)), []
    for count in COUNTS:
        before, started = memory_mib(server), time.perf_counter()
        admin.post("/forget_sets", json={"name": f"p{count}", "phrases": phrases(count)}).raise_for_status()
        while admin.get("/forget_sets").json()["data"][-1]["artifacts"][0]["status"] != "ready":
            time.sleep(0.05)
        built = time.perf_counter() - started
        enabling = []
        for _ in range(5):
            started = time.perf_counter()
            admin.post(f"/forget_sets/p{count}/enable").raise_for_status()
            enabling.append((time.perf_counter() - started) * 1_000)
            if len(enabling) < 5:
                admin.post(f"/forget_sets/p{count}/disable").raise_for_status()
        admin.put(f"/policies/only-{count}", json={"forget_sets": [f"p{count}"]}).raise_for_status()
        figures.append(
            {
                "phrases": count,
                "post_to_ready_s": round(built, 2),
                "enable_first_ms": round(enabling[0], 1),
                "enable_again_ms": round(statistics.median(enabling[1:]), 1),
                "memory_mib": round(memory_mib(server) - before, 1),
            }
        )
        progress.advance(task)
    admin.put("/policies/default", json={"forget_sets": []}).raise_for_status()
    return figures


def measure(plain: Server, guarded: Server, control: Server, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Ratios to plain vLLM, median over the rounds; above 1 is better than plain."""
    variants = [
        ("plain", plain, ""),
        ("plain again", control, ""),
        ("nothing engaged", guarded, ""),
        *((f"{count:,} phrases", guarded, f":only-{count}") for count in COUNTS),
    ]
    task = progress.add_task("Measuring", total=rounds * len(BATCHES) * len(variants))
    loads: dict[tuple[str, int], list[Load]] = {}
    for turn in range(rounds):
        for batch in BATCHES:
            # In a new order every turn, so that a drift of the machine favours nobody.
            for name, server, policy in random.Random(turn).sample(variants, len(variants)):
                tokens = 64 if batch < 32 else 32
                loads.setdefault((name, batch), []).append(generate(server, batch, policy, tokens, f"{turn} {name} "))
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


def draw(record: dict[str, Any]) -> None:
    """Throughput ratio against number of phrases, one line per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for batch in BATCHES:
        points = {row["variant"]: row for row in record["serving"] if row["batch"] == batch}
        rows = [points[f"{count:,} phrases"] for count in COUNTS]
        middle = [row["per_cpu_second_ratio"] for row in rows]
        spread = [[abs(m - r["per_cpu_second_ratio_range"][side]) for m, r in zip(middle, rows, strict=True)] for side in (0, 1)]
        axes.errorbar(COUNTS, middle, yerr=spread, marker="o", capsize=3, label=f"batch {batch}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.axhline(0.97, color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlabel="phrases in force", ylabel="tokens per CPU second, plain vLLM = 1", ylim=(0.8, 1.15))
    axes.set_title("Suppression against plain vLLM (median and range over turns)")
    axes.legend()
    figure.savefig(HERE / "suppression.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code; nothing is recorded")
    options = parser.parse_args()
    dirty = bool(subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip())
    if dirty and not options.allow_dirty:
        sys.exit("the tree has uncommitted changes; commit them, or pass --allow-dirty to look without recording")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    model, console = default_model(Settings().cache_dir), Console(width=140)
    with tempfile.TemporaryDirectory() as directory, Progress(console=console) as progress:
        root = Path(directory)
        lethe = [str(Path(sys.executable).parent / "lethe"), "serve", f"--model={model}"]
        guarded = Server(lethe, root, {"LETHE_STATE_DIR": str(root / "state"), **ENVIRONMENT}, OPTIONS)
        vllm = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", f"--model={model}"]
        vllm += [f"--served-model-name={NAME}", "--dtype=float32", "--enforce-eager"]
        plain, control = Server(vllm, root, ENVIRONMENT, OPTIONS), Server(vllm, root, ENVIRONMENT, OPTIONS)
        starting: dict[str, float] = {}
        try:
            for name, server in (
                ("plain", plain),
                ("guarded", guarded),
                ("control", control),
            ):  # one after the other: the time to start counts
                started = time.perf_counter()
                server.start()
                server.wait()
                generate(server, 1, "", 1)
                starting[f"{name}_first_token_after_s"] = round(time.perf_counter() - started, 1)
            sets = add_sets(guarded, progress)
            for server in (plain, guarded, control):
                generate(server, 8, "", 8)
            serving = measure(plain, guarded, control, options.rounds, progress)
        finally:
            for server in (plain, guarded, control):
                if server.process is not None:
                    server.stop()

    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "benchmark": "suppression",
        "commit": commit + ("-dirty" if dirty else ""),
        "machine": f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}",
        "vllm": version("vllm-cpu"),
        "torch": version("torch"),
        "model": NAME,
        "vocabulary": 49_152,
        "rounds": options.rounds,
        "start": starting,
        "sets": sets,
        "serving": serving,
    }
    table = Table("variant", "batch", "throughput ratio", "range", "first token, ms more")
    for row in serving:
        low, high = row["throughput_ratio_range"]
        table.add_row(
            row["variant"],
            str(row["batch"]),
            f"{row['throughput_ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            str(row["first_token_ms_more"]),
        )
    console.print(table, sets, starting)
    if not dirty:
        with (HERE / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        draw(record)


if __name__ == "__main__":
    main()
