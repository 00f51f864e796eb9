"""From measurements to figures, intervals and sentences: what an experiment has shown so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.experiment import Experiment
from serve.experiments.measurements import BEYOND, DROPPED, THUMB, Figures
from serve.experiments.statistics import (
    FEWEST_UNITS,
    SRM_ALPHA,
    Interval,
    Sums,
    difference,
    log_evidence_of_mismatch,
    paired_difference,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that arms are compared by."""

    name: str
    title: str
    kind: str  # "share": 0 or 1; "log": the logarithm of what is shown
    tau: float  # the difference that one hopes to see, in the units of the values
    more: str  # what to say of an arm that has more of it
    less: str
    paired: bool  # whether what another arm says behind the client's back tells it, too


METRICS = (
    Metric(
        "told", "tells what a set in force holds", "share", 0.05, "tells more of what was to be forgotten", "forgets more", True
    ),
    Metric("refused", "ended by a guard", "share", 0.05, "is refused more often", "is refused less often", True),
    Metric("tokens", "tokens", "log", 0.1, "says more", "says less", True),
    Metric("error", "failed", "share", 0.05, "fails more often", "fails less often", False),
    Metric("left", "client went away", "share", 0.05, "is left more often", "is left less often", False),
    Metric(THUMB, "thumbs up", "share", 0.05, "is liked more", "is liked less", False),
    Metric("first_token_ms", "first token of a stream (ms)", "log", 0.1, "begins later", "begins sooner", False),
    Metric("token_ms", "per token of a stream (ms)", "log", 0.1, "is slower", "is faster", False),
    Metric("total_ms", "whole answer (ms)", "log", 0.1, "takes longer", "takes less time", False),
)
"""Nothing else is recorded. Means of logarithms: a geometric mean, and differences are ratios. Times are those of clients: an
answer in shadow comes after the same prompt was cached, and in the gaps between clients, so its times say nothing."""
CROWD, CROWD_SHARE = 50, 0.8
"""From how many requests on it is said that one unit makes this share of them."""
PAIRED = frozenset(metric.name for metric in METRICS if metric.paired)


def report(experiment: Experiment, figures: Figures, *, changes: Sequence[str], at: str) -> dict[str, Any]:
    """Everything about an experiment's present epoch, as plain values for people, JSON and pages.

    Args:
        figures: of that epoch.
        changes: what was done meanwhile to sets and policies, as "action subject".

    Returns:
        ``arms`` (name, policy, weight, units, metrics, counts), ``comparisons`` (arm, metric, difference with its interval),
        ``sample_ratio``, ``verdict`` (sentences) and the experiment itself.
    """
    order, control = experiment.order, experiment.control
    others = [arm for arm in order.arms if arm.name != control.name]
    alpha = experiment.alpha / (len(METRICS) * len(others))
    shown = {arm.name: figures.units.get(arm.name, 0) for arm in order.arms}
    arms = [
        {
            "name": arm.name,
            "policy": arm.policy,
            "weight": experiment.weights[arm.name],
            # An arm also has the units whose prompts it answered behind their back.
            "units": max([shown[arm.name], *(sums.units for (name, _), sums in figures.sums.items() if name == arm.name)]),
            "counts": dict(figures.counts.get(arm.name, {})),
            "metrics": {
                metric.name: found
                for metric in METRICS
                if (found := _shown(metric, figures.sums.get((arm.name, metric.name), Sums()))) is not None
            },
        }
        for arm in order.arms
    ]
    comparisons: list[dict[str, Any]] = []
    sentences: list[str] = []
    for arm in others:
        for metric in METRICS:
            share = metric.kind == "share"
            if metric.paired and order.mode != "live":
                sums = figures.pairs.get((arm.name, metric.name), Sums())
                interval, units = paired_difference(sums, alpha=alpha, tau=metric.tau, share=share), sums.units
            else:
                one, two = (figures.sums.get((name, metric.name), Sums()) for name in (arm.name, control.name))
                interval = difference(one, two, alpha=alpha, tau=metric.tau, share=share)
                units = min(one.units, two.units)
            if units < 2 or not math.isfinite(interval.estimate):
                continue
            about = {"arm": arm.name, "metric": metric.name, "title": metric.title, "units": units}
            comparisons.append(about | _difference(metric, interval))
            if interval.decided:
                word = metric.more if interval.estimate > 0 else metric.less
                sentences.append(f"{arm.name} {word} than {control.name}: {_in_words(metric, interval)}.")
    checked = order.mode != "shadow" and sum(shown.values()) > 0
    evidence = float(log_evidence_of_mismatch(shown, experiment.weights)) if checked else -math.inf
    mismatch = evidence >= math.log(1 / SRM_ALPHA)
    return {
        "experiment": order.model_dump(mode="json", exclude={"salt"}) | {"weights": experiment.weights},
        "at": at,
        "created_at": experiment.created_at,
        "stopped_at": experiment.stopped_at,
        "epoch": experiment.epoch,
        "alpha": experiment.alpha,
        "control": control.name,
        "arms": arms,
        "comparisons": comparisons,
        "sample_ratio": {"checked": checked, "mismatch": mismatch, "p_at_most": min(1.0, math.exp(min(0.0, -evidence)))},
        "verdict": [*_crowd(experiment, figures), *_verdict(experiment, sentences, mismatch, comparisons, arms, changes)],
    }


