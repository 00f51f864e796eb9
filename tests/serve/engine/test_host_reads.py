"""How often a step waits for the device: as often for many requests as for a few."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guards.contrastive.declaration import Contrast
from guards.steering.declaration import Steer
from guards.suppression.automaton import compile_phrases
from guards.types import AssistantLines, Plan
from tests.plans import suppress
from tests.serve.engine.test_fail_closed import VOCABULARY, engine

pytest.importorskip("vllm", reason="vLLM is not installed: the engine's side needs it")
from serve.engine.attention import Lines, PagedBatch

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: values that Python reads, and results whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name in ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "repeat_interleave"):
            self.counts[name] += 1
        if name in ("index", "index_put_") and any(each is not None and each.dtype is torch.bool for each in args[1]):
            self.counts["boolean index"] += 1
        return function(*args, **kwargs or {})


class Fork:
    """Says something, whatever it is asked."""

    loaded = frozenset({"a", "b"})

    def run(self, lines: Lines, assistants: Any, pages: PagedBatch) -> Tensor:
        return torch.ones(len(lines.token), 4)


def reads(requests: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    guards = engine()
    phrases = compile_phrases(["ab"], VOCABULARY)
    guards.suppression.load({phrases.fingerprint: phrases})
    guards.contrast._fork, guards.contrast._proved = Fork(), True  # type: ignore[assignment]
    guards.contrast._guard._difference = {"a": False, "b": True}
    guards.steering._steerer = SimpleNamespace(able=lambda _: True)  # type: ignore[assignment]
    guards.step.pages = PagedBatch((), (), torch.full((requests,), 3, dtype=torch.int32))
    entries = (Contrast("a", "uld", 1.0, 1.0, 0.1), Contrast("b", "uld", 1.0, 1.0, 0.1), *suppress(phrases.fingerprint))
    plans = [Plan(1, "p", (*entries, Steer("s", 1.0))), Plan(1, "q", entries[:1]), Plan(1, "r", entries[2:]), None]
    slots = [-1 if (plan := plans[i % 4]) is None else guards.slots.admit(plan, [0, 1], []) for i in range(requests)]
    tokens, positions, hidden = torch.zeros(requests), torch.full((requests,), 2), torch.randn(requests, 4)
    logits, said = torch.randn(requests, VOCABULARY.size), torch.randn(100, VOCABULARY.size)
    counting = HostReads()
    with monkeypatch.context() as patch, counting:
        for name in READS:
            plain = getattr(Tensor, name)

            def counted(tensor: Tensor, *args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
                counting.counts[name] += 1
                return plain(tensor, *args, **kwargs)

            patch.setattr(Tensor, name, counted)
        tags = guards.enter(slots, torch.arange(requests + 1), tokens, positions, torch.float32)
        spoken = guards.contrast.speak(tags, hidden)
        assert spoken is not None
        result = guards.apply(logits, tags, AssistantLines(spoken.row, spoken.entries, said[: len(spoken.row)]))
    assert guards.closer.counts == {} and torch.isfinite(result).all()
    return counting.counts


def test_a_step_of_many_requests_waits_for_the_device_no_more_often_than_one_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = reads(4, monkeypatch), reads(8, monkeypatch)
    assert few == many
    assert sum(many.values()) < 40
