"""From observations to figures, intervals and sentences: what an experiment has shown so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from serve.compare.observations import THUMB, Figures
from serve.compare.sequential import (
    FEWEST_UNITS,
    SRM_ALPHA,
    Interval,
    Sums,
    difference,
    log_evidence_of_mismatch,
    mean_and_variance,
    paired_difference,
)
from serve.experiment import Experiment


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that arms are compared by."""

    name: str
    title: str
    kind: str  # "share": 0 or 1; "log": the logarithm of what is shown
    tau: float  # the difference that one hopes to see, in the units of the values
    more: str  # what to say of an arm that has more of it
    less: str


METRICS = (
    Metric("told", "tells what a set in force holds", "share", 0.05, "tells more of what was to be forgotten", "forgets more"),
    Metric("refused", "ended by a guard", "share", 0.05, "is refused more often", "is refused less often"),
    Metric("error", "failed", "share", 0.05, "fails more often", "fails less often"),
    Metric(THUMB, "thumbs up", "share", 0.05, "is liked more", "is liked less"),
    Metric("first_token_ms", "first token (ms)", "log", 0.1, "begins later", "begins sooner"),
    Metric("token_ms", "per token (ms)", "log", 0.1, "is slower", "is faster"),
    Metric("total_ms", "whole answer (ms)", "log", 0.1, "takes longer", "takes less time"),
    Metric("tokens", "tokens", "log", 0.1, "says more", "says less"),
)
"""Nothing else is recorded. Means of logarithms: a geometric mean, and differences are ratios."""
COUNTED = frozenset(metric.name for metric in METRICS)


def report(experiment: Experiment, figures: Figures, *, policies_changed: list[str], at: str) -> dict[str, Any]:
    """Everything about an experiment, as plain values for people, JSON and pages.

    Returns:
        ``arms`` (name, policy, weight, units, metrics, counts), ``comparisons`` (arm, metric, difference with its interval),
        ``sample_ratio``, ``verdict`` (sentences) and the experiment itself.
    """
    order, control = experiment.order, experiment.control
    others = [arm for arm in order.arms if arm.name != control.name]
    paired = order.mode != "live"
    alpha = order.alpha / (len(METRICS) * len(others))
    seen = {arm.name: sum(epoch.get(arm.name, 0) for epoch in figures.units) for arm in order.arms}
    if paired:  # an arm also has the units whose prompts it answered behind their back
        behind = {arm.name: [sums.units for (name, _), sums in figures.sums.items() if name == arm.name] for arm in order.arms}
        seen = {name: max([units, *behind[name]]) for name, units in seen.items()}
    arms = [
        {
            "name": arm.name,
            "policy": arm.policy,
            "weight": experiment.weights[arm.name],
            "units": seen[arm.name],
            "counts": dict(figures.counts.get(arm.name, {})),
            "metrics": {
                metric.name: shown
                for metric in METRICS
                if (shown := _shown(metric, figures.sums.get((arm.name, metric.name), Sums()))) is not None
            },
        }
        for arm in order.arms
    ]
    comparisons: list[dict[str, Any]] = []
    sentences: list[str] = []
    for arm in others:
        for metric in METRICS:
            # How a client liked an answer that it was not shown is not known: thumbs are compared between arms, always.
            if paired and metric.name != THUMB:
                sums = figures.pairs.get((arm.name, metric.name), Sums())
                interval = paired_difference(sums, alpha=alpha, tau=metric.tau)
                units = sums.units
            else:
                one, two = (figures.sums.get((name, metric.name), Sums()) for name in (arm.name, control.name))
                interval = difference(one, two, alpha=alpha, tau=metric.tau, share=metric.kind == "share")
                units = min(one.units, two.units)
            if units < 2 or not math.isfinite(interval.estimate):
                continue
            comparisons.append(
                {"arm": arm.name, "metric": metric.name, "title": metric.title, "units": units} | _difference(metric, interval)
            )
            if interval.decided:
                word = metric.more if interval.estimate > 0 else metric.less
                sentences.append(f"{arm.name} {word} than {control.name}: {_in_words(metric, interval)}.")
    evidence = log_evidence_of_mismatch(figures.units, experiment.epochs) if order.mode != "shadow" else -math.inf
    mismatch = evidence >= math.log(1 / SRM_ALPHA)
    return {
        "experiment": order.model_dump(mode="json", exclude={"salt"}) | {"weights": experiment.weights},
        "at": at,
        "created_at": experiment.created_at,
        "stopped_at": experiment.stopped_at,
        "epochs": len(experiment.epochs),
        "control": control.name,
        "arms": arms,
        "comparisons": comparisons,
        "sample_ratio": {"mismatch": mismatch, "p_at_most": min(1.0, math.exp(min(0.0, -evidence)))},
        "verdict": _verdict(experiment, sentences, mismatch, comparisons, policies_changed),
    }


def _verdict(
    experiment: Experiment, sentences: list[str], mismatch: bool, comparisons: list[dict[str, Any]], policies_changed: list[str]
) -> list[str]:
    found: list[str] = []
    if mismatch:
        found.append(
            "The numbers of units do not fit the weights: something decides who is counted, and no figure here can be trusted. "
            "Look for requests that fail or vanish in one arm before they are counted."
        )
    found += [f"Policy {name} is no longer what it was when the experiment began: figures mix both." for name in policies_changed]
    if sentences:
        return found + sentences
    most = max((row["units"] for row in comparisons), default=0)
    if most < FEWEST_UNITS:
        unit = "prompts' units" if experiment.order.mode != "live" else "units"
        found.append(
            f"Too early: {most} {unit} in the smallest arm, at least {FEWEST_UNITS} are needed before anything is concluded."
        )
    else:
        found.append("No difference is shown so far; where each could still lie is in the intervals.")
    return found


def _shown(metric: Metric, sums: Sums) -> dict[str, Any] | None:
    mean, _ = mean_and_variance(sums, share=metric.kind == "share")
    if sums.n <= 0:
        return None
    mean = sums.total / sums.n if math.isnan(mean) else mean
    return {"title": metric.title, "mean": round(math.exp(mean) if metric.kind == "log" else mean, 5), "n": int(sums.n)}


def _difference(metric: Metric, interval: Interval) -> dict[str, Any]:
    """JSON has no infinity: a side that is not bounded is None."""

    def value(x: float) -> float | None:
        if not math.isfinite(x):
            return None
        try:
            x = math.exp(x) if metric.kind == "log" else x
        except OverflowError:
            return None
        return round(x, 5) if math.isfinite(x) else None

    return {
        "as": "ratio" if metric.kind == "log" else "difference",
        "estimate": value(interval.estimate),
        "low": value(interval.low),
        "high": value(interval.high),
        "decided": interval.decided,
    }


def _in_words(metric: Metric, interval: Interval) -> str:
    if metric.kind == "log":
        low, high = math.exp(interval.low), math.exp(interval.high)
        return f"{math.exp(interval.estimate):.2f} times, between {low:.2f} and {high:.2f}"
    return f"{100 * interval.estimate:+.1f} points, between {100 * interval.low:+.1f} and {100 * interval.high:+.1f}"
