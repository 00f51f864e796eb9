"""Whatever goes wrong in the engine, the rows that it concerns are closed and counted, no others are, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from guards.closing import RowCloser
from guards.contrastive.declaration import Contrast
from guards.errors import InvalidArtifact
from guards.steering.declaration import Corrupt, Steer
from guards.suppression.guard import SuppressionGuard
from guards.suppression.vocabulary import Vocabulary
from guards.types import Entry, Plan, Rows
from serve.engine.artifacts import ArtifactCache
from serve.engine.context import Context
from serve.engine.contrast import ForkedContrast
from serve.engine.engine_guards import EngineGuards
from serve.engine.slots import SlotTable
from serve.engine.steer_hooks import Steerer, _Pass
from serve.engine.steering import SteeringInNetwork
from serve.engine.step import Step
from serve.engine.tracker_v1 import tags_of_context
from tests.plans import suppress

pytest.importorskip("vllm", reason="vLLM is not installed: the engine's side needs it")

VOCABULARY = Vocabulary([b"a", b"b", b"c", b"<end>"], special_ids=[3])
END = 3


@dataclass(frozen=True, slots=True, order=True)
class Foreign(Entry):
    guard: ClassVar[str] = "foreign"


class ForeignGuard:
    """A LogitsGuard of somebody else."""

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        return logits


PLANS = {
    "suppression": Plan(1, "suppression", suppress("missing")),
    "contrast": Plan(1, "contrast", (Contrast("missing", "uld", 1.0, 1.0, 0.1),)),
    "steering": Plan(1, "steering", (Steer("missing", 1.0),)),
    "corrupt": Plan(1, "corrupt", (Corrupt("flip_sign_first_n", 1.0, 8, 0, ((0, 1),)),)),
    "foreign": Plan(1, "foreign", (Foreign(),)),
}


def engine(processes: int = 1) -> EngineGuards:
    """The guards of an engine that has loaded nothing, alone or one of several processes."""
    guards = EngineGuards.__new__(EngineGuards)
    guards.device = torch.device("cpu")
    guards.slots, guards.step = SlotTable(8, 32, VOCABULARY.special, guards.device), Step()
    guards.closer = RowCloser(torch.from_numpy(VOCABULARY.lengths > 0))
    context: Any = SimpleNamespace(
        vocabulary=VOCABULARY, device=guards.device, closer=guards.closer, slots=guards.slots, step=guards.step, base=None
    )
    shared: Any = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=processes, pipeline_parallel_size=1))
    context.stop_unless_alone = Context.stop_unless_alone.__get__(SimpleNamespace(vllm_config=shared))
    guards._context = context
    guards.suppression = SuppressionGuard(context)
    guards.contrast, guards.steering = ForkedContrast(context), SteeringInNetwork(context)
    guards._guards = {
        "steering": guards.steering,
        "contrast": guards.contrast,
        "suppression": guards.suppression,
        "foreign": ForeignGuard(),
    }
    return guards


def step(guards: EngineGuards, *plans: Plan) -> tuple[Tensor, Tensor]:
    """One token of each request, the last of which is guarded by nobody: what their rows carry, and their logits."""
    requests = [guards.slots.admit(plan, [0, 1], []) for plan in plans]
    count = len(requests) + 1
    tags = guards.enter([*requests, -1], torch.arange(count + 1), torch.ones(count), torch.ones(count).long(), torch.float32)
    return tags, torch.randn(count, VOCABULARY.size)


def closed(logits: Tensor) -> list[bool]:
    assert torch.isfinite(logits[:, END]).all()
    return (logits[:, :END] < -1e6).all(dim=1).tolist()


def broken(*_: Any, **__: Any) -> Any:
    raise IndexError("as code may")


def other_shape(logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
    return logits[:, :2]


@pytest.mark.parametrize("name", ["suppression", "contrast", "steering", "corrupt"])
def test_a_guard_that_has_not_loaded_what_a_plan_names_closes_its_rows_and_no_others(name: str) -> None:
    guards = engine()
    tags, logits = step(guards, PLANS[name], PLANS["foreign"])
    result = guards.apply(logits.clone(), tags)
    assert closed(result) == [True, False, False]
    assert torch.equal(result[1:], logits[1:])
    assert guards.closer.counts == {name: 1}


@pytest.mark.parametrize("fault", [broken, other_shape])
@pytest.mark.parametrize(
    ("guard", "name"),
    [
        ("suppression", "suppression"),
        ("contrast", "contrast"),
        ("steering", "steering"),
        ("steering", "corrupt"),
        ("foreign", "foreign"),
    ],
)
def test_a_guard_that_fails_closes_the_rows_that_it_was_to_guard(
    guard: str, name: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guards = engine()
    monkeypatch.setattr(guards._guards[guard], "apply", fault, raising=False)
    tags, logits = step(guards, PLANS[name])
    result = guards.apply(logits.clone(), tags)
    assert closed(result) == [True, False]
    assert torch.equal(result[1], logits[1])
    assert guards.closer.counts == {guard: 1}


def test_of_several_processes_none_goes_on_in_a_way_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    guards = engine(processes=2)
    tags, logits = step(guards, PLANS["foreign"])
    monkeypatch.setattr(guards._guards["foreign"], "apply", broken, raising=False)
    with pytest.raises(IndexError, match="as code may"):
        guards.apply(logits, tags)
    monkeypatch.setattr(guards.slots, "record", broken)
    with pytest.raises(IndexError):
        step(guards, PLANS["foreign"])


def test_what_is_lost_in_one_step_may_say_nothing_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    guards = engine()
    with monkeypatch.context() as patch:
        patch.setattr(guards.slots, "record", broken)
        tags, _ = step(guards, PLANS["foreign"])
    tags = guards.enter([0, -1], torch.arange(3), torch.ones(2), torch.ones(2).long(), torch.float32)
    assert closed(guards.apply(torch.randn(2, VOCABULARY.size), tags)) == [True, False]


def test_a_row_is_closed_also_where_logits_have_columns_that_nobody_knows() -> None:
    guards = engine()
    wider = torch.randn(2, VOCABULARY.size + 3)
    guards.closer.close_(wider, torch.tensor([1]), "foreign")
    assert (wider[1] < -1e6).all() and (wider[0] > -1e6).all()


def test_rows_of_which_nobody_knows_whose_they_are_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    guards = engine()
    monkeypatch.setattr(guards.slots, "record", broken)
    tags, logits = step(guards, PLANS["foreign"])
    assert closed(guards.apply(logits, tags)) == [True, True]
    assert guards.closer.counts == {"engine": 2}


def test_rows_that_cannot_be_read_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    guards = engine()
    tags, logits = step(guards, PLANS["foreign"])
    monkeypatch.setattr(guards.slots, "rows", broken)
    assert closed(guards.apply(logits, tags)) == [True, True]


def test_a_tracker_that_disagrees_with_the_batch_closes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    guards = engine()
    guards.slots.admit(PLANS["foreign"], [0, 1], [])
    guards.requests = (0, -1)
    metadata = {"layer": SimpleNamespace(query_start_loc=torch.tensor([0, 1]))}
    monkeypatch.setattr("serve.engine.tracker_v1.get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata))
    tags = tags_of_context(guards, torch.ones(1), torch.ones(1).long())
    assert closed(guards.apply(torch.randn(1, VOCABULARY.size), tags)) == [True]


def test_what_was_not_steered_once_stays_closed_for_its_blocks_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    guards = engine()
    monkeypatch.setattr(guards.steering, "_steerer", SimpleNamespace(able=lambda _: True, begin=broken, clear=lambda: None))
    steered, other = PLANS["steering"], Plan(1, "other", (Steer("another", 0.5),))
    tags, logits = step(guards, steered)
    assert closed(guards.apply(logits.clone(), tags)) == [False, False]
    guards.steering.begin(None, torch.ones(2).long())
    assert closed(guards.apply(logits.clone(), tags)) == [True, False]
    tags, logits = step(guards, steered, other)
    assert closed(guards.apply(logits.clone(), tags)) == [True, False, False]


def test_a_layer_that_cannot_be_steered_lets_the_base_go_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    steerer = Steerer.__new__(Steerer)
    steerer._acted, steerer._idle, steerer._failed, steerer._alone, steerer.buffers = set(), set(), False, True, None
    steerer._acting = {"a"}
    steerer._maps, steerer._pass = {3: {}}, _Pass({"a": torch.ones(1, 1)})
    monkeypatch.setattr(steerer, "_redirect_", broken)
    hidden = torch.ones(1, 2)
    steerer.arm()
    steerer.entered(3, hidden, None)
    assert torch.equal(hidden, torch.ones(1, 2)) and steerer.end() is False


def test_whoever_is_steered_where_nothing_acted_is_closed_from_then_on() -> None:
    steerer = Steerer.__new__(Steerer)
    steerer._acted, steerer._idle, steerer._failed, steerer.buffers = set(), set(), False, None
    steerer._acting = {"missing"}
    steerer.loaded = {"missing": object()}  # type: ignore[dict-item]
    assert steerer.able(PLANS["steering"])
    steerer._pass = _Pass({"missing": torch.ones(1, 1)})
    steerer.arm()
    assert steerer.end() and not steerer.able(PLANS["steering"])
    steerer._pass = _Pass(corrupted=[(torch.tensor([0]), torch.tensor([0]), PLANS["corrupt"].of(Corrupt)[0])])
    steerer.arm()
    assert not steerer.end(), "names that were to be corrupted went through as they are"


def test_artifacts_that_cannot_be_loaded_are_reported_and_the_loaded_ones_stay() -> None:
    loaded: list[list[str]] = []

    def load(artifacts: dict[str, str]) -> None:
        if "bad" in artifacts:
            raise MemoryError("no room")
        loaded.append(sorted(artifacts))

    def read(name: str) -> str:
        if name == "unreadable":
            raise KeyError("as code may")
        if name == "refused":
            raise InvalidArtifact("not for this model")
        return name

    cache = ArtifactCache(read, load)  # type: ignore[arg-type]
    assert cache.ensure(["good"]) == {}
    assert cache.ensure(["bad"]) == {"bad": "MemoryError: no room"}
    assert cache.ensure(["unreadable", "refused"]) == {"unreadable": "KeyError: 'as code may'", "refused": "not for this model"}
    assert cache.loaded == ["good"]
    assert loaded[-1] == ["good"]


def test_what_cannot_even_be_put_back_may_be_used_by_nobody() -> None:
    calls: list[int] = []

    def load(artifacts: dict[str, str]) -> None:
        calls.append(len(artifacts))
        if len(calls) > 1 and artifacts:
            raise MemoryError("no room")

    cache = ArtifactCache(str, load)  # type: ignore[arg-type]
    assert cache.ensure(["good"]) == {}
    assert set(cache.ensure(["more"])) == {"more", "good"}
    assert cache.loaded == [] and calls[-1] == 0
