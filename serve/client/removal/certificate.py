"""The proof of a removal: a certificate for machines, a page for people, and measuring again whether it still holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from guards.whole_file import write_whole
from serve.client.removal.judge import Judged, Reference
from serve.client.removal.search import Trial

FORMAT = "lethe-certificate-2"
NOT_IN_FORCE = "the set is not in force"
MOVED = 0.02
"""Recall, or a share of answers, that differs by more has changed."""
_PAGE = Path(__file__).with_name("removal.html.j2")


class NotACertificate(ValueError):
    """What is wrong with the file."""


def figures_of(judged: Judged) -> dict[str, Any]:
    """Plain numbers, rounded."""
    fields = asdict(judged)
    del fields["left"]
    return {name: _rounded(value) for name, value in fields.items()}


def reference_of(reference: Reference) -> dict[str, Any]:
    fields = asdict(reference)
    del fields["answered"]
    return {name: _rounded(value) for name, value in fields.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def tried_of(trials: Sequence[Trial], chosen: Trial | None, reference: Reference) -> list[dict[str, Any]]:
    return [
        {
            "guards": trial.candidate.name,
            "strengths": trial.candidate.strengths(trial.strength),
            "figures": figures_of(trial.judged),
            "meets": trial.meets(reference),
            "chosen": trial is chosen,
        }
        for trial in trials
    ]


def make_certificate(
    shown: Mapping[str, Any],
    *,
    model: str,
    revision: int,
    policy: Mapping[str, Any],
    strengths: Mapping[str, float],
    config: str,
    probes: Path,
    neighbours: str,
    reference: Reference,
    judged: Judged,
    cross_judged: Judged,
    tried: Sequence[Mapping[str, Any]],
    audit: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything in one object, with its own hash.

    Args:
        shown: what the server says of the set; config: see `serve.client.report.config_fingerprint`.
        strengths: what was chosen for the set. probes: the file of what was asked. neighbours: the set whose
            answers are to stay, or "".
        judged: what is in force, on all questions. cross_judged: see `serve.client.removal.search`.
        audit: the row of the change that put it in force.
    """
    body = {
        "format": FORMAT,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "set": {name: shown[name] for name in ("name", "fingerprint", "enabled_at", "requester", "legal_basis", "expires_at")},
        "artifacts": [{"kind": each["kind"], "fingerprint": each["fingerprint"]} for each in shown["artifacts"]],
        "model": model,
        "revision": revision,
        "policy": dict(policy),
        "strengths": dict(strengths),
        "config": config,
        "probes": probes_fingerprint(probes),
        "neighbours": neighbours,
        "reference": reference_of(reference),
        "figures": figures_of(judged),
        "cross_judged": figures_of(cross_judged),
        "unmet": _unmet(judged, cross_judged, reference),
        "tried": list(tried),
        "audit": audit,
    }
    return {**body, "sha256": _hash(body)}


def _unmet(judged: Judged, cross_judged: Judged, reference: Reference) -> list[str]:
    """Goals that what is in force does not meet, and those that the cross-judged figures do not meet."""
    found = judged.unmet(reference)
    return found + [f"cross-judged: {each}" for each in cross_judged.unmet(reference) if each not in found]


def probes_fingerprint(file: Path) -> str:
    """sha256 of the questions. Raises OSError."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_certificate(path: Path) -> dict[str, Any]:
    """Raises NotACertificate, OSError."""
    try:
        found = json.loads(path.read_text("utf-8"))
        body = {name: value for name, value in found.items() if name != "sha256"}
        known = found["format"] == FORMAT
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise NotACertificate(f"{path} is no certificate of a removal ({error}); `lethe unlearn` writes them") from None
    if not known:
        raise NotACertificate(f"{path} is of format {found['format']!r}, not {FORMAT!r}; `lethe unlearn` writes a new one")
    if _hash(body) != found.get("sha256"):
        raise NotACertificate(f"{path} was changed after it was written: its own hash does not fit")
    return dict(found)


def changes(certificate: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since a certificate was written, in words; empty if it holds.

    Args:
        now: the same fields as they are now: ``set``, ``artifacts``, ``model``, ``policy``, ``config``, ``probes`` and ``figures``.
    """
    found = []
    if not now["set"]["enabled_at"]:
        found.append(NOT_IN_FORCE)
    elif now["set"]["enabled_at"] != certificate["set"]["enabled_at"]:
        found.append(f"the set is in force since {now['set']['enabled_at']}, then since {certificate['set']['enabled_at']}")
    if now["set"]["fingerprint"] != certificate["set"]["fingerprint"]:
        found.append("the content of the set was replaced")
    was = {(each["kind"], each["fingerprint"]) for each in certificate["artifacts"]}
    if changed := sorted({kind for kind, _ in was.symmetric_difference((a["kind"], a["fingerprint"]) for a in now["artifacts"])}):
        found.append(f"other artifacts: {', '.join(changed)}")
    if now["probes"] != certificate["probes"]:
        found.append("other questions: probes.json was changed")
    if now["policy"] != certificate["policy"]:
        found.append("the default policy was changed")
    if now["model"] != certificate["model"]:
        found.append(f"the model is {now['model']}, then {certificate['model']}")
    if not found and now["config"] != certificate["config"]:
        found.append("a strength or a threshold of the set was changed")
    for name, before in certificate["figures"].items():
        after = now["figures"][name]
        one, other = (each["value"] if isinstance(each, dict) else each for each in (before, after))
        if name != "forget_quality" and one is not None and other is not None and abs(one - other) > MOVED:
            found.append(f"{name}: {other:.3f}, then {one:.3f}")
    return found


def as_page(certificate: Mapping[str, Any]) -> str:
    """The certificate for people to read and file. Self-contained; everything that came from elsewhere is escaped."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE.read_text("utf-8"))
    return page.render(certificate=certificate)


def save(certificate: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write ``certificate.json`` and ``report.html``. Raises OSError."""
    paths = directory / "certificate.json", directory / "report.html"
    texts = json.dumps(certificate, indent=1, ensure_ascii=False), as_page(certificate)
    for path, text in zip(paths, texts, strict=True):
        write_whole(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))  # type: ignore[misc]
    return paths
