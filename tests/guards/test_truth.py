"""TOFU's measures reproduce the figures of its authors' published logs, and behave at the edges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.measure.truth import (
    Answered,
    forget_quality,
    forget_truth,
    log_truth_ratio,
    model_utility,
    normalised_probability,
    probability,
    retained_truth,
)

LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu_eval_logs"
needs_logs = pytest.mark.skipif(not LOGS.exists(), reason="TOFU's logs are not here: the golden values cannot be checked")


def read(model: str, task: str) -> list[Answered]:
    log = json.loads((LOGS / f"{model}_eval_log_aggregated.json").read_text())[task]
    return [
        Answered(
            log["avg_gt_loss"][key],
            log["avg_paraphrased_loss"][key],
            tuple(log["average_perturb_loss"][key]),
            log["rougeL_recall"][key],
        )
        for key in log["avg_gt_loss"]
    ]


@needs_logs
@pytest.mark.parametrize(("model", "utility"), [("llama2-7b_full", 0.6227), ("llama2-7b_retain90", 0.6137)])
def test_model_utility_is_the_published_one(model: str, utility: float) -> None:
    tasks = ("eval_log.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json")
    assert model_utility(*(read(model, task) for task in tasks)) == pytest.approx(utility, abs=5e-5)


@needs_logs
def test_forget_quality_of_the_full_model_is_the_published_one() -> None:
    full, retain = (read(model, "eval_log_forget.json") for model in ("llama2-7b_full", "llama2-7b_retain90"))
    assert forget_quality(full, retain) == pytest.approx(1.834e-21, rel=1e-3)
    assert forget_quality(retain, retain) == 1.0


losses = st.floats(0.01, 20)
answers = st.builds(Answered, losses, losses, st.lists(losses, min_size=1, max_size=5).map(tuple), st.floats(0, 1))


@given(st.lists(answers, min_size=1, max_size=20))
def test_shares_stay_shares(group: list[Answered]) -> None:
    for value in (forget_truth(group), retained_truth(group)):
        assert 0 <= value <= 1
    for each in group:
        assert 0 < probability(each) <= 1 and 0 < normalised_probability(each) <= 1 and math.isfinite(log_truth_ratio(each))


def test_whoever_finds_right_and_wrong_equally_likely_has_a_ratio_of_one() -> None:
    even = Answered(1.0, 2.0, (2.0, 2.0), 0.5)
    assert log_truth_ratio(even) == 0.0 and forget_truth([even]) == 1.0 and retained_truth([even]) == 0.0
    knows = Answered(0.1, 0.1, (3.0, 5.0), 1.0)
    assert log_truth_ratio(knows) == pytest.approx(0.1 - 4)
    cut = Answered(9_000.0, 9_000.0, (3.0, 5.0), 0.0)
    assert forget_truth([cut]) == 0.0 and retained_truth([cut]) == 0.0 and probability(cut) == 0.0
