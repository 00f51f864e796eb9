"""Every guard of the engine on tiny random models of several families, runners and processes, each on an engine of its own.

What is right is known without another implementation: an assistant that is the base changes nothing, one that is not changes
something, and an engine in two processes, or on Model Runner V2, says what one process on V1 says.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.families import Order
from tests.vllm.v2.conftest import V2

TOLERANCE = 1e-3
"""Nats: sums are taken in another order in a batch of another size, or in two halves."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma3": ("Gemma3TextConfig", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "Qwen3Moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}),
}
ACTS = ("contrast", "adapter", "project", "corrupt")
"""What a family may lack; suppression acts on all."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Any:
    """Ask once for each family and engine."""
    directory = tmp_path_factory.mktemp("families")

    @functools.cache
    def once(family: str, v2: bool, engine: str) -> dict[str, Any]:
        config, options = MODELS[family]
        order: Order = {
            "config": config,
            "model": f"{family}ForCausalLM",
            "options": options,
            "engine": json.loads(engine),
            "directory": str(directory / family),
            "tokenizer": str(model_path),
        }
        root = Path(__file__).parents[2]
        path = os.pathsep.join(filter(None, [V2["PYTHONPATH"] if v2 else "", str(root), os.environ.get("PYTHONPATH")]))
        alone = {} if "tensor_parallel_size" in engine else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        cache = {"VLLM_CACHE_ROOT": str(directory / "cache"), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **cache, **alone, **(V2 if v2 else {}), "PYTHONPATH": path}
        command = [sys.executable, "-m", "tests.vllm.families", json.dumps(order)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=root)
        assert ran.returncode == 0, ran.stderr[-3000:]
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        assert found["described"]["runner"] == ("V2" if v2 else "V1")
        return found

    def asked(family: str, v2: bool = False, **engine: Any) -> dict[str, Any]:
        return once(family, v2, json.dumps(engine, sort_keys=True))

    return asked


def worst(one: list[Any], other: list[Any]) -> float:
    """The largest difference between what two engines say of the same tokens, in nats."""
    assert [[token for token, _ in answer] for answer in one] == [[token for token, _ in answer] for answer in other]
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for (_, a), (_, b) in zip(x, y, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("family", MODELS)
def test_every_guard_of_the_engine_acts_on_a_family_or_says_why_it_does_not(family: str, run: Any) -> None:
    found = run(family)
    said, failures = found["answers"], found["failures"]
    if "zero" not in failures:
        assert worst(said["zero"], said["none"]) < TOLERANCE, "an assistant that is the base changed an answer"
    acting = [name for name in ACTS if name not in failures]
    assert all(said[name] != said["none"] for name in acting), "a guard changed nothing"
    pairs = zip(said["none"], said["suppression"], strict=True)
    assert all([token for token, _ in one][2:4] != [token for token, _ in other][2:4] for one, other in pairs), "a phrase was said"
    assert len({json.dumps(said[name]) for name in ("none", *acting)}) == len(acting) + 1, "two guards do the same"
    assert bool(found["closed"]) == bool(failures), "what cannot act is closed, and nothing else"
    assert ("contrast" in found["described"]["unable"]) == ("contrast" in failures)
    row = f"| {family} | " + " | ".join("yes" if name in acting else "no" for name in ACTS) + " |"
    assert row in (Path(__file__).parents[2] / "guards" / "README.md").read_text(), f"the table of families lacks {row!r}"


TWO = {"tensor_parallel_size": 2}
NGRAMS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 1}}
DRAFTS = {"speculative_config": {"method": "draft_model", "model": "itself", "num_speculative_tokens": 2}}
ENGINES = {"V1 in two": (False, TWO), "V2": (True, {}), "V2, ngram": (True, NGRAMS), "V2, draft model": (True, DRAFTS)}


@pytest.mark.parametrize("engine", ENGINES)
def test_another_engine_says_what_one_eager_process_on_v1_says(engine: str, run: Any) -> None:
    v2, options = ENGINES[engine]
    found, expected = run("Llama", v2, **options), run("Llama")
    assert found["failures"] == {} and found["closed"] == {}
    assert (found["drafted"] > 0) == ("speculative_config" in options), "no drafted token was taken, so this shows nothing"
    for name, answers in expected["answers"].items():
        assert worst(found["answers"][name], answers) < TOLERANCE, name


@pytest.mark.parametrize("seed", [0, 1], ids=["first start", "second start"])
def test_a_compiled_model_is_contrasted_as_an_eager_one_and_says_that_it_is_not_steered(seed: int, run: Any) -> None:
    found, expected = run("Llama", enforce_eager=False, seed=seed), run("Llama")
    assert set(found["described"]["unable"]) == {"steering", "corrupt"}
    assert set(found["failures"]) == {"adapter", "project"}
    assert all("start with --enforce-eager" in reason for reason in found["failures"].values())
    for name in ("none", "zero", "contrast", "suppression"):
        assert worst(found["answers"][name], expected["answers"][name]) < TOLERANCE, name
    assert set(found["closed"]) == {"steering", "corrupt"}
