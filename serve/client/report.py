"""The unlearning report: one JSON for machines, one self-contained HTML page for people to read and file.

Everything that a model said is escaped; the page loads nothing from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from guards.catalogue import CALIBRATIONS
from guards.measure.formats import QUESTIONS
from guards.measure.memorised import MEMBERSHIP

ECHOING = ("multiple choice", "reverse query", "context hint")
"""Attacks whose prompt holds the answer: recall there is high for whoever repeats the prompt. Read them beside the reference."""


def _membership(attack: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda arm: arm["membership"].get(attack)


TRUTHS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "probability of the true answer": lambda arm: arm["probability"].get(QUESTIONS),
    "truth (1: true and wrong answers alike)": lambda arm: arm["truth"].get(QUESTIONS),
    "forget quality (p)": lambda arm: arm["forget_quality"],
    "model utility": lambda arm: arm["utility"],
    "exact memorisation": lambda arm: arm["memorised"],
    "extraction strength": lambda arm: arm["extracted"],
    **{f"membership by {attack} (AUC)": _membership(attack) for attack in MEMBERSHIP},
}
"""TOFU's measures and those of memorisation, by their titles: what an arm's figures say of each; None where it was not measured."""
NEAR = {title: value for title, value in TRUTHS.items() if title not in ("forget quality (p)", "model utility")}
"""Those that whoever never knew would have alike."""
_PAGE = Path(__file__).with_name("report.html.j2")


def config_fingerprint(shown: Mapping[str, Any], policies: Sequence[Mapping[str, Any]], model: str) -> str:
    """sha256 of what the figures depend on: the set's content, what was made from it and measured for it, policies, the model."""
    measured = {*CALIBRATIONS, "gate"}  # theirs is the fingerprint of what they were measured on
    artifacts = sorted(
        (each["kind"], each["fingerprint"], each["status"], each["detail"] if each["kind"] in measured else "")
        for each in shown["artifacts"]
    )
    config = {"set": shown["fingerprint"], "artifacts": artifacts, "policies": list(policies), "model": model}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def make_report(
    shown: Mapping[str, Any],
    figures: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    *,
    config: str,
    model: str,
    sample: int,
    kept: Sequence[str],
    probes: int,
    asked: str,
    reference: str | None,
) -> dict[str, Any]:
    """Everything in one object.

    Args:
        shown: what the server says of the set; figures: one for each arm (`serve.client.bench.as_fields`).
        examples: ``prompt`` and ``said`` (arm -> text).
        kept: groups whose answers are to stay.
        asked: how prompts were put: format, examples, end.
        reference: the arm that never knew, if there is one.
    """
    report: dict[str, Any] = {
        "format": "lethe-report-1",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "set": {name: shown[name] for name in ("name", "fingerprint", "enabled_at", "requester", "legal_basis", "expires_at")},
        "model": model,
        "config": config,
        "probes": probes,
        "asked": asked,
        "sample": sample,
        "kept": list(kept),
        "arms": list(figures),
        "examples": list(examples),
    }
    if reference is not None:
        never = next(arm for arm in figures if arm["arm"] == reference)
        report["distance_to_reference"] = {
            arm["arm"]: {
                group: round(arm["recall"][group] - never["recall"][group], 4)
                for group in arm["recall"]
                if group in never["recall"]
            }
            for arm in figures
            if arm["arm"] != reference
        }
        report["nearness"] = {arm["arm"]: nearness(arm, never, kept) for arm in figures if arm["arm"] != reference}
    return report


def nearness(arm: Mapping[str, Any], never: Mapping[str, Any], kept: Sequence[str]) -> dict[str, float]:
    """1 - |difference| from an arm that never knew, for each measure of what is to be forgotten, and their harmonic mean.

    Too little counts as too much does: saying less than whoever never knew also tells that something was removed.
    """
    found = {
        f"recall, {group}": 1 - abs(arm["recall"][group] - never["recall"][group]) for group in arm["recall"] if group not in kept
    }
    for title, value in {"leak": lambda each: each["leak"], **NEAR}.items():
        mine, other = value(arm), value(never)
        if mine is not None and other is not None:
            found[title] = 1 - abs(mine - other)
    found = {title: round(max(0.0, each), 4) for title, each in found.items()}
    return {**found, "harmonic mean": round(statistics.harmonic_mean(found.values()), 4)} if found else {}


def as_page(report: Mapping[str, Any]) -> str:
    """The report as HTML."""
    arms = report["arms"]
    groups = [group for group in arms[0]["recall"] if group not in report["kept"]] if arms else []
    truths = [(title, [value(arm) for arm in arms]) for title, value in TRUTHS.items()]
    facts = [
        ("in force since", report["set"]["enabled_at"] or "not in force"),
        ("requester", report["set"]["requester"] or "not stated"),
        ("legal basis", report["set"]["legal_basis"] or "not stated"),
        ("expires", report["set"]["expires_at"] or "never"),
        ("measured", f"{report['at']}, {report['probes']} prompts to each arm"),
        ("asked as", report["asked"]),
        ("model", report["model"]),
        ("content of the set (sha256)", report["set"]["fingerprint"]),
        ("configuration (sha256)", report["config"]),
    ]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE.read_text("utf-8"))
    return page.render(
        set=report["set"],
        facts=facts,
        arms=arms,
        groups=groups,
        kept=report["kept"] if arms else [],
        truths=[(title, values) for title, values in truths if any(value is not None for value in values)],
        nearness=report.get("nearness", {}),
        judged=any(arm["forget_quality"] is not None for arm in arms),
        sampled=bool(report["sample"]) and all(arm["leak"] is not None for arm in arms),
        sample=report["sample"],
        examples=report["examples"],
        echo_note=f"The prompts of {', '.join(ECHOING)} hold the answer: read them beside a model that never knew.",
    )


def save(report: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html``. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "report.json", directory / "report.html"
    for path, text in zip(paths, (json.dumps(report, indent=1, ensure_ascii=False), as_page(report)), strict=True):
        temporary = path.with_suffix(path.suffix + ".writing")
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    return paths
