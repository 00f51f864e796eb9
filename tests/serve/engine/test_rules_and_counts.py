"""Which engines are refused, and how closed rows are counted in the API process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: its engine client is what is asked")
from prometheus_client import REGISTRY

from serve.generation import workers
from serve.protocol.engine_rules import refuse_unguarded


def config(**changes: Any) -> Any:
    plain = {
        "v2": True,
        "eager": False,
        "device": "cuda",
        "mrope": False,
        "drafts": None,
        "takes": "standard",
        "stages": 1,
        "sleeps": False,
    } | changes
    drafts = plain["drafts"] and SimpleNamespace(
        method=plain["drafts"],
        use_ngram=lambda: plain["drafts"] == "ngram",
        uses_draft_model=lambda: plain["drafts"] == "draft_model",
        rejection_sample_method=plain["takes"],
    )
    return SimpleNamespace(
        use_v2_model_runner=plain["v2"],
        speculative_config=drafts,
        model_config=SimpleNamespace(
            enforce_eager=plain["eager"], uses_mrope=plain["mrope"], enable_sleep_mode=plain["sleeps"], model="m"
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=plain["stages"]),
        device_config=SimpleNamespace(device_type=plain["device"]),
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"drafts": "ngram", "v2": False, "eager": True}, "Model Runner V2 only"),
        ({"drafts": "eagle"}, "'eagle' has not been proved"),
        ({"drafts": "ngram", "takes": "synthetic"}, "'synthetic' takes drafted tokens"),
        ({"v2": False}, "--enforce-eager"),
        ({"sleeps": True}, "--enable-sleep-mode"),
        ({"v2": False, "eager": True, "stages": 2}, "--pipeline-parallel-size"),
        ({"mrope": True, "v2": False, "eager": True}, "M-RoPE"),
    ],
)
def test_an_engine_that_would_bypass_the_guards_is_refused_with_the_way_out(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        refuse_unguarded(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stages": 2},
        {"mrope": True},
        {"drafts": "ngram"},
        {"drafts": "draft_model"},
        {"v2": False, "eager": True},
        {"v2": False, "device": "cpu"},
    ],
)
def test_an_engine_in_which_everything_passes_the_guards_is_taken(changes: dict[str, Any]) -> None:
    refuse_unguarded(config(**changes))


def test_closed_rows_are_counted_once_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[{"contrast": 2}, {"contrast": 2}], RuntimeError("busy"), [{"contrast": 5, "engine": 1}, {"contrast": 4}]])

    class Client:
        async def collective_rpc(self, name: str) -> Any:
            assert name == "lethe_closed_rows"
            answer = next(answers, asyncio.CancelledError())
            if isinstance(answer, BaseException):
                raise answer
            return answer

    def counted(guard: str) -> float:
        return REGISTRY.get_sample_value("lethe_closed_rows_total", {"guard": guard}) or 0.0

    before = counted("contrast"), counted("engine")
    monkeypatch.setattr(workers, "ASK_EVERY_S", 0.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(workers.count_closed_rows(Client()))  # type: ignore[arg-type]
    assert (counted("contrast"), counted("engine")) == (before[0] + 5, before[1] + 1)
