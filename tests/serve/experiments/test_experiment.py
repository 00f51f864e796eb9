"""Who gets which arm: exact, sticky, and moving only those that have to move."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guards.errors import InvalidPolicy
from guards.policy import NONE, parse_policy
from serve.experiment import Experiment, InvalidExperiment, arm_of, free_slice, parse_experiment
from serve.experiments.store import Experiments
from serve.registry.records import InUse, NameTaken, UnknownName
from serve.registry.store import Registry

ORDER: dict[str, Any] = {
    "name": "e",
    "arms": [{"name": "a", "policy": "none", "weight": 50}, {"name": "b", "policy": "default", "weight": 50}],
}


def test_a_million_units_fall_as_the_weights_say_and_a_change_moves_just_the_tenth_that_has_to_move() -> None:
    before, after, units = {"a": 50.0, "b": 50.0}, {"a": 60.0, "b": 40.0}, 1_000_000
    counts: Counter[tuple[str, str]] = Counter((arm_of("s", before, str(i)), arm_of("s", after, str(i))) for i in range(units))
    in_a, moved = counts["a", "a"] + counts["a", "b"], counts["b", "a"]
    assert counts["a", "b"] == 0, "nobody leaves the arm that grows"
    assert abs(in_a - 0.5 * units) < 4 * math.sqrt(units * 0.25)
    assert abs(moved - 0.1 * units) < 4 * math.sqrt(units * 0.1 * 0.9)


WEIGHTS = st.lists(st.floats(0.0, 100.0), min_size=2, max_size=5).filter(lambda weights: sum(weights) > 0)


@example([0.0, 5e-324], 0, 0.0, "")
@given(WEIGHTS, st.integers(0, 4), st.floats(0.0, 100.0), st.text(max_size=20))
def test_when_one_weight_changes_only_units_into_or_out_of_that_arm_move(
    weights: list[float], which: int, changed: float, unit: str
) -> None:
    before = {f"arm{i}": weight for i, weight in enumerate(weights)}
    arm = f"arm{which % len(weights)}"
    after = {**before, arm: changed}
    if sum(after.values()) == 0:
        return
    one, two = arm_of("s", before, unit), arm_of("s", after, unit)
    assert before[one] > 0 and after[two] > 0
    if one != two:
        assert (two if changed > before[arm] else one) == arm


def test_the_same_unit_gets_the_same_arm_in_another_process() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    code = f"from serve.experiment import arm_of; print([arm_of('salt', {weights}, str(i)) for i in range(200)])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == str([arm_of("salt", weights, str(i)) for i in range(200)])


def test_all_epochs_together_spend_alpha_and_no_more() -> None:
    experiment = Experiment(id="i", order=parse_experiment(ORDER), salt="s", start=0.0, epochs=({"a": 1.0, "b": 1.0},))
    spent = [experiment.model_copy(update={"epochs": experiment.epochs * n}).alpha for n in range(1, 30)]
    assert sum(spent) == pytest.approx(experiment.order.alpha) and spent[0] == pytest.approx(0.8 * experiment.order.alpha)


def test_nobody_gets_an_arm_without_weight() -> None:
    assert {arm_of("s", {"a": 0.0, "b": 1.0}, str(i)) for i in range(1_000)} == {"b"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": ORDER["arms"][:1]}, "arms"),
        ({"arms": [ORDER["arms"][0]] * 2}, "twice"),
        ({"arms": [{**arm, "weight": 0} for arm in ORDER["arms"]]}, "above 0"),
        ({"arms": [{**ORDER["arms"][0], "weight": math.nan}, ORDER["arms"][1]]}, "weight"),
        ({"share": 0}, "share"),
        ({"unit": "ip"}, "unit"),
        ({"name": "No"}, "name"),
        ({"layer": 1}, "layer"),
    ],
)
def test_an_order_that_cannot_be_run_says_what_is_wrong(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidExperiment, match=says):
        parse_experiment({**ORDER, **change})


@given(st.lists(st.floats(0.01, 0.5), max_size=6))
def test_slices_never_overlap_and_never_leave_the_layer(shares: list[float]) -> None:
    taken: list[tuple[float, float]] = []
    for share in shares:
        start = free_slice(taken, share)
        if start is not None:
            assert start >= 0 and start + share <= 1 + 1e-9
            assert all(start + share <= begin + 1e-9 or begin + length <= start + 1e-9 for begin, length in taken)
            taken.append((start, share))
    assert free_slice([], 1.0) == 0.0 and free_slice([(0.0, 0.5)], 0.6) is None and free_slice([(0.3, 0.7)], 0.3) == 0.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "lethe.db")


def test_experiments_on_the_same_traffic_share_no_unit(registry: Registry) -> None:
    experiments = Experiments(registry)
    made = [experiments.create(parse_experiment({**ORDER, "name": name, "share": 0.5}), actor="t") for name in ("one", "two")]
    units = [str(i) for i in range(2_000)]
    taken = [{unit for unit in units if each.takes(unit)} for each in made]
    assert not taken[0] & taken[1] and len(taken[0] | taken[1]) == len(units)
    with pytest.raises(InUse, match="one 50%, two 50%"):
        experiments.create(parse_experiment({**ORDER, "name": "three", "share": 0.1}), actor="t")
    experiments.stop("one", actor="t")
    with pytest.raises(InUse, match="'key'"):
        experiments.create(parse_experiment({**ORDER, "name": "three", "share": 0.1, "unit": "user"}), actor="t")
    assert experiments.create(parse_experiment({**ORDER, "name": "three", "share": 0.5}), actor="t").start == 0.0


def test_everything_that_is_done_to_an_experiment_is_audited_and_survives(registry: Registry, tmp_path: Path) -> None:
    experiments = Experiments(registry)
    experiments.create(parse_experiment(ORDER), actor="t")
    experiments.reweigh("e", {"a": 60}, actor="t")
    assert experiments.reweigh("e", {"a": 60}, actor="t").epochs == ({"a": 50.0, "b": 50.0}, {"a": 60.0, "b": 50.0})
    again = Registry(tmp_path / "lethe.db")
    assert [each.weights for each in again.snapshot().experiments] == [{"a": 60.0, "b": 50.0}]
    experiments.stop("e", actor="t")
    experiments.stop("e", actor="t")
    assert registry.snapshot().experiments == ()
    with pytest.raises(InUse, match="stopped"):
        experiments.reweigh("e", {"a": 1}, actor="t")
    with pytest.raises(NameTaken):
        experiments.create(parse_experiment(ORDER), actor="t")
    experiments.delete("e", actor="t")
    with pytest.raises(UnknownName):
        experiments.get("e")
    actions = [row.action for row in registry.audit()]
    assert actions == [f"experiment.{action}" for action in ("create", "reweigh", "stop", "delete")]
    assert registry.first_broken_audit_row() is None


def test_a_policy_cannot_be_deleted_under_an_experiment_and_a_change_to_it_is_told(registry: Registry) -> None:
    experiments = Experiments(registry)
    registry.put_policy(parse_policy({"name": "strict"}), actor="t")
    arms = [{"name": "a", "policy": NONE}, {"name": "b", "policy": "strict"}]
    experiments.create(parse_experiment({"name": "e", "arms": arms}), actor="t")
    with pytest.raises(InUse, match="'e'"):
        registry.delete_policy("strict", actor="t")
    assert experiments.changes_since(experiments.get("e")) == []
    registry.put_policy(parse_policy({"name": "strict", "description": "another"}), actor="t")
    registry.create_key("chat", "", actor="t")
    assert experiments.changes_since(experiments.get("e")) == ["policy.put strict"]
    experiments.stop("e", actor="t")
    time.sleep(0.01)
    registry.delete_policy("strict", actor="t")
    assert experiments.changes_since(experiments.get("e")) == ["policy.put strict"], "what comes after the end changes nothing"


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"gone": 1}, InvalidExperiment),
        ({"a": -1}, InvalidExperiment),
        ({"a": 0, "b": 0}, InvalidExperiment),
        ({"a": 1e308}, InvalidExperiment),
        ({"a": 5e-324, "b": 0}, InvalidExperiment),
        ({"a": math.nan}, InvalidExperiment),
    ],
)
def test_bad_weights_change_nothing(registry: Registry, weights: dict[str, float], error: type[Exception]) -> None:
    experiments = Experiments(registry)
    experiments.create(parse_experiment(ORDER), actor="t")
    revision = registry.revision()
    with pytest.raises(error):
        experiments.reweigh("e", weights, actor="t")
    assert registry.revision() == revision


def test_an_arm_needs_a_policy_that_exists(registry: Registry) -> None:
    order = {**ORDER, "arms": [ORDER["arms"][0], {"name": "b", "policy": "gone"}]}
    with pytest.raises(InvalidPolicy, match="gone"):
        Experiments(registry).create(parse_experiment(order), actor="t")


def test_in_shadow_the_first_arm_answers_everybody() -> None:
    order = parse_experiment({**ORDER, "mode": "shadow", "sample": 0.5})
    experiment = Experiment(id="i", order=order, salt="s", start=0.0, epochs=({"a": 1.0, "b": 9.0},))
    assert {experiment.assigned(str(i)).name for i in range(100)} == {"a"}
    sampled = sum(experiment.sampled(str(i)) for i in range(10_000))
    assert abs(sampled - 5_000) < 4 * 50
