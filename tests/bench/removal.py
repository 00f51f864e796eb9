"""Benchmark: `lethe unlearn` on authors of TOFU that nobody tuned for, one after the other, beside models that never knew them.

    .venv/bin/python -m tests.bench.removal TOFU [--authors forget01:0 retain:20 …] [--within 15m] [--work DIRECTORY]

TOFU is a directory of its files (forget01_perturbed, retain_perturbed, world_facts_perturbed, holdout01). The target has learned
forget01 and the first 100 rows of the retain set; for each author a model is taught that has learned all of it but this author. The
request holds the author's twenty questions with answers and nothing else. Judged is by what the command has not seen: TOFU's
paraphrases and wrong answers, sampled answers, attacks, and whether 60 questions about the others, 40 world facts and general
prompts are answered as before. Everything lies in --work; the same command goes on. Appends one line to results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from guards import training
from serve.default_model import default_model
from serve.settings import Settings
from tests.bench.load import begin, keep
from tests.bench.never_knew import merged, teach
from tests.vllm.conftest import Server

LETHE = str(Path(sys.executable).parent / "lethe")
AUTHOR = 20
"""Rows of one author."""
KNOWN = {"forget01": 40, "retain": 100}
"""File -> how many of its first rows the target has learned."""
AUTHORS = ("forget01:0", "forget01:20", "retain:0", "retain:20", "retain:40", "retain:60", "retain:80")
KEPT = 60
OPTIONS = ("--max-model-len=2048", "--max-num-seqs=32", "--disable-uvicorn-access-log")
Rows = list[dict[str, Any]]
MEASURES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "recall, questions": lambda arm: arm["recall"]["questions"],
    "paraphrases": lambda arm: arm["recall"]["paraphrased"],
    "word for word": lambda arm: arm["verbatim"]["questions"],
    "p": lambda arm: arm["forget_quality"],
    "leak": lambda arm: arm["leak"],
    "memorised": lambda arm: arm["memorised"],
    "extracted": lambda arm: arm["extracted"],
    "AUC": lambda arm: max(arm["membership"].values(), key=lambda value: abs(value - 0.5)),
    "others": lambda arm: arm["unchanged"]["retain"],
    "world facts": lambda arm: arm["unchanged"]["world facts"],
    "general": lambda arm: arm["unchanged"]["general"],
    "strangers": lambda arm: arm["unchanged"]["holdout"],
}
"""What the table shows, of one arm of a report of `lethe bench`."""


def known_rows(tofu: Path, without: str = "") -> Rows:
    """What the target has learned, but for one author (``FILE:ROW``)."""
    found = []
    for file, count in KNOWN.items():
        rows = _read(tofu, file)[:count]
        for first in range(0, count, AUTHOR):
            if f"{file}:{first}" != without:
                found += rows[first : first + AUTHOR]
    return found


def _read(tofu: Path, file: str) -> Rows:
    rows: Rows = json.loads((tofu / f"{file}_perturbed.json").read_text("utf-8"))
    return rows


def author_rows(tofu: Path, author: str) -> Rows:
    file, _, first = author.partition(":")
    if file not in KNOWN or not first.isdecimal() or int(first) % AUTHOR or int(first) >= KNOWN[file]:
        sys.exit(f"--authors {author!r}: write FILE:ROW, such as {', '.join(AUTHORS)}")
    return _read(tofu, file)[int(first) : int(first) + AUTHOR]


def ask_for(tofu: Path, author: str, place: Path) -> None:
    """Write the request, and what it is judged by in the form that `lethe bench --data` reads."""
    rows, judged = author_rows(tofu, author), place / "judged"
    judged.mkdir(parents=True, exist_ok=True)
    request = "".join(json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows)
    (place / "request.jsonl").write_text(request, "utf-8")
    kept = {"retain": known_rows(tofu, author)[:KEPT], "world_facts": _read(tofu, "world_facts")[:40]}
    # Of these it counts whether answers change; how likely given ones are would take most of the time.
    asked = {file: [{name: row[name] for name in ("question", "answer")} for row in those] for file, those in kept.items()}
    for file, those in {"forget01": rows, **asked}.items():
        (judged / f"{file}_perturbed.json").write_text(json.dumps(those), "utf-8")
    (judged / "holdout01.json").write_bytes((tofu / "holdout01.json").read_bytes())


def remove(name: str, place: Path, target: Path, never_knew: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Carry out one removal on a new server and measure it. Returns the arms of the report."""
    servers = []
    for each, model in (("guarded", target), ("never-knew-server", never_knew)):
        state = place / each
        state.mkdir(exist_ok=True)
        command = [LETHE, "serve", f"--model={model}"]
        # Where a server is belongs to what was asked: a second run finds the answers of the first at the same place.
        kept = state / "port"
        port = int(kept.read_text()) if kept.exists() else 0
        servers.append(Server(command, state, {"LETHE_STATE_DIR": str(state / "state"), "OMP_NUM_THREADS": "2"}, OPTIONS, port))
        kept.write_text(str(servers[-1].port))
    guarded, other = servers
    environment = {**os.environ, "LETHE_URL": guarded.url, "HF_HUB_OFFLINE": "1"}

    def lethe(*arguments: str) -> None:
        subprocess.run([LETHE, *arguments], cwd=place, env=environment, check=True)

    try:
        guarded.start()
        guarded.wait()
        lethe("unlearn", name, "request.jsonl", "--within", options.within, "--yes")
        other.start()
        other.wait()
        measured = [
            "bench",
            name,
            "--data=judged",
            "--truth",
            f"--sample={options.sample}",
            f"--against={other.url}",
            "--max-tokens=64",
        ]
        lethe(*measured, *([] if options.attacks else ["--no-attacks"]))
    finally:
        for server in servers:
            if server.process is not None:
                server.stop()
    report: dict[str, Any] = json.loads((place / f"report-{name}" / "report.json").read_text("utf-8"))
    arms: list[dict[str, Any]] = report["arms"]
    return arms


