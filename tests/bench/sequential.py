"""What the statistics of experiments promise and find: false alarms under continuous peeking, and power.

    python -m tests.bench.sequential [--experiments 10000] [--plot FILE.png]

Every simulated experiment is looked at after each batch of arrivals. Units have an effect of their own, come one after another
and come back, so that a unit's requests are correlated and early units weigh more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from serve.experiments.statistics import (
    SRM_ALPHA,
    Floats,
    Interval,
    Sums,
    difference,
    log_evidence_of_mismatch,
    paired_difference,
    radius,
)

KINDS = {"share": 0.05, "rare share": 0.05, "mean": 0.1, "heavy mean": 0.1, "paired share": 0.05}  # -> tau, as for live metrics
LOOKS, ARRIVALS, RETURNS, AT_ONCE = 80, 25, 20, 1_000


def _values(kind: str, unit: Floats, effect: float, rng: np.random.Generator) -> Floats:
    """One request of each unit, given what the unit is like (uniform in (0, 1))."""
    if kind == "share":
        return np.asarray(rng.random(unit.shape) < np.clip(0.1 + 0.8 * unit + effect, 0, 1), float)
    if kind == "paired share":  # of -1, 0 and 1: how two answers to one prompt differ
        draw = rng.random(unit.shape)
        tilt = 0.2 * (unit - 0.5) + effect / 2
        return np.asarray((draw < 0.1 + tilt).astype(float) - (draw > 0.9 + tilt))
    if kind == "rare share":
        return np.asarray(rng.random(unit.shape) < np.clip(0.04 * unit + effect, 0, 1), float)
    noise = rng.normal(size=unit.shape) if kind == "mean" else rng.standard_t(4, size=unit.shape)
    return np.asarray(0.6 * (unit - 0.5) + 0.3 * noise + effect)


def looks(kind: str, experiments: int, effect: float, alpha: float, rng: np.random.Generator) -> Iterator[Interval]:
    """At each look, the interval of the difference of the arms (of the pairs), [experiments]."""
    most = LOOKS * ARRIVALS
    like = rng.random((2, experiments, most))
    n, s = np.zeros((2, experiments, most)), np.zeros((2, experiments, most))
    rows = np.arange(experiments)[:, None]
    sums = np.zeros((5, 2, experiments))  # of n, s, n^2, s^2, n s
    for look in range(1, LOOKS + 1):
        units = look * ARRIVALS
        for arm in range(2):
            for which in (
                np.broadcast_to(np.arange(units - ARRIVALS, units), (experiments, ARRIVALS)),  # they are new
                (rng.integers(units, size=(experiments, 1)) + np.arange(RETURNS)) % units,  # and these come back
            ):
                values = _values(kind, like[arm][rows, which], effect * arm, rng)
                before_n, before_s = n[arm][rows, which], s[arm][rows, which]
                after_n, after_s = before_n + 1, before_s + values
                n[arm][rows, which], s[arm][rows, which] = after_n, after_s
                pairs = ((1, 0), (values, 0), (after_n**2, before_n**2), (after_s**2, before_s**2))
                for k, (after, before) in enumerate((*pairs, (after_n * after_s, before_n * before_s))):
                    sums[k, arm] += np.broadcast_to(after - before, values.shape).sum(-1)
        paired = kind.startswith("paired")
        each = [Sums(np.full(experiments, units), *(sums[k, arm] for k in (0, 1, 2, 3, 4))) for arm in range(2)]
        if paired:
            yield paired_difference(each[1], alpha=alpha, tau=KINDS[kind], share=True)
        else:
            yield difference(each[1], each[0], alpha=alpha, tau=KINDS[kind], share="share" in kind)


def decided(kind: str, *, experiments: int, effect: float, alpha: float, seed: int) -> Floats:
    """The look at which each experiment was decided; inf for never."""
    rng = np.random.default_rng(seed)
    when = []
    for start in range(0, experiments, AT_ONCE):
        first = np.full(min(AT_ONCE, experiments - start), math.inf)
        for look, interval in enumerate(looks(kind, len(first), effect, alpha, rng), 1):
            first = np.where(interval.decided & np.isinf(first), look, first)
        when.append(first)
    return np.concatenate(when)


def false_alarms(kind: str, *, experiments: int, alpha: float, seed: int) -> float:
    """Share of experiments without an effect that some look decides."""
    return float(np.isfinite(decided(kind, experiments=experiments, effect=0.0, alpha=alpha, seed=seed)).mean())


def naive_false_alarms(kind: str, *, experiments: int, seed: int) -> float:
    """The same for a t-test at every look, alpha .05, to show what the sequences are for: their widths give the variances back."""
    rng, alarms = np.random.default_rng(seed), 0
    grid = np.geomspace(1e-8, 1, 4_000)
    widths = radius(grid, alpha=0.05, tau=KINDS[kind])
    for start in range(0, experiments, AT_ONCE):
        seen = np.zeros(min(AT_ONCE, experiments - start), bool)
        for interval in looks(kind, len(seen), 0.0, 0.05, rng):
            variance = np.interp(interval.high - interval.estimate, widths, grid, right=math.inf)
            seen |= np.abs(interval.estimate) > 1.959964 * np.sqrt(variance)
        alarms += int(seen.sum())
    return alarms / experiments


def srm_false_alarms(*, experiments: int, seed: int) -> float:
    """Share of experiments whose units fall as the weights say and that some look suspects: one after each of 2,000 units."""
    rng, alarms = np.random.default_rng(seed), 0
    total = np.arange(1, 2_001)
    for _ in range(0, experiments, AT_ONCE):
        ones = np.cumsum(rng.random((AT_ONCE, len(total))) < 0.3, axis=1)
        evidence = log_evidence_of_mismatch({"a": ones, "b": total - ones}, {"a": 3.0, "b": 7.0})
        alarms += int((evidence.max(axis=1) >= math.log(1 / SRM_ALPHA)).sum())
    return alarms / experiments


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--experiments", type=int, default=10_000)
    arguments.add_argument("--plot", help="also draw the power curves into this file")
    options = arguments.parse_args()
    out = Console()
    table = Table(
        "metric", "false alarms", "of a t-test at every look", title=f"no effect, alpha .05, {options.experiments:,} each"
    )
    for kind in KINDS:
        promised = false_alarms(kind, experiments=options.experiments, alpha=0.05, seed=1)
        table.add_row(kind, f"{promised:.4f}", f"{naive_false_alarms(kind, experiments=options.experiments, seed=1):.4f}")
    table.add_row("units", f"{srm_false_alarms(experiments=options.experiments, seed=2):.4f}", "(alpha .001)")
    out.print(table)
    effects = {"share": (0.02, 0.04, 0.08, 0.16), "mean": (0.02, 0.04, 0.08, 0.16)}
    table = Table("metric", "effect", "found", "units in each arm at the median", title="power, 2,000 units in each arm at most")
    curves = {}
    for kind, effect in track(
        [(each, effect) for each, sizes in effects.items() for effect in sizes], console=Console(stderr=True)
    ):
        when = decided(kind, experiments=1_000, effect=effect, alpha=0.05, seed=3)
        found = float(np.isfinite(when).mean())
        median = f"{np.median(when) * ARRIVALS:.0f}" if found > 0.5 else "more than 2,000"
        table.add_row(kind, f"{effect:g}", f"{found:.3f}", median)
        curves[f"{kind}, {effect:g}"] = [float((when <= look).mean()) for look in range(1, LOOKS + 1)]
    out.print(table)
    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, curve in curves.items():
            axes.plot(np.arange(1, LOOKS + 1) * ARRIVALS, curve, label=name)
        axes.set(xlabel="units in each arm", ylabel="share of experiments decided", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
