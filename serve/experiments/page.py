"""What an experiment has shown, as one self-contained HTML page. Everything is escaped; the page loads nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_PAGE = Path(__file__).with_name("experiment.html.j2")
WIDTH = 420
"""Of the plot of intervals, in pixels."""


def as_page(found: Mapping[str, Any]) -> str:
    """A page about ``found``, a `serve.experiments.report.report`."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = [{**row, "bar": _bar(row)} for row in found["comparisons"]]
    titles = {metric: shown["title"] for arm in found["arms"] for metric, shown in arm["metrics"].items()}
    counts = dict.fromkeys(what for arm in found["arms"] for what in arm["counts"])
    return page.from_string(_PAGE.read_text("utf-8")).render(
        found=found, rows=rows, titles=titles, counts=list(counts), width=WIDTH
    )


def _bar(row: Mapping[str, Any]) -> dict[str, float]:
    """Where an interval lies on an axis of its own: shares over -1 to 1, ratios over a quarter to four times."""

    def place(value: float | None, otherwise: float) -> float:
        if value is None:
            return otherwise
        if row["as"] == "difference":
            return min(1.0, max(0.0, (value + 1) / 2))
        if value <= 0:
            return 0.0
        return min(1.0, max(0.0, (math.log2(value) + 2) / 4))

    low, high = place(row["low"], 0.0), place(row["high"], 1.0)
    return {"low": WIDTH * low, "width": max(1.0, WIDTH * (high - low)), "at": WIDTH * place(row["estimate"], 0.5)}


def save_experiment(found: Mapping[str, Any], path: Path) -> None:
    """Write the page. Raises OSError."""
    temporary = path.with_suffix(path.suffix + ".writing")
    temporary.write_text(as_page(found), "utf-8")
    temporary.replace(path)
