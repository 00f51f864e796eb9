"""Benchmark: what clients notice of shadow answers that are ten times the work of their own.

    .venv/bin/python -m tests.bench.shadow [--rounds 10] [--allow-dirty]

One server, a client that asks, reads and thinks, in turns without and with a shadow experiment on every request whose ten other
arms each answer it again; and once more without, as the control. The turns are short, since a shared machine drifts by more in a
minute than is to be seen here. Appends one line to results.jsonl. Refuses a dirty tree.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from serve.default_model import default_model
from serve.settings import Settings
from tests.bench.load import ENVIRONMENT, OPTIONS, arguments, begin, generate, keep
from tests.vllm.conftest import Server

REQUESTS, TOKENS, OTHER_ARMS = 4, 24, 10
THINKS_S = (0.0, 3.0)
"""Uniform: two of three pauses are longer than the quiet second after which shadow work begins."""
RESAMPLED = 2_000


def block(server: Server, name: str, draw: random.Random, advance: Any) -> list[float]:
    """Milliseconds of each answer."""
    times = []
    for i in range(REQUESTS):
        started = time.perf_counter()
        generate(server, 1, [""], TOKENS, f"{name} {i} ")
        times.append(1_000 * (time.perf_counter() - started))
        time.sleep(draw.uniform(*THINKS_S))
        advance()
    return times


def main() -> None:
    options = arguments(__doc__, rounds=10).parse_args()
    record, clean = begin("shadow", options)
    console = Console(width=140)
    arms = [{"name": f"arm{i}", "policy": "none" if i else "default"} for i in range(OTHER_ARMS + 1)]
    times: dict[str, list[list[float]]] = {"without": [], "with shadow": [], "without again": []}
    most_waiting = 0.0
    with tempfile.TemporaryDirectory() as directory, Progress(console=console) as progress:
        root = Path(directory)
        lethe = [str(Path(sys.executable).parent / "lethe"), "serve", f"--model={default_model(Settings().cache_dir)}"]
        server = Server(lethe, root, {"LETHE_STATE_DIR": str(root / "state"), **ENVIRONMENT}, OPTIONS)
        server.start()
        task = progress.add_task("Asking", total=options.rounds * len(times) * REQUESTS)
        try:
            server.wait()
            generate(server, 1, [""], TOKENS)
            with httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=60) as admin:
                for turn in range(options.rounds):
                    for kind in random.Random(turn).sample(list(times), len(times)):
                        name, shadow = f"turn{turn}", kind == "with shadow"
                        if shadow:
                            admin.post("/experiments", json={"name": name, "mode": "shadow", "arms": arms}).raise_for_status()
                        draw = random.Random(turn)
                        times[kind].append(block(server, f"{turn} {kind}", draw, lambda: progress.advance(task)))
                        if shadow:
                            most_waiting = max(most_waiting, server.metric("lethe_shadow_waiting"))
                            admin.post(f"/experiments/{name}/stop").raise_for_status()
                            time.sleep(5)  # what waits finds its experiment stopped
            lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        finally:
            server.stop()
    outcomes = {
        line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("lethe_shadow_requests_total{")
    }

    def ratio(kind: str, q: int, turns: Sequence[int]) -> float:
        """Of the q-th percentiles over all answers of these turns."""
        asked, plain = ([ms for turn in turns for ms in times[of][turn]] for of in (kind, "without"))
        return float(np.percentile(asked, q) / np.percentile(plain, q))

    rows = []
    for kind in list(times)[1:]:
        row: dict[str, Any] = {"variant": kind}
        for q in (50, 95):
            draw = random.Random(q)
            again = [ratio(kind, q, draw.choices(range(options.rounds), k=options.rounds)) for _ in range(RESAMPLED)]
            row[f"p{q}_ratio"] = round(ratio(kind, q, range(options.rounds)), 3)
            row[f"p{q}_ratio_range"] = np.percentile(again, (2.5, 97.5)).round(3).tolist()
        rows.append(row)
    table = Table(
        "",
        "p50 to without",
        "95 %, turns resampled",
        "p95 to without",
        "95 %, turns resampled",
        title=f"{options.rounds} turns of {REQUESTS} answers",
    )
    for row in rows:
        ranges = ["{:.2f}-{:.2f}".format(*row[f"p{q}_ratio_range"]) for q in (50, 95)]
        table.add_row(row["variant"], f"{row['p50_ratio']:.3f}", ranges[0], f"{row['p95_ratio']:.3f}", ranges[1])
    console.print(table, outcomes, f"most waiting: {most_waiting:.0f}")
    if clean:
        keep(
            {
                **record,
                "requests": REQUESTS,
                "other_arms": OTHER_ARMS,
                "serving": rows,
                "outcomes": outcomes,
                "waiting": most_waiting,
            }
        )


if __name__ == "__main__":
    main()
