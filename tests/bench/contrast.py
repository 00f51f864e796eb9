"""Benchmark: what contrast costs, as ratios to plain vLLM measured in the same run.

    .venv/bin/python -m tests.bench.contrast [--rounds 3] [--allow-dirty]

Plain vLLM, lethe, and plain vLLM once more (the control) on the same load in turns; assistants of random weights and the default
rank. ``arithmetic`` is what the fork's own multiplications would cost if all else were free: 1 / (1 + (K layers + head) / base).
Appends one line to results.jsonl. Refuses a dirty tree.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from guards.contrastive.assistant import FORKED_LAYERS
from serve.default_model import default_model
from serve.registry.store import Registry
from serve.settings import Settings
from tests.assistants import give, random_assistant
from tests.bench.load import arguments, begin, generate, keep, measure, memory_mib, serving_table, three_servers
from tests.vllm.conftest import Server

SETS = 16
RANK = 32
LONG = "The sea was calm and the wind was low. " * 150


def arithmetic(model: Path) -> float:
    """The least that K more layers and one more head must cost, from the sizes of their matrices."""
    config = json.loads((model / "config.json").read_text())
    hidden, head_size = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * config["num_key_value_heads"] * head_size + 3 * hidden * config["intermediate_size"]
    head = hidden * config["vocab_size"]
    return 1 / (1 + (FORKED_LAYERS * layer + head) / (config["num_hidden_layers"] * layer + head))


def add_assistants(server: Server, model: Path) -> dict[str, Any]:
    """Sixteen sets, and policies for one, four and all of them. Returns time to enable and memory of each."""
    state = server.directory / "state"
    registry = Registry(state / "lethe.db")
    before, enabling = memory_mib(server), []
    with httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=600) as admin:
        admin.put("/policies/default", json={"forget_sets": []}).raise_for_status()
        for number in range(SETS):
            give(admin, registry, state, f"s{number}", random_assistant(model, "whole", number, RANK))
            started = time.perf_counter()
            admin.post(f"/forget_sets/s{number}/enable").raise_for_status()
            enabling.append((time.perf_counter() - started) * 1_000)
            admin.put(f"/policies/s{number}", json={"forget_sets": [f"s{number}"]}).raise_for_status()
    registry.close()
    return {
        "enable_first_ms": round(enabling[0], 1),
        "enable_ms": round(statistics.median(enabling[1:]), 1),
        "memory_each_mib": round((memory_mib(server) - before) / SETS, 1),
    }


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", default="128,64,32", help="output tokens of a request at batch 1, 8 and 32")
    options = parser.parse_args()
    record, clean = begin("contrast", options)
    model, console = default_model(Settings().cache_dir), Console(width=140)
    with three_servers(model) as servers, Progress(console=console) as progress:
        plain, guarded, control = servers
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        assistants = add_assistants(guarded, model)
        for server in servers:
            generate(server, 8, [""], 8)
        variants = [
            ("plain", plain, [""]),
            ("plain again", control, [""]),
            ("nothing engaged", guarded, [""]),
            ("half engaged, 1 assistant", guarded, ["", ":s0"]),
            ("all engaged, 1 assistant", guarded, [":s0"]),
            ("all engaged, 4 assistants", guarded, [f":s{number}" for number in range(4)]),
            ("all engaged, 16 assistants", guarded, [f":s{number}" for number in range(SETS)]),
        ]
        serving = measure(variants, options.rounds, progress, tokens=[int(each) for each in options.tokens.split(",")])
        prefill: dict[str, list[float]] = {"plain": [], "engaged": []}
        for turn in range(2 * options.rounds):
            for name, server, policies in (("plain", plain, [""]), ("engaged", guarded, [":s0"])):
                prefill[name].append(generate(server, 1, policies, 1, f"{turn} {name} ", LONG).first_token_ms)
    record |= {
        "layers": FORKED_LAYERS,
        "rank": RANK,
        "tokens": options.tokens,
        "arithmetic": round(arithmetic(model), 3),
        "assistants": assistants,
        "long_prompt_first_token_ratio": round(statistics.median(prefill["plain"]) / statistics.median(prefill["engaged"]), 3),
        "serving": serving,
    }
    console.print(
        serving_table(serving, f"arithmetic {record['arithmetic']}"),
        assistants,
        f"first token of a long prompt: {record['long_prompt_first_token_ratio']} x plain",
    )
    if clean:
        keep(record)


if __name__ == "__main__":
    main()
