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

from serve.compare.sequential import FEWEST_UNITS, SRM_ALPHA, SRM_CONCENTRATION, Floats, radius

KINDS = {"share": 0.05, "rare share": 0.05, "mean": 0.1, "heavy mean": 0.1}  # -> tau, as for live metrics
LOOKS, ARRIVALS, RETURNS, AT_ONCE = 80, 25, 20, 1_000


def _values(kind: str, unit: Floats, effect: float, rng: np.random.Generator) -> Floats:
    """One request of each unit, given what the unit is like (uniform in (0, 1))."""
    if kind == "share":
        return np.asarray(rng.random(unit.shape) < np.clip(0.1 + 0.8 * unit + effect, 0, 1), float)
    if kind == "rare share":
        return np.asarray(rng.random(unit.shape) < np.clip(0.04 * unit + effect, 0, 1), float)
    noise = rng.normal(size=unit.shape) if kind == "mean" else rng.standard_t(4, size=unit.shape)
    return np.asarray(0.6 * (unit - 0.5) + 0.3 * noise + effect)


def looks(kind: str, experiments: int, effect: float, rng: np.random.Generator) -> Iterator[tuple[Floats, Floats]]:
    """At each look, the difference of the arms and its variance, [experiments] each; inf before there are enough units."""
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
        mean = sums[1] / sums[0]
        residual = np.maximum(0, sums[3] - 2 * mean * sums[4] + mean**2 * sums[2])
        variance = units / (units - 1) * residual / sums[0] ** 2
        if "share" in kind:
            smoothed = (mean * units + 2) / (units + 4)
            variance = np.maximum(variance, smoothed * (1 - smoothed) / (units + 4))
        yield mean[1] - mean[0], variance.sum(0) if units >= FEWEST_UNITS else np.full(experiments, math.inf)


def decided(kind: str, *, experiments: int, effect: float, alpha: float, seed: int) -> Floats:
    """The look at which each experiment was decided; inf for never."""
    rng = np.random.default_rng(seed)
    when = []
    for start in range(0, experiments, AT_ONCE):
        size = min(AT_ONCE, experiments - start)
        first = np.full(size, math.inf)
        for look, (found, variance) in enumerate(looks(kind, size, effect, rng), 1):
            beyond = np.abs(found) > radius(variance, alpha=alpha, tau=KINDS[kind])
            first = np.where(beyond & np.isinf(first), look, first)
        when.append(first)
    return np.concatenate(when)


def false_alarms(kind: str, *, experiments: int, alpha: float, seed: int) -> float:
    """Share of experiments without an effect that some look decides."""
    return float(np.isfinite(decided(kind, experiments=experiments, effect=0.0, alpha=alpha, seed=seed)).mean())


def naive_false_alarms(kind: str, *, experiments: int, alpha: float, seed: int) -> float:
    """The same for a t-test at every look, to show what the sequences are for."""
    rng, alarms = np.random.default_rng(seed), 0
    bar = 1.959964 if alpha == 0.05 else math.sqrt(2) * 2
    for start in range(0, experiments, AT_ONCE):
        size = min(AT_ONCE, experiments - start)
        seen = np.zeros(size, bool)
        for found, variance in looks(kind, size, 0.0, rng):
            seen |= np.abs(found) > bar * np.sqrt(variance)
        alarms += int(seen.sum())
    return alarms / experiments


def srm_false_alarms(*, experiments: int, seed: int) -> float:
    """Share of experiments whose units fall as the weights say and that some look suspects: one after each of 4,000 units."""
    rng = np.random.default_rng(seed)
    lgamma = (
        np.array([math.lgamma(SRM_CONCENTRATION * 0.3 + i) for i in range(4_001)]),
        np.array([math.lgamma(SRM_CONCENTRATION * 0.7 + i) for i in range(4_001)]),
    )
    whole = np.array([math.lgamma(SRM_CONCENTRATION + i) for i in range(4_001)])
    alarms = 0
    for _ in range(0, experiments, AT_ONCE):
        ones = np.cumsum(rng.random((AT_ONCE, 4_000)) < 0.3, axis=1)
        total = np.arange(1, 4_001)
        log_e = (
            (whole[0] - whole[total])[None]
            + (lgamma[0][ones] - lgamma[0][0])
            + (lgamma[1][total - ones] - lgamma[1][0])
            - ones * math.log(0.3)
            - (total - ones) * math.log(0.7)
        )
        alarms += int((log_e.max(axis=1) >= math.log(1 / SRM_ALPHA)).sum())
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
        rates = [find(kind, experiments=options.experiments, alpha=0.05, seed=1) for find in (false_alarms, naive_false_alarms)]
        table.add_row(kind, *(f"{rate:.4f}" for rate in rates))
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
