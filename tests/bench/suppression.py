"""Benchmark: what suppression costs, as ratios to plain vLLM measured in the same run.

    .venv/bin/python -m tests.bench.suppression [--rounds 5] [--allow-dirty]

Starts plain vLLM, lethe, and plain vLLM once more (the control: what it differs by is noise), sends the same load to one of them
at a time in turns, and reports medians over the turns: of the wall clock, and of the processor time that all of a server's
processes used, which a busy neighbour on a shared machine disturbs less.
Appends one line to results.jsonl and redraws suppression.png beside this file. Refuses a dirty tree: a figure without its code is
worth nothing.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from serve.default_model import default_model
from serve.settings import Settings
from tests.bench.load import BATCHES, arguments, begin, generate, keep, measure, memory_mib, serving_table, three_servers
from tests.vllm.conftest import Server

HERE = Path(__file__).parent
COUNTS = (1, 1_000, 10_000, 100_000)


def phrases(count: int) -> list[str]:
    """Phrases of two to four everyday words: the ones before the last are words that the model really writes."""
    rng = random.Random(count)
    common = ["the sea", "the wind", "of", "and", "people", "story", "old man", "woman", "ship", "harbour", "night", "day", "light"]
    syllables = ["ba", "ko", "ri", "nu", "te", "la", "mo", "si", "va", "ru", "pe", "do"]
    rare = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(count)]
    return [" ".join([*rng.choices(common, k=rng.randint(1, 3)), word]) for word in rare]


def add_sets(server: Server, progress: Progress) -> list[dict[str, Any]]:
    """One set and one policy per count. Returns compile time, memory and the time from enable to in force."""
    admin = httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=600)
    task, figures = progress.add_task("Compiling phrases", total=len(COUNTS)), []
    for count in COUNTS:
        before, started = memory_mib(server), time.perf_counter()
        body = {"name": f"p{count}", "phrases": phrases(count)}
        admin.post("/forget_sets", params={"force": "true"}, json=body).raise_for_status()
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
    options = arguments(__doc__, rounds=5).parse_args()
    record, clean = begin("suppression", options)
    model, console = default_model(Settings().cache_dir), Console(width=140)
    with three_servers(model) as servers, Progress(console=console) as progress:
        plain, guarded, control = servers
        starting: dict[str, float] = {}
        for name, server in (("plain", plain), ("guarded", guarded), ("control", control)):
            started = time.perf_counter()  # one after the other: the time to start counts
            server.start()
            server.wait()
            generate(server, 1, [""], 1)
            starting[f"{name}_first_token_after_s"] = round(time.perf_counter() - started, 1)
        sets = add_sets(guarded, progress)
        for server in servers:
            generate(server, 8, [""], 8)
        variants = [
            ("plain", plain, [""]),
            ("plain again", control, [""]),
            ("nothing engaged", guarded, [""]),
            *((f"{count:,} phrases", guarded, [f":only-{count}"]) for count in COUNTS),
        ]
        serving = measure(variants, options.rounds, progress)
    record |= {"vocabulary": 49_152, "start": starting, "sets": sets, "serving": serving}
    console.print(serving_table(serving), sets, starting)
    if clean:
        keep(record)
        draw(record)


if __name__ == "__main__":
    main()
