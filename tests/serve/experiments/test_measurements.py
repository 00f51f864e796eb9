"""What experiments observe: counted once, capped, kept over restarts; and what is said of it."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.experiment import Experiment, parse_experiment
from serve.experiments.measurements import DROPPED, Figures, Measurement, Measurements, UnknownRequest
from serve.experiments.page import as_page
from serve.experiments.report import METRICS, report
from serve.experiments.statistics import FEWEST_UNITS, Sums

ARMS = [{"name": "a", "policy": "none"}, {"name": "b", "policy": "default"}]


def experiment(**options: Any) -> Experiment:
    order = parse_experiment({"name": "e", "arms": ARMS, **options})
    return Experiment(id="i", order=order, salt="s", start=0.0, epochs=({"a": 1.0, "b": 1.0},), created_at="then")


@pytest.fixture
def measurements(tmp_path: Path) -> Measurements:
    return Measurements(tmp_path / "o.db")


def seen(unit: str, arm: str = "a", request: str = "", **options: Any) -> Measurement:
    return Measurement("e", unit, arm, 0, {"error": 0.0, "tokens": 2.0}, request=request, caller="k", **options)


def test_requests_of_one_unit_add_up_to_one_unit(measurements: Measurements) -> None:
    measurements.record([seen("u"), seen("u"), seen("v"), seen("w", "b")])
    figures = measurements.figures("e", 0)
    assert figures.sums["a", "tokens"] == Sums(2, 3.0, 6.0, 5.0, 20.0, 10.0)
    assert figures.units == {"a": 2, "b": 1} and figures.counts["a"] == {"requests": 3}


def test_caps_hold_and_what_is_beyond_them_is_said(measurements: Measurements) -> None:
    measurements.record([seen("u", most_requests=2)] * 5)
    measurements.record([seen("v", most_units=2), seen("w", most_units=2), seen("v", most_units=2)])
    figures = measurements.figures("e", 0)
    assert figures.sums["a", "error"].n == 4 and figures.units == {"a": 2}
    assert figures.counts["a"] == {"requests": 8, "beyond the cap of their unit": 3, "beyond the cap on units": 1}


def test_every_epoch_counts_by_itself(measurements: Measurements) -> None:
    measurements.record([seen("u", "a"), replace(seen("u", "b"), epoch=1)])
    first, second = (measurements.figures("e", epoch) for epoch in (0, 1))
    assert first.units == {"a": 1} and second.units == {"b": 1} and ("b", "error") not in first.sums
    assert first.counts == {"a": {"requests": 1}} and measurements.figures("e", 2) == Figures({}, {}, {}, {})


def test_what_is_not_a_number_is_not_added_up(measurements: Measurements) -> None:
    measurements.record(
        [Measurement("e", "u", "a", 0, {"tokens": math.nan, "error": 1.0}), Measurement("e", "u", "a", 0, {"tokens": math.inf})]
    )
    figures = measurements.figures("e", 0)
    assert ("a", "tokens") not in figures.sums and figures.sums["a", "error"].total == 1.0
    assert figures.counts["a"]["not a number"] == 2


def test_a_batch_is_written_whole_or_not_at_all(measurements: Measurements) -> None:
    with pytest.raises(Exception, match="arm"):
        measurements.record([seen("u"), Measurement("e", "v", None, 0)])  # type: ignore[arg-type]
    assert measurements.figures("e", 0).units == {}


def test_what_was_observed_is_there_after_a_restart(measurements: Measurements, tmp_path: Path) -> None:
    measurements.record([seen("u", request="r")])
    measurements.close()
    again = Measurements(tmp_path / "o.db")
    again.record([seen("u")])
    again.rate("r", 1.0, caller="k")
    figures = again.figures("e", 0)
    assert figures.sums["a", "error"].n == 2 and figures.sums["a", "error"].units == 1 and figures.sums["a", "thumb"].total == 1.0


def test_feedback_counts_once_and_the_last_word_holds(measurements: Measurements) -> None:
    measurements.record([seen("u", request="r1"), seen("u", request="r2")])
    for thumb in (1.0, 0.0, 0.0):
        measurements.rate("r1", thumb, caller="k")
    measurements.rate("r2", 1.0, caller="k")
    thumbs = measurements.figures("e", 0).sums["a", "thumb"]
    assert thumbs.n == 2 and thumbs.total == 1.0


def test_feedback_that_races_counts_once(measurements: Measurements) -> None:
    requests = [f"r{i}" for i in range(8)]
    measurements.record([seen("u", request=request) for request in requests])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda request: measurements.rate(request, 1.0, caller="k"), requests * 6))
    thumbs = measurements.figures("e", 0).sums["a", "thumb"]
    assert thumbs.n == thumbs.total == len(requests)


@pytest.mark.parametrize(("request_id", "caller"), [("gone", "k"), ("r", "another key")])
def test_feedback_to_what_is_not_theirs_is_refused(measurements: Measurements, request_id: str, caller: str) -> None:
    measurements.record([seen("u", request="r")])
    with pytest.raises(UnknownRequest):
        measurements.rate(request_id, 1.0, caller=caller)
    assert ("a", "thumb") not in measurements.figures("e", 0).sums


def test_what_stands_beside_an_answer_counts_only_if_that_did(measurements: Measurements) -> None:
    beside = [Measurement("e", "u", "b", 0, {"error": 1.0}, request=r, role="later") for r in ("r", "gone")]
    differ = [Measurement("e", "u", "b", 0, {"error": 1.0}, request=r, role="difference") for r in ("r", "gone")]
    measurements.record([seen("u", request="r"), *beside, *differ])
    figures = measurements.figures("e", 0)
    assert figures.sums["b", "error"].n == 1 and figures.pairs["b", "error"].n == 1 and figures.units == {"a": 1}


def test_deleting_leaves_other_experiments_alone(measurements: Measurements) -> None:
    measurements.record([seen("u"), Measurement("other", "u", "a", 0, {"error": 0.0})])
    measurements.keep_only(["other"])
    assert measurements.figures("e", 0) == Figures({}, {}, {}, {}) and measurements.figures("other", 0).units == {"a": 1}


def same(units: int, value: float) -> Sums:
    return Sums(units, units, units * value, units, units * value**2, units * value)


def found(figures: Figures, changes: list[str] | None = None, **options: Any) -> dict[str, Any]:
    return report(experiment(**options), figures, changes=changes or [], at="now")


def test_a_report_about_nothing_says_so_and_is_a_page() -> None:
    nothing = found(Figures({}, {}, {}, {}))
    assert nothing["comparisons"] == [] and "Too early: 0" in nothing["verdict"][0] and not nothing["sample_ratio"]["mismatch"]
    assert "There is nothing to compare yet" in as_page(nothing)


def test_a_difference_is_said_in_words_and_which_way() -> None:
    told = {("a", "told"): same(4_000, 1.0), ("b", "told"): same(4_000, 0.0)}
    shown = found(Figures(told, {}, {}, {"a": 4_000, "b": 4_000}))
    assert shown["verdict"] == [next(s for s in shown["verdict"] if s.startswith("b forgets more than a: -100.0 points"))], (
        "and nothing else"
    )
    row = next(row for row in shown["comparisons"] if row["metric"] == "told")
    assert row["decided"] and row["low"] < row["estimate"] == -1.0 < row["high"] < 0


def test_equal_arms_show_no_difference() -> None:
    sums = {(arm, metric.name): Sums(5_000, 5_000, 2_500, 5_000, 2_500, 2_500) for arm in "ab" for metric in METRICS}
    shown = found(Figures(sums, {}, {}, {"a": 5_000, "b": 5_000}))
    assert shown["verdict"] == ["No difference is shown so far; where each could still lie is in the intervals."]


def test_where_numbers_of_units_do_not_fit_nothing_else_is_concluded() -> None:
    told = {("a", "told"): same(4_000, 1.0), ("b", "told"): same(2_000, 0.0)}
    shown = found(Figures(told, {}, {}, {"a": 4_000, "b": 2_000}), ["policy.put default"])
    assert "before and after: policy.put default" in shown["verdict"][0] and "do not fit the weights" in shown["verdict"][1]
    assert len(shown["verdict"]) == 2 and shown["sample_ratio"]["mismatch"]


def test_prompts_that_other_arms_did_not_answer_are_told() -> None:
    shown = found(Figures({}, {}, {"b": {DROPPED: 7}}, {}), mode="paired")
    assert shown["verdict"][0].startswith("7 prompts were not answered")


def test_after_a_change_of_weights_it_is_said_whose_figures_these_are() -> None:
    changed = experiment().model_copy(update={"epochs": ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 9.0})})
    shown = report(changed, Figures({}, {}, {}, {}), changes=[], at="now")
    assert "changed 1 times" in shown["verdict"][0] and shown["alpha"] == pytest.approx(0.05 * 0.8 * 0.2)


def test_in_shadow_pairs_are_compared_and_units_are_not_suspected() -> None:
    pairs = {
        ("b", "told"): same(FEWEST_UNITS * 40, 0.0),
        ("b", "tokens"): same(FEWEST_UNITS * 40, math.log(2)),
        ("b", "total_ms"): same(4_000, 9.0),
    }
    shown = found(Figures({}, pairs, {}, {"a": 4_000}), mode="shadow")
    assert len(shown["verdict"]) == 1 and "b says more than a: 2.00 times" in shown["verdict"][0], "times in shadow say nothing"
    assert json.loads(json.dumps(shown)) == shown
    assert not shown["sample_ratio"]["checked"] and not shown["sample_ratio"]["mismatch"]


def test_the_page_escapes_what_an_operator_or_a_client_wrote() -> None:
    figures = Figures(
        {("a", "told"): same(200, 1.0), ("b", "told"): same(200, 0.0)}, {}, {"a": {"<script>": 1}}, {"a": 200, "b": 200}
    )
    page = as_page(found(figures, description="<img src=x>"))
    assert "<script>" not in page and "<img" not in page and "&lt;img" in page and "http://" not in page