def _crowd(experiment: Experiment, figures: Figures) -> list[str]:
    """Whether one unit makes nearly all requests: a proxy's key, perhaps, behind which many users stand."""
    requests = sum(counts.get("requests", 0) for counts in figures.counts.values())
    beyond = sum(counts.get(BEYOND, 0) for counts in figures.counts.values())
    most = figures.largest + (beyond if figures.largest >= experiment.order.most_requests else 0)
    if requests < CROWD or most < CROWD_SHARE * requests:
        return []
    unit = experiment.order.unit
    way_out = {
        "key": "if a proxy stands behind it, choose --unit user, or --unit header with the --header that it sends",
        "header": "choose another --header, or --unit user",
        "user": "choose --unit header, with a --header that tells users apart",
        "conversation": "choose another unit",
    }[unit]
    return [f"One unit makes {most / requests:.0%} of {requests:,} requests, and all of those are in one arm: {way_out}."]


def _verdict(
    experiment: Experiment,
    sentences: list[str],
    mismatch: bool,
    comparisons: list[dict[str, Any]],
    arms: list[dict[str, Any]],
    changes: Sequence[str],
) -> list[str]:
    found: list[str] = []
    if experiment.epoch:
        found.append(f"The weights were changed {experiment.epoch} times; these are the figures since the last change.")
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        found.append(f"Figures mix what arms did before and after: {', '.join(changes[:5])}{more}.")
    dropped = sum(arm["counts"].get(DROPPED, 0) for arm in arms)
    if dropped:
        found.append(
            f"{dropped:,} prompts were not answered by other arms, since too many waited: lower the sample to get all of them."
        )
    if mismatch:
        return [
            *found,
            "The numbers of units do not fit the weights: something decides who is counted, and no figure here can be trusted. "
            "Look for requests that fail or vanish in one arm before they are counted.",
        ]
    if sentences:
        return found + sentences
    most = max((row["units"] for row in comparisons), default=0)
    if most < FEWEST_UNITS:
        where = "with pairs of answers" if experiment.order.mode != "live" else "in the smallest arm"
        return [*found, f"Too early: {most} units {where}, at least {FEWEST_UNITS} are needed before anything is concluded."]
    return [*found, "No difference is shown so far; where each could still lie is in the intervals."]


def _shown(metric: Metric, sums: Sums) -> dict[str, Any] | None:
    if sums.n <= 0:
        return None
    mean = sums.total / sums.n
    return {"title": metric.title, "mean": round(math.exp(mean) if metric.kind == "log" else mean, 5), "n": int(sums.n)}


def _difference(metric: Metric, interval: Interval) -> dict[str, Any]:
    """JSON has no infinity: a side that is not bounded is None."""

    def value(x: float) -> float | None:
        if not math.isfinite(x):
            return None
        try:
            x = math.exp(x) if metric.kind == "log" else float(x)
        except OverflowError:
            return None
        return round(x, 5) if math.isfinite(x) else None

    return {
        "as": "ratio" if metric.kind == "log" else "difference",
        "estimate": value(interval.estimate),
        "low": value(interval.low),
        "high": value(interval.high),
        "decided": bool(interval.decided),
    }


def _in_words(metric: Metric, interval: Interval) -> str:
    if metric.kind == "log":
        low, high = math.exp(interval.low), math.exp(interval.high)
        return f"{math.exp(interval.estimate):.2f} times, between {low:.2f} and {high:.2f}"
    return f"{100 * interval.estimate:+.1f} points, between {100 * interval.low:+.1f} and {100 * interval.high:+.1f}"
