"""Benchmark: processor time of a decoding step of 32 requests, as ratios to plain vLLM measured in the same run.

    .venv/bin/python -m tests.bench.step [--repeats 3] [--batch 32]

No server and no HTTP: vLLM's engine in one process and one thread, first without and then with the guarded model, and once
more without (the control). Processor time, since the machines are shared. The arithmetic bound is contrast's, see
`tests.bench.contrast`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from serve.default_model import default_model
from serve.settings import Settings

if TYPE_CHECKING:
    from tests.bench.offline import Entries

TOKENS = 48


def measure(guarded: bool, model: Path, repeats: int, batch: int) -> dict[str, float]:
    """Milliseconds of processor time for each step, by what is engaged. Runs in a process of its own."""
    from tests.bench.offline import Bench, sizes_of

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": batch}
    bench = Bench.start(model, Path(tempfile.mkdtemp()), guarded=guarded, **options)
    asked: dict[str, Entries] = {"nothing": [()]}
    if guarded:
        sizes = sizes_of(json.loads((model / "config.json").read_bytes()))
        asked |= {"suppression": bench.suppression(), **bench.contrast(sizes), **bench.steering(sizes)}

    def one(entries: Entries) -> float:
        started = time.process_time()
        bench.run(batch, entries, prompt=32, tokens=TOKENS)
        return (time.process_time() - started) * 1_000 / TOKENS

    for entries in asked.values():
        one(entries)  # what is loaded and cached the first time
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(repeats):
        for name, entries in asked.items():
            taken[name].append(one(entries))
    return {name: min(each) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", choices=("plain", "guarded"), help="measure one of them here and print it as JSON")
    arguments = parser.parse_args()
    model = default_model(Settings().cache_dir)
    if arguments.only:
        print(json.dumps(measure(arguments.only == "guarded", model, arguments.repeats, arguments.batch)))
        return
    from tests.bench.contrast import arithmetic
    from tests.bench.offline import ENGINE

    console, found = Console(), []
    for which in ("plain", "guarded", "plain"):
        with console.status(f"measuring {which} vLLM"):
            command = [sys.executable, "-m", "tests.bench.step", f"--only={which}"]
            command += [f"--repeats={arguments.repeats}", f"--batch={arguments.batch}"]
            ran = subprocess.run(command, env={**os.environ, **ENGINE}, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.stderr[-3_000:])
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    plain = statistics.mean(each["nothing"] for each in (found[0], found[2]))
    table = Table(
        "engaged", "ms a step", "of plain vLLM", title=f"{arguments.batch} requests, arithmetic bound {arithmetic(model):.2f}"
    )
    table.add_row("plain vLLM", f"{plain:.1f}", f"control {found[0]['nothing'] / found[2]['nothing']:.2f}")
    for name, taken in found[1].items():
        table.add_row(name, f"{taken:.1f}", f"{plain / taken:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
