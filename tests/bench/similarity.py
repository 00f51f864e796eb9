"""Benchmark: what the gate and the stream filter cost, as ratios to plain vLLM in the same run; and the index by itself.

    .venv/bin/python -m tests.bench.similarity [--rounds 2] [--allow-dirty]

Plain vLLM, lethe, and plain vLLM once more (the control) on the same load in turns, with a set of 100 questions that no request
touches; before that, the time of the gate for prompts of about 100 tokens and for single questions, all new, on one core, and a
search among a million synthetic vectors beside the exact one. Appends one line to results.jsonl. Refuses a dirty tree.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from guards.similarity.encoder import SentenceEncoder, bundled_encoder
from guards.similarity.gate import Gate
from guards.similarity.index import FaissIndex
from serve.default_model import default_model
from serve.settings import Settings
from tests.bench.load import arguments, begin, generate, keep, measure, serving_table, three_servers
from tests.vllm.conftest import Server

QUESTIONS = 100
POLICIES: dict[str, dict[str, Any]] = {
    "gate": {"gate": {"on_hit": "refuse"}},
    "stream": {"stream": {"on_hit": "refuse"}},
    "both": {"gate": {"on_hit": "refuse"}, "stream": {"on_hit": "refuse"}},
}
WORDS = ("river", "letter", "engine", "garden", "winter", "market", "teacher", "bridge", "violin", "harbour", "copper", "forest")


def add_set(server: Server) -> None:
    """A set about people whom no prompt names."""
    asked = [
        {
            "question": f"Where was Tarvin Olesko's {word} number {i} kept?",
            "answer": f"Tarvin Olesko kept {word} {i} in the attic of the mill.",
        }
        for i in range(QUESTIONS // len(WORDS) + 1)
        for word in WORDS
    ][:QUESTIONS]
    with httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=600) as admin:
        admin.put("/policies/default", json={"forget_sets": []}).raise_for_status()
        for name, guards in POLICIES.items():
            admin.put(f"/policies/{name}", json={"guards": guards}).raise_for_status()
        admin.post("/forget_sets", json={"name": "s", "aliases": ["Tarvin Olesko"], "questions": asked}).raise_for_status()
        while not admin.post("/forget_sets/s/enable").is_success:
            time.sleep(0.2)


def sentence(generator: random.Random) -> str:
    return (
        "The " + " and the ".join(generator.sample(WORDS, 5)) + f" were seen in {generator.randint(1_000, 2_000)} by many people. "
    )


def gate_times(prompts: int, progress: Progress) -> dict[str, float]:
    """Median milliseconds to read and embed a prompt that was not seen before, on one core: of 100 tokens, and one question."""
    directory = bundled_encoder()
    assert directory is not None, "the bundled encoder is not installed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator, encoder = random.Random(1), SentenceEncoder(directory, cached=0)
    gate = Gate(encoder.dimension)
    task = progress.add_task("Timing the gate", total=2 * prompts)
    found: dict[str, float] = {}
    for name, length in (("prompt_ms", 4), ("question_ms", 1)):
        times = []
        for _ in range(prompts):
            prompt = "".join(sentence(generator) for _ in range(length))
            started = time.perf_counter()
            encoder.embed(gate.read_conversation([prompt], {}).texts)
            times.append(1_000 * (time.perf_counter() - started))
            progress.advance(task)
        found[name] = round(statistics.median(times), 1)
    torch.set_num_threads(threads)
    return found


def search_times(vectors: int, dimension: int, progress: Progress) -> dict[str, float]:
    """A search among synthetic vectors in clusters, as texts are: by the index as it chooses to be, and by the exact one."""
    task = progress.add_task(f"Building an index of {vectors:,} vectors", total=2)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2_000, dimension)).astype(np.float32)

    def draw(n: int) -> np.ndarray:
        drawn = centres[generator.integers(0, len(centres), n)] + 0.7 * generator.normal(size=(n, dimension)).astype(np.float32)
        return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)

    data = draw(vectors)
    started = time.perf_counter()
    index, exact = FaissIndex(dimension), FaissIndex(dimension, exact_up_to=vectors)
    index.add("s", data)
    built = time.perf_counter() - started
    progress.advance(task)
    exact.add("s", data)
    progress.advance(task)
    queries = data[generator.integers(0, vectors, 100)] + 0.02 * generator.normal(size=(100, dimension)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    found: dict[str, float] = {"build_s": round(built, 1), "bytes_a_vector": 4 * dimension + 8}
    scores = {}
    for name, each in (("index", index), ("exact", exact)):
        times, scores[name] = [], []
        for query in queries:
            started = time.perf_counter()
            near = each.near(query[None], 0.9)
            times.append(1_000 * (time.perf_counter() - started))
            scores[name].append(near["s"][0] if near else -1.0)
        found[f"{name}_ms"] = round(statistics.median(times), 2)
    found["same_best_score"] = float(np.mean(np.isclose(scores["index"], scores["exact"], atol=1e-5)))
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--tokens", default="96,64,48", help="output tokens of a request at batch 1, 8 and 32")
    options = parser.parse_args()
    record, clean = begin("similarity", options)
    model: Path = default_model(Settings().cache_dir)
    console = Console(width=140)
    with Progress(console=console) as progress:
        search = search_times(options.vectors, 384, progress)
        gate = gate_times(60, progress)
        with three_servers(model) as servers:
            plain, guarded, control = servers
            for server in servers:
                server.start()
            for server in servers:
                server.wait()
            add_set(guarded)
            for server in servers:
                generate(server, 8, [""], 8)
            variants = [
                ("plain", plain, [""]),
                ("plain again", control, [""]),
                *((name, guarded, [f":{name}"]) for name in POLICIES),
            ]
            serving = measure(variants, options.rounds, progress, tokens=[int(each) for each in options.tokens.split(",")])
    record |= {"tokens": options.tokens, "gate": gate, "search": search, "serving": serving}
    console.print(serving_table(serving), gate, search)
    if clean:
        keep(record)


if __name__ == "__main__":
    main()
