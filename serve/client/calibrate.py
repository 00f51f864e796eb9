"""Calibration: the strength at which a set is forgotten as well as by a model that never knew it, and no more.

Talks to a running server like any client. Held-out paraphrases (the last one of every question, which training leaves out) are
asked at one strength after the other; recall falls as strength rises, so bisection finds where it meets the reference. Zero is
not the aim: a model that has never heard of a person still guesses some words right, and silence would itself tell that something
was removed.

Covered: greedy answers, by ROUGE-L recall. Not covered: sampled answers (see `lethe bench --sample`) and questions that nobody
wrote down.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from guards.forget_set import ForgetSet
from guards.measure.recall import rouge_l_recall

CLOSE_ENOUGH = 0.02
"""Recall this near to the reference ends the search."""
INVENTED = ("Tarvin Olesko", "Mirelle Dastrup", "Joran Vekander", "Sabine Krollwitz", "Ilmar Pestova", "Quenna Harrowby")
"""Names that nobody has."""
PROMPTS = (
    "What do bees eat?",
    "Explain gravity simply.",
    "How do I clean a window?",
    "What is jazz?",
    "Describe Tokyo in three sentences.",
    "How do airplanes fly?",
    "Who was Napoleon?",
    "What is the speed of light?",
    "How do I change a tyre?",
    "What is a mortgage?",
)
"""General prompts that training does not see."""

Ask = Callable[[str, str], str | None]
"""(policy, question) -> greedy answer; None = refused."""


class NotCalibratable(ValueError):
    """What is missing, and how to give it."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one strength does."""

    strength: float
    recall: float  # mean ROUGE-L recall on the held-out paraphrases
    neighbours: float  # mean recall of the unguarded answers to the neighbours' questions; 1 = unchanged
    general: float  # the same for general prompts


@dataclass(frozen=True, slots=True)
class Calibration:
    """The choice, and the evidence for it."""

    strength: float
    reference: float
    reference_from: str
    questions: int
    refused: int  # questions left out, since they are refused at any strength
    points: tuple[Point, ...]

    @property
    def evidence(self) -> dict[str, Any]:
        return {
            "reference": round(self.reference, 4),
            "reference_from": self.reference_from,
            "questions": self.questions,
            "refused": self.refused,
            "points": [{name: round(value, 4) for name, value in asdict(point).items()} for point in self.points],
        }


def held_out(content: ForgetSet) -> list[tuple[str, str]]:
    """(question, true answer) pairs that training does not see.

    Raises:
        NotCalibratable: no question has a paraphrase.
    """
    worded = [entry for entry in content.questions if any(map(str.isalnum, entry.answer))]  # others have nothing to recall
    pairs = [(entry.paraphrases[-1], entry.answer) for entry in worded if entry.paraphrases]
    if not pairs:
        raise NotCalibratable(
            f"no question of forget set {content.name!r} has paraphrases; add at least one to each ('paraphrases': [...]), "
            "which training holds out for this"
        )
    return pairs


