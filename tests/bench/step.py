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
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.default_model import default_model
from serve.settings import Settings

ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
TOKENS = 48
PHRASES = 10_000


def measure(guarded: bool, model: Path, repeats: int, batch: int) -> dict[str, float]:
    """Milliseconds of processor time for each step, by what is engaged. Runs in a process of its own."""
    from vllm import LLM, SamplingParams

    from guards.base_model import describe_base
    from guards.contrastive.declaration import Contrast
    from guards.suppression.automaton import compile_phrases
    from guards.suppression.declaration import Suppress
    from guards.types import ArtifactRef, Entry, Plan
    from serve.protocol.artifacts import artifact_path
    from serve.protocol.vocabulary import vocabulary_of
    from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, PLAN_KEY, encode_plan
    from tests.assistants import random_assistant

    directory = Path(tempfile.mkdtemp())
    options: dict[str, Any] = {}
    if guarded:
        options = {
            "hf_overrides": {"architectures": ["LetheLlamaForCausalLM"]},
            "logits_processors": ["serve.engine.processor:LetheProcessor"],
            "additional_config": {PLAN_KEY: {ARTIFACTS_KEY: str(directory), BASE_KEY: describe_base(model).model_dump()}},
            "worker_extension_cls": "serve.engine.worker.WorkerExtension",
        }
    engine = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=batch, **options)

    def saved(guard: str, artifact: Any) -> str:
        path = artifact_path(directory, ArtifactRef(guard, artifact.fingerprint))
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.save(path)
        return str(artifact.fingerprint)

    plans: dict[str, list[tuple[Entry, ...]]] = {"nothing": [()]}
    if guarded:
        engine.collective_rpc("lethe_describe")
        vocabulary = vocabulary_of(engine.get_tokenizer(), 49_152)
        phrases = saved("suppression", compile_phrases([f"Person {i} Example" for i in range(PHRASES)], vocabulary))
        assistants = [saved("contrast", random_assistant(model, "whole", seed, 32)) for seed in range(16)]
        contrasted = [(Contrast(each, "uld", 1.0, 4.0, 0.01),) for each in assistants]
        plans |= {"suppression": [(Suppress(phrases),)], "half contrasted": [contrasted[0], ()]}
        plans |= {"all contrasted": contrasted[:1], "all contrasted, 16 assistants": contrasted}
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 500 + 20 for j in range(32)]} for i in range(batch)]

    def one(entries: list[tuple[Entry, ...]]) -> float:
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=TOKENS,
                ignore_eos=True,
                extra_args={PLAN_KEY: encode_plan(Plan(1, "p", mine))} if (mine := entries[i % len(entries)]) else None,
            )
            for i in range(batch)
        ]
        started = time.process_time()
        engine.generate(prompts, sampling, use_tqdm=False)
        return (time.process_time() - started) * 1_000 / TOKENS

    for entries in plans.values():
        one(entries)  # what is loaded and cached the first time
    taken: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(repeats):
        for name, entries in plans.items():
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
    console, found = Console(), []
    for which in ("plain", "guarded", "plain"):
        with console.status(f"measuring {which} vLLM"):
            command = [sys.executable, "-m", "tests.bench.step", f"--only={which}"]
            command += [f"--repeats={arguments.repeats}", f"--batch={arguments.batch}"]
            ran = subprocess.run(command, env={**os.environ, **ENGINE}, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.stderr[-3_000:])
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    from tests.bench.contrast import arithmetic

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
