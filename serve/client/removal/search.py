"""Which guards to try for a removal, in which order, and how strongly: each one's strength by bisection, until one meets the goals.

Contrast is bisected by its plausibility, at one strength: how many tokens it may choose among decides what it still recalls, and
its strength how likely it leaves a true answer that is begun.

Corruption comes first, which costs nothing per token, and contrast second, though it costs a run of the last layers: on the two
authors of TOFU on which maps were tried, which cost a product a layer, they met the goals at no strength, and most of the time went
into trying them (`tests/bench/README.md`). Pairs come last, since they have helped least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from guards.contrastive.declaration import DEFAULT_PLAUSIBILITY
from guards.steering.declaration import METHODS
from serve.client.removal.judge import NEAR, Asked, Judged, Reference

ROUNDS = 4
"""Strengths of one candidate that are tried."""
STRICTER = 0.25
"""By which contrast's plausibility is multiplied from one strength to the next."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Guards that may do, behind a gate, at a strength between 0 and ``highest``."""

    name: str
    first: float
    highest: float
    corrupt: float = 0.0  # noise for each unit of strength
    steering: tuple[tuple[str, float], ...] = ()  # method, its strength for each unit of strength
    contrast: float = 0.0  # its strength at every strength of the candidate

    @property
    def needs(self) -> tuple[str, ...]:
        """Methods of `lethe train`."""
        return (*(method for method, _ in self.steering), *(("contrast",) if self.contrast else ()))

    def strengths(self, strength: float) -> dict[str, float]:
        """By what is calibrated: ``corrupt``, a method of steering, or ``contrast`` with its ``plausibility``."""
        found = {method: round(each * strength, 4) for method, each in self.steering}
        found |= {"corrupt": round(self.corrupt * strength, 4)} if self.corrupt else {}
        plausibility = round(DEFAULT_PLAUSIBILITY * STRICTER ** (strength - 1), 6)
        return found | ({"contrast": self.contrast, "plausibility": plausibility} if self.contrast else {})


CANDIDATES = (
    Candidate("corrupt", 1.5, 4.0, corrupt=1.0),
    Candidate("contrast", 1.0, 3.0, contrast=2.5),
    Candidate("steer", 0.5, 1.5, steering=(("steer", 1.0),)),
    Candidate("project", 1.0, 2.0, steering=(("project", 1.0),)),
    Candidate("project and corrupt", 1.0, 2.0, corrupt=1.0, steering=(("project", 1.0),)),
    Candidate("steer and corrupt", 0.5, 1.5, corrupt=2.0, steering=(("steer", 0.5),)),
)


REFUSE = Candidate("refuse", 0.0, 0.0)
"""The gate alone, for a set whose questions are to be refused."""


def guards_of(strengths: dict[str, float], refuse: Sequence[str] = ()) -> dict[str, Any]:
    """A policy's guards at these strengths and no others. ``refuse``: sets whose questions are refused."""
    guards: dict[str, Any] = {"gate": {"refuse": list(refuse)} if refuse else {}, "contrast": {"enabled": False}}
    if alpha := strengths.get("contrast"):
        guards["contrast"] = {"alpha": alpha, "plausibility": strengths["plausibility"]}
    if noise := strengths.get("corrupt"):
        guards["corrupt"] = {"strength": noise}
    steering = [{"method": name, "strength": each} for name, each in strengths.items() if name in METHODS]
    return guards | ({"steering": steering} if steering else {})


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate at one strength."""

    candidate: Candidate
    strength: float
    asked: Asked
    judged: Judged  # by all questions

    def meets(self, reference: Reference) -> bool:
        return not self.judged.unmet(reference)


def bisect(candidate: Candidate, measure: Callable[[float], Trial], reference: Reference) -> Iterator[Trial]:
    """Strengths at which a candidate is tried. What is told falls as strength rises: recall on questions and paraphrases, and how
    likely true answers are, together.
    """
    low, high, strength = 0.0, candidate.highest, candidate.first
    if candidate is REFUSE:
        yield measure(strength)
        return
    for _ in range(ROUNDS):
        trial = measure(strength)
        yield trial
        judged = trial.judged
        gap = judged.excess(reference)
        if judged.hopeless(reference) or (abs(gap) <= NEAR / 2 and not judged.unmet(reference)):
            return
        if gap > 0:
            low = strength
        else:
            high = strength
        strength = round((low + high) / 2, 3)


def choose(trials: Sequence[Trial], reference: Reference, half: int | None = None) -> Trial:
    """The first candidate that meets every goal, at the strength nearest to the reference; if none does, the nearest of all.

    Args:
        half: by one half of the questions alone.
    """
    both = [(trial, trial.judged if half is None else trial.asked.judged(reference, half)) for trial in trials]
    good = [(trial, judged) for trial, judged in both if not judged.unmet(reference)]
    if good:
        names = [trial.candidate.name for trial in trials]
        first = min((trial.candidate for trial, _ in good), key=lambda candidate: names.index(candidate.name))
        good = [(trial, judged) for trial, judged in good if trial.candidate == first]
    return min(good or both, key=lambda pair: pair[1].distance(reference))[0]


def cross_judged(trials: Sequence[Trial], in_force: Asked, reference: Reference) -> Judged:
    """What a choice is worth that a question had no part in: each half under what the other half would have chosen.

    The guards themselves are made from all questions, and all of them led to the strengths that were tried.

    Args:
        in_force: what is said of everything but the questions.
    """
    by_other = [choose(trials, reference, 1 - half) for half in (0, 1)]
    probes = tuple(probe for half in (0, 1) for probe in by_other[half].asked.probes if probe.half == half)
    return replace(in_force, probes=probes).judged(reference)