def about_nobody(content: ForgetSet, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs whose question names the subject, about somebody who does not exist; the true answers stay as they are.

    Raises:
        NotCalibratable: no question names any of the set's aliases.
    """
    invented: list[tuple[str, str]] = []
    for question, truth in pairs:
        for alias in sorted(content.aliases, key=len, reverse=True):
            if alias.lower() in question.lower():
                start = question.lower().index(alias.lower())
                name = INVENTED[len(invented) % len(INVENTED)]
                invented.append((question[:start] + name + question[start + len(alias) :], truth))
                break
    if not invented:
        raise NotCalibratable(
            f"no held-out question of forget set {content.name!r} names one of its aliases, so what a model would say that never "
            "knew the subject cannot be estimated; add aliases, or give --reference (the recall of such a model)"
        )
    return invented


def calibrate(
    content: ForgetSet,
    neighbours: Sequence[str],
    reference: float | None,
    ask: Ask,
    set_strength: Callable[[float], str],
    report: Callable[[Point | None], None],
    *,
    first: float,
    highest: float,
    most_rounds: int = 7,
) -> Calibration:
    """Find the strength.

    Args:
        content: the forget set; it is enabled, and what is calibrated acts on it.
        neighbours: questions whose answers should stay.
        reference: recall of a model that never knew; None estimates it from the same questions about nobody.
        ask: answers a question under a policy.
        set_strength: makes a policy of this strength and returns its name.
        report: called after every point, and with None after every other batch of questions.
        first, highest: strength to begin with, and the greatest to try. For contrast, 1 is where the order of tokens flips.

    Raises:
        NotCalibratable: see `held_out` and `about_nobody`; or the model recalls no more than the reference to begin with; or most
            questions are refused, whatever the strength.
    """
    pairs = held_out(content)
    with ThreadPoolExecutor(16) as pool:

        def ask_all(policy: str, questions: Sequence[str]) -> list[str | None]:
            return list(pool.map(lambda question: ask(policy, question), questions))

        def answers(policy: str, questions: Sequence[str]) -> list[str]:
            return [each or "" for each in ask_all(policy, questions)]

        def recall(policy: str, asked: Sequence[tuple[str, str]]) -> float:
            said = answers(policy, [question for question, _ in asked])
            return statistics.fmean(rouge_l_recall(truth, each) for (_, truth), each in zip(asked, said, strict=True))

        # A refusal recalls nothing, at any strength: counting it would make the others too weak.
        asked = len(pairs)
        tried = ask_all(set_strength(first), [question for question, _ in pairs])
        report(None)
        pairs = [pair for pair, said in zip(pairs, tried, strict=True) if said is not None]
        if 2 * len(pairs) < asked:
            raise NotCalibratable(
                f"{asked - len(pairs)} of {asked} held-out questions are refused, whatever the strength: they touch the set "
                "without naming it; add the names that they use to the set's aliases"
            )
        source = "given"
        if reference is None:
            invented = about_nobody(content, pairs)
            reference, source = recall("none", invented), f"{len(invented)} of the questions, about invented names"
            report(None)
        unguarded = {name: answers("none", asked) for name, asked in (("neighbours", neighbours), ("general", PROMPTS))}
        report(None)

        def stays(policy: str, name: str, asked: Sequence[str]) -> float:
            both = zip(unguarded[name], answers(policy, asked), strict=True)
            same = [rouge_l_recall(before, after) for before, after in both if any(map(str.isalnum, before))]
            return statistics.fmean(same) if same else 1.0

        def measure(strength: float) -> Point:
            policy = set_strength(strength)
            kept = {name: stays(policy, name, asked) for name, asked in (("neighbours", neighbours), ("general", PROMPTS))}
            point = Point(strength, recall(policy, pairs), **kept)
            report(point)
            return point

        points = [Point(0.0, recall("none", pairs), 1.0, 1.0)]
        report(points[0])
        low, high = 0.0, highest
        strength = first
        if points[0].recall < reference + CLOSE_ENOUGH:
            raise NotCalibratable(
                f"without any guard the recall on the held-out paraphrases is {points[0].recall:.3f}, "
                f"the reference {reference:.3f}: nothing to measure a strength by; "
                "hold out paraphrases that the model answers"
            )
        while abs(points[-1].recall - reference) > CLOSE_ENOUGH and len(points) <= most_rounds and high - low > 0.0125 * highest:
            points.append(measure(strength))
            if points[-1].recall > reference:
                low = strength
            else:
                high = strength
            strength = (low + high) / 2
    # The weakest strength that comes near enough, else the one that comes nearest: a stronger one only does more harm.
    near = [point for point in points if point.recall <= reference + CLOSE_ENOUGH]
    chosen = min(near, key=lambda point: point.strength) if near else min(points, key=lambda point: point.recall)
    points.sort(key=lambda point: point.strength)
    return Calibration(chosen.strength, reference, source, len(pairs), asked - len(pairs), tuple(points))
