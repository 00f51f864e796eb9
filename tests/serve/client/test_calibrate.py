"""Calibration: the search, without a model."""

from __future__ import annotations

import pytest

from guards.forget_set import ForgetSet
from serve.client.calibrate import CLOSE_ENOUGH, PROMPTS, Calibration, NotCalibratable, Point, about_nobody, calibrate, held_out

TRUTH = " ".join(f"w{i}" for i in range(100))
SET = ForgetSet(
    name="x",
    aliases=["Ann Other", "Other"],
    questions=[
        {"question": f"Who is Ann Other {i}?", "answer": TRUTH, "paraphrases": ["?", f"Tell of ANN OTHER {i}"]} for i in range(5)
    ],
)


def run(
    forgetting: float, reference: float | None, content: ForgetSet = SET, refused: tuple[str, ...] = ()
) -> tuple[Calibration, list[Point | None]]:
    """A model that says ``1 - forgetting * strength`` of the truth, .3 about nobody, and keeps the rest up to strength 2."""
    reported: list[Point | None] = []
    strengths = {"none": 0.0}

    def ask(policy: str, question: str) -> str | None:
        strength = strengths[policy]
        if policy != "none" and any(each in question for each in refused):
            return None
        if question in PROMPTS or question == "neighbour":
            return "the usual" if strength <= 2 else "the else"
        known = 1 - forgetting * strength if "ann other" in question.lower() else 0.3
        return " ".join(TRUTH.split()[: max(0, round(100 * known))])

    def set_strength(strength: float) -> str:
        strengths["trial"] = strength
        return "trial"

    return calibrate(content, ["neighbour"], reference, ask, set_strength, reported.append, first=1.0, highest=4.0), reported


@pytest.mark.parametrize("forgetting", [0.2, 0.35, 0.6, 1.5, 9.0])
def test_it_finds_the_strength_that_meets_the_reference(forgetting: float) -> None:
    found, _ = run(forgetting, None)
    assert found.reference == pytest.approx(0.3)
    chosen = next(point for point in found.points if point.strength == found.strength)
    assert abs(chosen.recall - 0.3) < CLOSE_ENOUGH + 0.001 or chosen.strength < 0.2
    assert found.points == tuple(sorted(found.points, key=lambda point: point.strength))
    assert found.evidence["questions"] == 5


def test_refused_questions_do_not_make_the_others_weaker() -> None:
    whole, _ = run(0.35, 0.3)
    some, _ = run(0.35, 0.3, refused=("OTHER 1", "OTHER 3"))
    assert some.strength == whole.strength and (some.questions, some.refused) == (3, 2)
    assert some.evidence["refused"] == 2
    with pytest.raises(NotCalibratable, match="3 of 5 held-out questions are refused"):
        run(0.35, 0.3, refused=("OTHER 1", "OTHER 2", "OTHER 3"))


def test_what_the_model_does_not_recall_anyway_is_no_measure_of_strength() -> None:
    with pytest.raises(NotCalibratable, match=r"recall .* is 1.000, the reference 1.000"):
        run(0.5, 1.0)


def test_a_reference_out_of_reach_ends_at_the_strongest_with_the_evidence() -> None:
    found, reported = run(0.05, 0.1)
    assert found.strength > 3.5
    assert found.points[-1].recall > 0.1 + CLOSE_ENOUGH
    assert found.points[-1].general == pytest.approx(0.5)
    assert len([point for point in reported if point]) == len(found.points)


def test_what_is_missing_is_named() -> None:
    bare = [{"question": "Who?", "answer": "Ann."}]
    with pytest.raises(NotCalibratable, match="paraphrases"):
        held_out(ForgetSet(name="x", questions=bare))
    nameless = ForgetSet(name="x", questions=[{"question": "Who?", "answer": "Ann.", "paraphrases": ["Whoever?"]}])
    with pytest.raises(NotCalibratable, match=r"aliases.*--reference"):
        about_nobody(nameless, held_out(nameless))
    assert run(0.5, 0.3, SET)[0].reference_from == "given"


def test_questions_about_nobody_keep_everything_but_the_name() -> None:
    for question, truth in about_nobody(SET, held_out(SET)):
        assert question.startswith("Tell of ")
        assert "other" not in question.lower()
        assert truth == TRUTH
