"""Every guard of the engine on tiny random models of several families, runners and processes, each on an engine of its own.

What is right is known without another implementation: an assistant that is the base changes nothing, one that is not changes
something, and an engine in two processes, or on Model Runner V2, or compiled, or in graphs (`tests.rig.graphs_on_cpu`), says what
one eager process on V1 says.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.families import ask
from tests.vllm.tiny_models import MODELS, RUN
from tests.vllm.v2.conftest import V2
from tests.vllm.waiting import waiting

TOLERANCE = 1e-3
"""Nats: sums are taken in another order in a batch of another size, or in two halves."""
ACTS = ("contrast", "adapter", "project", "corrupt")
"""What a family may lack; suppression acts on all."""
FEW = ("none", "zero", "contrast", "all")
"""Plans that show what the fork reads."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Any]:
    """Ask once for each family and engine."""
    directory = tmp_path_factory.mktemp("families")
    with waiting(directory) as in_environment:

        @functools.cache
        def once(family: str, v2: bool, engine: str, graphs: str, **options: Any) -> dict[str, Any]:
            environment = (V2 if v2 else {}) | KINDS.get(graphs, {})
            options |= {"graphs": graphs, "run": in_environment}
            found = ask(family, json.loads(engine), directory, model_path, **options, **environment)
            assert found["described"]["runner"] == ("V2" if v2 else "V1")
            return found

        def asked(
            family: str,
            v2: bool = False,
            graphs: str = "",
            *,
            attention: str = "",
            stages: str = "",
            few: bool = False,
            **engine: Any,
        ) -> dict[str, Any]:
            fewer = {"prompts": 2, "plans": FEW} if few else {}
            return once(family, v2, json.dumps(engine, sort_keys=True), graphs, attention=attention, stages=stages, **fewer)

        yield asked


def worst(one: list[Any], other: list[Any]) -> float:
    """The largest difference between what two engines say of the same tokens, in nats."""
    assert [[token for token, _ in answer] for answer in one] == [[token for token, _ in answer] for answer in other]
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for (_, a), (_, b) in zip(x, y, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("family", MODELS)
def test_every_guard_of_the_engine_acts_on_a_family_or_says_why_it_does_not(family: str, run: Any) -> None:
    v2, options = RUN.get(family, (False, {}))
    found = run(family, v2, **options)
    said, failures = found["answers"], found["failures"]
    if "zero" not in failures:
        assert worst(said["zero"], said["none"]) < TOLERANCE, "an assistant that is the base changed an answer"
    acting = [name for name in ACTS if name not in failures]
    assert all(said[name] != said["none"] for name in acting), "a guard changed nothing"
    for one, other, at in zip(said["none"], said["suppression"], found["suppressed"], strict=True):
        assert [token for token, _ in one[at : at + 2]] != [token for token, _ in other[at : at + 2]], "a phrase was said"
    assert len({json.dumps(said[name]) for name in ("none", *acting)}) == len(acting) + 1, "two guards do the same"
    assert bool(found["closed"]) == bool(failures), "what cannot act is closed, and nothing else"
    assert ("contrast" in found["described"]["unable"]) == ("contrast" in failures)
    row = f"| {family} | " + " | ".join("yes" if name in acting else "no" for name in ACTS) + " |"
    assert row in (Path(__file__).parents[2] / "guards" / "README.md").read_text(), f"the table of families lacks {row!r}"


TWO = {"tensor_parallel_size": 2}
NGRAMS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 1}}
DRAFTS = {"speculative_config": {"method": "draft_model", "model": "itself", "num_speculative_tokens": 2}}
ENGINES = {"V1 in two": (False, TWO), "V2 in two": (True, TWO), "V2, ngram": (True, NGRAMS), "V2, draft model": (True, DRAFTS)}


def assert_same(found: dict[str, Any], expected: dict[str, Any], few: bool = False) -> None:
    assert found["failures"] == {} and found["closed"] == {} and found["described"]["unable"] == {}
    plans, prompts = ({*FEW, "suppression"}, 2) if few else (expected["answers"].keys(), 3)
    assert found["answers"].keys() == plans
    for name, said in found["answers"].items():
        assert worst(said, expected["answers"][name][:prompts]) < TOLERANCE, name


@pytest.mark.parametrize("engine", ENGINES)
def test_another_engine_says_what_one_eager_process_on_v1_says(engine: str, run: Any) -> None:
    v2, options = ENGINES[engine]
    found = run("Llama", v2, **options)
    assert_same(found, run("Llama"))
    assert (found["drafted"] > 0) == ("speculative_config" in options), "no drafted token was taken, so this shows nothing"


def test_a_mixture_of_experts_says_on_v2_what_it_says_on_v1(run: Any) -> None:
    assert_same(run("Qwen3Moe", True), run("Qwen3Moe"))


def test_the_fork_reads_what_another_backend_of_attention_has_written(run: Any) -> None:
    """Triton's, its kernels interpreted; its metadata by its own builder. Slow, so few plans, and not the longest prompt."""
    assert_same(run("Llama", True, attention="TRITON_ATTN", few=True), run("Llama"), few=True)


def test_in_a_pipeline_each_stage_steers_its_own_layers_and_the_last_runs_the_assistants(run: Any) -> None:
    """The map acts in the first stage, the adapter in both."""
    assert_same(run("Llama", True, stages="2,4", pipeline_parallel_size=2), run("Llama"))


def test_a_compiled_model_says_what_an_eager_one_says_also_when_it_comes_from_vllms_cache(run: Any) -> None:
    for start in range(2):
        found = run("Llama", enforce_eager=False, seed=start)
        assert found["compiled"] and found["from_disk"] == (start == 1)
        assert_same(found, run("Llama"))


KINDS = {
    "FULL": {"VLLM_CPU_CI_ENV": "1"},  # traced once, and not made into kernels of its own
    "PIECEWISE": {"VLLM_CPU_CI_ENV": "1", "VLLM_DISABLE_COMPILE_CACHE": "1"},
    "FULL_AND_PIECEWISE": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
}
"""Of graphs: whole ones of a compiled model, those of the pieces into which vLLM splits it, and pieces of an eager one."""


@pytest.mark.parametrize(("graphs", "processes"), [*((kind, 1) for kind in KINDS), ("FULL", 2)])
def test_graphs_captured_while_nobody_is_guarded_do_what_the_guards_of_later_requests_ask(
    graphs: str, processes: int, run: Any
) -> None:
    compiled = graphs != "FULL_AND_PIECEWISE"
    options = {"enforce_eager": False} | ({} if compiled else {"compilation_config": {"mode": 0}}) | (TWO if processes > 1 else {})
    found = run("Llama", True, graphs, **options)
    assert found["compiled"] == compiled
    assert found["replayed"] == [[0, 1]] * processes, "graphs ran with steering and without"
    assert_same(found, run("Llama"))