def table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """Each author's figures: without a guard, guarded, and of the model that never knew."""
    shown = Table("author", "", *MEASURES, title="lethe unlearn on requests that nobody tuned for")
    for author, arms in found.items():
        for arm in arms:
            cells = [value(arm) for value in MEASURES.values()]
            shown.add_row(author, arm["arm"], *("" if each is None else f"{each:.3g}" for each in cells))
        shown.add_section()
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tofu", type=Path)
    parser.add_argument("--authors", nargs="+", default=AUTHORS)
    parser.add_argument("--within", default="15m", help="time for each removal")
    parser.add_argument("--sample", type=int, default=16)
    parser.add_argument("--attacks", action="store_true", help="also the attacks on every question")
    parser.add_argument("--work", type=Path, default=Path("removals"))
    parser.add_argument("--target", type=Path, help="a LoRA adapter (PEFT) over the bundled model; else it is taught here")
    parser.add_argument("--never-knew", nargs="*", default=[], metavar="AUTHOR=ADAPTER", help="likewise, instead of teaching one")
    parser.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code; nothing is recorded")
    options = parser.parse_args(arguments)
    record, clean = begin("removal", options)
    base, work = default_model(Settings().cache_dir), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    given = dict(each.split("=", 1) for each in options.never_knew)
    console, found = Console(width=180), {}

    def model(name: str, adapter: str | Path | None, rows: Rows) -> Path:
        with Progress(console=console) as progress:
            task = progress.add_task(f"Teaching {name}", total=None)

            def report(now: training.Progress) -> None:
                progress.update(task, completed=now.step, total=now.steps)

            if adapter is None:
                teach(base, rows, work / name, report)
            else:
                merged(base, Path(adapter), work / name)
        return work / name

    target = model("target", options.target, known_rows(options.tofu))
    for author in options.authors:
        name = author.replace(":", "-")
        place = work / name
        ask_for(options.tofu, author, place)
        never_knew = model(f"{name}-never-knew", given.get(author), known_rows(options.tofu, author))
        found[author] = remove(name, place, target, never_knew, options)
        console.print(table(found))
    if clean:
        keep({**record, "within": options.within, "authors": found})


if __name__ == "__main__":
    main()
