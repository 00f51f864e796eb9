"""Every guard on a GPU: what CUDA graphs and each attention backend say is what the same backend says without graphs.

Run by ``deploy/check --gpu``. Tiny random models, as on the CPU (`tests.vllm.test_families`), where PyTorch replays the graphs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from tests.vllm.families import Said, ask
from tests.vllm.tiny_models import MODELS

if not torch.cuda.is_available():
    pytest.skip("no GPU here; on a machine with one, deploy/check --gpu runs this", allow_module_level=True)

BACKENDS = {
    "Triton": ({"attention_backend": "TRITON_ATTN", "dtype": "float32"}, 1e-3),
    "Triton, bfloat16": ({"attention_backend": "TRITON_ATTN", "dtype": "bfloat16"}, 0.2),
    "FlashAttention": ({"attention_backend": "FLASH_ATTN", "dtype": "bfloat16"}, 0.2),
    "FlashInfer": ({"attention_backend": "FLASHINFER", "dtype": "bfloat16"}, 0.2),
}
"""Options of the engine; and how far log-probabilities may be apart, in nats: sums are taken in another order."""
HEAD = {"FAMILIES_HEAD": "64"}
"""FlashInfer takes no less."""
MEMORY = {"gpu_memory_utilization": 0.3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Any:
    """Ask once for each family, backend, and with or without graphs."""
    directory = tmp_path_factory.mktemp("gpu")

    @functools.cache
    def once(family: str, backend: str, eager: bool, processes: int = 1) -> dict[str, Any]:
        two = {"tensor_parallel_size": processes} if processes > 1 else {}
        return ask(family, {**BACKENDS[backend][0], **MEMORY, **two, "enforce_eager": eager}, directory, model_path, **HEAD)

    return once


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """The same tokens, up to where two are equally likely, at the same log-probabilities."""
    assert found["failures"] == expected["failures"] and found["closed"] == expected["closed"]
    for name, answers in expected["answers"].items():
        for one, other in zip(found["answers"][name], answers, strict=True):
            assert compared(one, other, tolerance) > 0, name


def compared(one: Said, other: Said, tolerance: float) -> int:
    for place, ((token, logprob), (expected, at)) in enumerate(zip(one, other, strict=True)):
        assert abs(logprob - at) < tolerance, (place, token, expected)
        if token != expected:
            return place
    return len(one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guards_do_in_graphs_what_they_do_without(backend: str, run: Any) -> None:
    found, expected = run("Llama", backend, False), run("Llama", backend, True)
    assert found["described"]["runner"] == "V2" and found["compiled"] and found["failures"] == {}
    assert_same(found, expected, BACKENDS[backend][1])


@pytest.mark.parametrize("family", [family for family in MODELS if family not in ("Llama", "PaddleOCRVL")])
def test_other_families_do_in_graphs_what_they_do_without(family: str, run: Any) -> None:
    backend = "Triton, bfloat16" if "int8" in family else "Triton"  # kernels of eight bits give no float32
    assert_same(run(family, backend, False), run(family, backend, True), BACKENDS[backend][1])


def test_drafts_do_not_change_how_tokens_are_distributed(tmp_path: Path, model_path: Path) -> None:
    drafts = {"speculative_config": {"method": "draft_model", "model": "itself", "num_speculative_tokens": 2}}
    found = ask("Llama", {**BACKENDS["Triton"][0], **MEMORY, **drafts}, tmp_path, model_path, draws=2_000, **HEAD)
    assert found["drafted"] > 0 and found["closed"] == {}
    assert chisquare(found["drawn"], [2_000 * each for each in found["probable"]]).pvalue > 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus_say_what_one_says(run: Any) -> None:
    assert_same(run("Llama", "Triton", False, 2), run("Llama", "Triton", True), 10 * BACKENDS["Triton"][1])
