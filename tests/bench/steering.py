"""Benchmark: what steering costs, as ratios to plain vLLM in the same run.

    .venv/bin/python -m tests.bench.steering [--rounds 2] [--allow-dirty]

Plain vLLM, lethe, and plain vLLM once more (the control) on the same load in turns: a set with random artifacts of the usual sizes,
under an adapter (8 layers, rank 32), a map (rank 32), both, and contrast for comparison. Appends one line to results.jsonl. Refuses
a dirty tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.progress import Progress

from guards.base_model import describe_base
from guards.forget_set import ForgetSet
from guards.steering.artifact import Steering, SteeringManifest, SteeringRecipe
from guards.types import ArtifactRef
from serve.default_model import default_model
from serve.protocol.artifacts import artifact_path
from serve.registry.records import Artifact, now
from serve.registry.store import Registry
from serve.settings import Settings
from tests.assistants import SIZES, give, random_assistant
from tests.bench.load import arguments, begin, generate, keep, measure, serving_table, three_servers
from tests.vllm.conftest import Server

OFF = {"contrast": {"enabled": False}}
POLICIES = {
    "adapter": {**OFF, "steering": [{"method": "adapter"}]},
    "map": {**OFF, "steering": [{"method": "project"}]},
    "adapter and map": {**OFF, "steering": [{"method": "project"}, {"method": "adapter"}]},
    "contrast": {},
}


def random_steering(
    model: Path,
    method: str,
    *,
    layers: int = 8,
    depth: float = 0.7,
    rank: int = 32,
    size: float = 0.01,
    seed: int = 3,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
) -> Steering:
    """An artifact for the default model that says nothing in particular.

    Args:
        size: of what it changes; small enough to stay a language. sizes: of the model's projections.
    """
    generator, base = torch.Generator().manual_seed(seed), describe_base(model)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    recipe = SteeringRecipe(method=method, layers=layers, depth=depth, rank=rank)  # type: ignore[arg-type]
    manifest = SteeringManifest(base=base, recipe=recipe, data="random")
    if method != "adapter":
        directions, _ = torch.linalg.qr(random(base.hidden_size, rank))
        center = random(base.hidden_size) * 0.1
        return Steering(manifest, {"into": directions, "out": -directions.T.contiguous(), "center": center})
    tensors = {}
    for i in range(layers):
        for module in sizes:
            size_in, size_out = sizes[module]
            tensors[f"layers.{i}.{module}.A"] = random(rank, size_in) / math.sqrt(size_in)
            tensors[f"layers.{i}.{module}.B"] = random(size_out, rank) * size
    return Steering(manifest, tensors)


def give_steering(admin: httpx.Client, state: Path, content: ForgetSet, made: dict[str, Steering]) -> None:
    """Give a set that is there its artifacts, by method."""
    registry = Registry(state / "lethe.db")
    for method, steering in made.items():
        path = artifact_path(state / "artifacts", ArtifactRef("steering", steering.fingerprint))
        path.parent.mkdir(parents=True, exist_ok=True)
        steering.save(path)
        artifact = Artifact(method, steering.fingerprint, "ready", "random", now())  # type: ignore[arg-type]
        registry.put_trained(content.name, content.fingerprint, artifact, actor="test")
    registry.close()


def add_set(server: Server, model: Path) -> None:
    state = server.directory / "state"
    with httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=600) as admin:
        admin.put("/policies/default", json={"forget_sets": []}).raise_for_status()
        registry = Registry(state / "lethe.db")
        give(admin, registry, state, "s", random_assistant(model, rank=32))
        content = registry.content("s")
        registry.close()
        made = {method: random_steering(model, method) for method in ("adapter", "project")}
        give_steering(admin, state, content, made)
        for name, guards in POLICIES.items():
            admin.put(f"/policies/{name.replace(' ', '-')}", json={"forget_sets": ["s"], "guards": guards}).raise_for_status()
        admin.post("/forget_sets/s/enable").raise_for_status()


def main() -> None:
    options = arguments(__doc__, rounds=2).parse_args()
    record, clean = begin("steering", options)
    model = default_model(Settings().cache_dir)
    console = Console(width=140)
    with Progress(console=console) as progress, three_servers(model) as servers:
        plain, guarded, control = servers
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        add_set(guarded, model)
        for server in servers:
            generate(server, 8, [""], 8)
        generate(guarded, 8, [f":{name.replace(' ', '-')}" for name in POLICIES], 8)
        variants = [
            ("plain", plain, [""]),
            ("plain again", control, [""]),
            ("nothing in force", guarded, [""]),
            *((name, guarded, [f":{name.replace(' ', '-')}"]) for name in POLICIES),
            ("all of them in one batch", guarded, ["", *(f":{name.replace(' ', '-')}" for name in POLICIES)]),
        ]
        serving = measure(variants, options.rounds, progress, tokens=(48, 32, 16))
    console.print(serving_table(serving))
    if clean:
        keep({**record, "serving": serving})


if __name__ == "__main__":
    main()
