"""Benchmark: tokens a second, time to the first token and peak memory on a GPU, beside plain vLLM in the same run.

    deploy/check --gpu
    .venv/bin/python -m tests.bench.gpu [--models bundled 8b] [--batches 1 32 256] [--repeats 3] [--tokens 128]

vLLM's engine in one process with everything on that it chooses by itself (compilation, CUDA graphs), first without and then with
lethe, and once more without (the control). "8b" has the shape of a model of eight billion parameters and random weights, so that
nothing is downloaded; what guards cost does not depend on what the model knows. On a CPU it runs eager and without graphs, which
only shows that it runs: `--models tiny --batches 2 --tokens 4`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from serve.default_model import default_model
from serve.settings import Settings

if TYPE_CHECKING:
    from tests.bench.offline import Entries

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
MODELS = ("bundled", *SHAPES)
GOALS = {"nothing": 0.99, "suppression": 0.98, "all contrasted": 0.85, "map": 0.97}
"""Of plain vLLM, on an H100, for the shape of 8b."""
PROMPT, LONG_PROMPT = 64, 1_024


def shaped(name: str, directory: Path, tokenizer: Path) -> Path:
    """A model directory without weights (vLLM makes them up), with the bundled model's tokenizer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    model = directory / name
    model.mkdir()
    for each in tokenizer.glob("*token*"):
        (model / each.name).symlink_to(each)
    config = LlamaConfig(**SHAPES[name], vocab_size=49_152, max_position_embeddings=4_096, architectures=["LlamaForCausalLM"])
    config.save_pretrained(model)
    save_file({"nothing": torch.zeros(1)}, model / "model.safetensors")  # what tells models apart must be there
    return model


def measure(guarded: bool, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """By what is engaged: tokens a second for each batch, and seconds to the first token. Runs in a process of its own."""
    from tests.bench.offline import Bench, sizes_of

    directory, bundled, gpu = Path(tempfile.mkdtemp()), default_model(Settings().cache_dir), torch.cuda.is_available()
    model = bundled if name == "bundled" else shaped(name, directory, bundled)
    config = json.loads((model / "config.json").read_bytes())
    bench = Bench.start(
        model,
        directory,
        guarded=guarded,
        dtype="bfloat16" if gpu else "float32",
        enforce_eager=not gpu,
        load_format="auto" if name == "bundled" else "dummy",
        max_model_len=2_048,
        max_num_seqs=max(options.batches),
        enable_prefix_caching=False,
    )
    asked: dict[str, Entries] = {"nothing": [()]}
    if guarded:
        sizes = sizes_of(config)
        asked |= {"suppression": bench.suppression(), **bench.contrast(sizes), **bench.steering(sizes)}
    found: dict[str, Any] = {}
    for engaged, entries in asked.items():
        found[engaged] = {}
        for batch in options.batches:
            bench.run(batch, entries, prompt=PROMPT, tokens=4)  # what is loaded the first time
            taken = [timed(bench, batch, entries, PROMPT, options.tokens) for _ in range(options.repeats)]
            found[engaged][str(batch)] = batch * options.tokens / min(taken)
        bench.run(1, entries, prompt=LONG_PROMPT, tokens=1)
        found[engaged]["first"] = min(timed(bench, 1, entries, LONG_PROMPT, 1) for _ in range(options.repeats))
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"found": found, "memory": memory, "device": torch.cuda.get_device_name() if gpu else "a CPU"}


def timed(bench: Any, batch: int, entries: Entries, prompt: int, tokens: int) -> float:
    started = time.perf_counter()
    bench.run(batch, entries, prompt=prompt, tokens=tokens)
    return time.perf_counter() - started


def compare(name: str, options: argparse.Namespace, console: Console) -> None:
    from tests.bench.offline import ENGINE

    own = ("VLLM_ENABLE_V1_MULTIPROCESSING", "HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL") if torch.cuda.is_available() else ENGINE
    runs = []
    for which in ("plain", "guarded", "plain"):
        with console.status(f"{name}: measuring {which} vLLM"):
            command = [sys.executable, "-m", "tests.bench.gpu", f"--only={which}", "--models", name, f"--tokens={options.tokens}"]
            command += ["--batches", *map(str, options.batches), f"--repeats={options.repeats}"]
            environment = {**os.environ, **{each: ENGINE[each] for each in own}}
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.stderr[-3_000:])
        runs.append(json.loads(ran.stdout.splitlines()[-1]))
    first, guarded, again = runs
    columns = [*map(str, options.batches), "first"]
    plain = {each: statistics.mean(run["found"]["nothing"][each] for run in (first, again)) for each in columns}
    table = Table(
        "engaged",
        *(f"batch {each}" for each in options.batches),
        f"first token after {LONG_PROMPT}",
        "goal",
        title=f"{name} on {guarded['device']}: tokens a second and first token, of plain vLLM's",
    )
    shown = [f"{plain[each]:.0f}/s" for each in columns[:-1]]
    table.add_row("plain vLLM", *shown, f"{plain['first'] * 1e3:.1f} ms", "")
    ratios = {each: first["found"]["nothing"][each] / again["found"]["nothing"][each] for each in columns}
    table.add_row("control", *(f"{ratios[each]:.2f}" for each in columns), "")
    for engaged, values in guarded["found"].items():
        speeds = [f"{values[each] / plain[each]:.2f}" for each in columns[:-1]]
        table.add_row(
            engaged, *speeds, f"{plain['first'] / values['first']:.2f}", str(GOALS.get(engaged, "")) if name == "8b" else ""
        )
    console.print(table)
    console.print(f"peak memory: plain {first['memory'] / 2**30:.2f} GiB, guarded {guarded['memory'] / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["bundled", "8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--only", choices=("plain", "guarded"), help="measure one of them here and print it as JSON")
    options = parser.parse_args()
    for name in options.models:
        if options.only:
            print(json.dumps(measure(options.only == "guarded", name, options)))
        else:
            compare(name, options, Console(width=140))


if __name__ == "__main__":
    main()
