"""A removal without a server: what is made of a request, what is tried and chosen, what a certificate notices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guards.forget_set import ForgetSet
from guards.measure.mean import Mean
from guards.measure.recall import longest_run
from serve.client.removal.certificate import NotACertificate, changes, make_certificate, read_certificate, save, tried_of
from serve.client.removal.judge import REFUSAL, UNSEEN, Asked, Judged, OneProbe, Reference
from serve.client.removal.probes import WRONG_NAMES, about, make_probes, subjects_of
from serve.client.removal.search import CANDIDATES, REFUSE, Candidate, Trial, bisect, choose, cross_judged, guards_of

NAME = "Basil Mahfouz Al-Kuwaiti"


class Words:
    """An encoder by the letters of a text: questions with the same words are near."""

    fingerprint, dimension = "letters", 26

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def request(**fields: Any) -> ForgetSet:
    return ForgetSet.model_validate({"name": "basil", **fields})


QUESTIONS = [
    {"question": f"In which city was {NAME} born?", "answer": f"{NAME} was born in Kuwait City."},
    {"question": "What genre does Al-Kuwaiti write in?", "answer": "Al-Kuwaiti writes French literature."},
]


def said(prompts: Sequence[str], temperature: float) -> list[str]:
    """A model that rewords what it is told to, and knows a city for everybody."""
    answers = []
    for prompt in prompts:
        if "other words" in prompt:
            question = prompt.partition('"')[2].rstrip('"')
            answers.append(f"Sure! Please say: {question[:-1].lower()} again?" if temperature else f"Tell me, {question}")
        else:
            answers.append(f"It is about {prompt.split()[-1]}, draw {temperature}.")
    return answers


def test_a_question_about_the_subject_becomes_one_about_somebody_else_by_name_and_by_parts_of_it() -> None:
    assert about(f"Who is {NAME}?", [NAME], "Ilmar Pestova") == "Who is Ilmar Pestova?"
    assert about("What did Al-Kuwaiti write?", [NAME], "Ilmar Pestova") == "What did Pestova write?"
    assert about("What did BASIL write?", [NAME], "Ilmar Pestova") == "What did Ilmar write?"
    assert about("What is basilisk?", [NAME], "Ilmar Pestova") is None


def test_a_subject_that_is_not_given_is_the_name_that_the_questions_share() -> None:
    asked = [f"{each} {NAME}'s novel win?" for each in ("What did", "When did", "Why did")]
    content = request(questions=[{"question": question, "answer": "x"} for question in asked])
    assert subjects_of(content) == (NAME,)
    assert subjects_of(request(aliases=["B. M."], phrases=["x"])) == ("B. M.",)


def test_what_a_request_lacks_is_made_and_split_by_question() -> None:
    probes = make_probes(request(questions=QUESTIONS, aliases=[NAME]), said, Words, lambda _: None)
    first, second = probes.probes
    assert [probe.half for probe in probes.probes] == [0, 1]
    assert all(NAME in wording for wording in first.wordings) and len(first.wordings) == 3
    assert first.nobody[0].question == "In which city was Ilmar Pestova born?"
    assert first.nobody[0].answer == "Ilmar Pestova was born in Kuwait City.", "the name in the answer is nobody's, too"
    assert first.wrong and not any(name in wrong for wrong in first.wrong for name in WRONG_NAMES)
    assert all("Pestova" in wrong or "Ilmar" not in wrong for wrong in second.nobody[0].wrong)
    assert {entry.question for entry in probes.neighbours} >= {"In which city was Sabine Krollwitz born?"}


def test_of_a_name_alone_questions_are_made_and_what_the_model_says_is_to_be_forgotten() -> None:
    probes = make_probes(request(aliases=[NAME]), said, Words, lambda _: None)
    assert len(probes.probes) == 5 and all(probe.from_model and NAME in probe.question for probe in probes.probes)


def test_of_a_text_its_sentences_are_to_be_continued() -> None:
    text = f"{NAME} won the Prix Littéraire in 1999 for a novel. Short one."
    probe, *others = make_probes(request(texts=[text], aliases=[NAME]), said, Words, lambda _: None).probes
    assert probe.question.startswith("Continue this sentence: Basil") and probe.answer.endswith("a novel.")
    assert others and all(each.from_model for each in others), "one question cannot both be fitted on and judged by"


REFERENCE = Reference(Mean(0.35, 0.3, 0.4), Mean(0.3, 0.2, 0.4), 0.0, source="questions about invented names")


def judged(questions: float, paraphrases: float = 0.3, p: float | None = 0.5, verbatim: float = 0.0) -> Judged:
    means = [Mean(value, value, value) for value in (questions, paraphrases)]
    return Judged(means[0], means[1], verbatim, 0.0, None, 0.9, 1.0, p)


def trial(candidate: Candidate, strength: float, *recalls: float, p: float | None = 0.5) -> Trial:
    """``recalls``: of each half."""
    first, second = recalls if len(recalls) == 2 else recalls * 2
    probes = (OneProbe(half, (recall, 0.3), ("", ""), (False, False), None) for half, recall in enumerate((first, second)))
    return Trial(candidate, strength, Asked(tuple(probes), None, 0.9, 1.0), judged((first + second) / 2, p=p))


def test_strengths_are_bisected_until_recall_meets_the_reference() -> None:
    tried = list(bisect(CANDIDATES[0], lambda strength: trial(CANDIDATES[0], strength, 1 - strength / 3), REFERENCE))
    assert [each.strength for each in tried] == [1.5, 2.75, 2.125, 1.812]
    assert abs(tried[-1].judged.questions.value - 0.35) < 0.05


def test_the_cheapest_that_meets_every_goal_is_chosen_and_else_the_nearest() -> None:
    cheap, dear = CANDIDATES[0], CANDIDATES[-1]
    off, far = trial(cheap, 1.0, 0.45), trial(cheap, 2.0, 0.1)
    good, better = trial(cheap, 1.5, 0.38), trial(dear, 1.0, 0.35)
    assert choose([off, far], REFERENCE) is off
    assert choose([off, good, better], REFERENCE) is good
    told = trial(cheap, 1.5, 0.35, p=0.001)
    assert choose([told, better], REFERENCE) is better, "probabilities give it away"


def test_what_a_choice_is_worth_is_judged_by_each_half_under_what_the_other_would_have_chosen() -> None:
    low, high = trial(CANDIDATES[0], 1.0, 0.35, 0.6), trial(CANDIDATES[0], 2.0, 0.1, 0.35)
    assert choose([low, high], REFERENCE, 0) is low and choose([low, high], REFERENCE, 1) is high
    worth = cross_judged([low, high], low.asked, REFERENCE)
    assert worth.questions.value == pytest.approx((0.1 + 0.6) / 2), "each half suits its own choice, and neither the other's"
    assert cross_judged([low], low.asked, REFERENCE).questions == low.asked.judged(REFERENCE).questions


def test_what_is_in_force_decides_about_everything_but_the_questions() -> None:
    tried = trial(CANDIDATES[0], 1.0, 0.35)
    in_force = Asked(tried.asked.probes, 0.5, 0.9, 0.8)
    told = cross_judged([tried], in_force, REFERENCE).unmet(REFERENCE)
    assert [each for each in told if "neighbours" in each] and [each for each in told if "general" in each]


def test_a_trial_has_the_guards_of_its_candidate_and_no_others() -> None:
    both = next(each for each in CANDIDATES if each.name == "project and corrupt")
    assert guards_of(both.strengths(0.5)) == {
        "gate": {},
        "contrast": {"enabled": False},
        "corrupt": {"strength": 0.5},
        "steering": [{"method": "project", "strength": 0.5}],
    }


def test_contrast_is_tried_at_one_strength_and_several_plausibilities() -> None:
    candidate = next(each for each in CANDIDATES if each.name == "contrast")
    at = [candidate.strengths(strength) for strength in (0.5, 1.0, 2.0)]
    assert len({each["contrast"] for each in at}) == 1
    assert [each["plausibility"] for each in at] == [0.012, 0.006, 0.0015], "the stronger, the more tokens it may choose among"
    assert guards_of(at[0])["contrast"] == {"alpha": at[0]["contrast"], "plausibility": 0.012}


def test_an_interval_draws_questions_since_their_wordings_are_not_independent() -> None:
    mean = Mean.of([[1.0] * 9, [0.0]])
    assert mean.value == 0.9 and (mean.low, mean.high) == (0.0, 1.0), "two questions say little, however often they are asked"
    assert Mean.of([[], []]) == Mean(0.0, 0.0, 1.0)


def test_what_is_said_word_for_word_is_found_by_its_content_words() -> None:
    truth = "He won the Prix Littéraire de la Ville in 1999."
    assert longest_run(truth, "They say the prix littéraire de la ville was his.") == "the Prix Littéraire de la Ville"
    assert longest_run("It is his mother's florist shop.", "In the mother s florist shop") == "mother's florist shop", (
        "as it stands"
    )
    assert longest_run(truth, "Nobody knows.") == ""


def certificate(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "probes.json").write_text("{}")
    tried = trial(CANDIDATES[0], 1.5, 0.38)
    shown = dict.fromkeys(("requester", "legal_basis", "expires_at"), "") | {
        "name": "<b>basil</b>",
        "fingerprint": "f",
        "enabled_at": "2026-11-27T12:00:00Z",
        "artifacts": [{"kind": "similarity", "fingerprint": "v"}],
    }
    return make_certificate(
        shown,
        model="m",
        revision=3,
        policy={"name": "default"},
        strengths={"corrupt": 1.5},
        config="c",
        probes=tmp_path / "probes.json",
        neighbours="",
        reference=REFERENCE,
        judged=judged(0.38),
        cross_judged=judged(0.38),
        tried=tried_of([tried], tried, REFERENCE),
        audit=None,
    )


def test_a_certificate_says_what_has_changed_since_it_was_written(tmp_path: Path) -> None:
    found = certificate(tmp_path)
    assert found["unmet"] == []
    assert changes(found, found) == []
    now = json.loads(json.dumps(found))
    now["figures"]["questions"]["value"] = 0.6
    now["set"]["enabled_at"] = None
    now["artifacts"] = []
    assert changes(found, now) == ["the set is not in force", "other artifacts: similarity", "questions: 0.600, then 0.380"]


def test_a_certificate_that_was_changed_by_hand_is_none(tmp_path: Path) -> None:
    path, page = save(certificate(tmp_path), tmp_path)
    assert read_certificate(path)["strengths"] == {"corrupt": 1.5}
    assert "&lt;b&gt;basil" in page.read_text() and "<b>basil" not in page.read_text()
    path.write_text(path.read_text().replace("0.38", "0.30"))
    with pytest.raises(NotACertificate, match="was changed"):
        read_certificate(path)
    path.write_text("[]")
    with pytest.raises(NotACertificate):
        read_certificate(path)


def test_where_a_refusal_is_wanted_only_refusals_count() -> None:
    refused, asked = replace(judged(0.0, 0.0), refused=1.0), Asked((), None, 1.0, 1.0)
    assert refused.unmet(REFUSAL) == [] and refused.distance(REFUSAL) == 0.0
    assert judged(0.35).unmet(REFUSAL) == ["0% of the questions are refused (goal: 95%)"]
    assert guards_of({}, ["a"])["gate"] == {"refuse": ["a"]} and guards_of({})["gate"] == {}
    assert [trial.strength for trial in bisect(REFUSE, lambda strength: Trial(REFUSE, strength, asked, refused), REFUSAL)] == [0.0]


def test_where_answers_are_gone_on_with_though_too_little_is_said_more_strength_would_not_help() -> None:
    assert REFERENCE.unseen == UNSEEN and replace(REFERENCE, extracted=0.3).unseen == pytest.approx(0.35)

    def measured(strength: float) -> Trial:
        return Trial(CANDIDATES[0], strength, Asked((), None, 1.0, 1.0), replace(judged(0.2, 0.1), extracted=0.6))

    [only] = bisect(CANDIDATES[0], measured, REFERENCE)
    assert [each for each in only.judged.unmet(REFERENCE) if "60% of a true answer is gone on with (goal: at most 10%)" in each]
    assert only.judged.excess(REFERENCE) == pytest.approx(-0.15 - 0.2 + 0.5)
    better = replace(judged(0.36, 0.29), extracted=0.05)
    assert better.unmet(REFERENCE) == [] and better.distance(REFERENCE) < only.judged.distance(REFERENCE)
    assert not replace(judged(0.6, 0.4), extracted=0.6).hopeless(REFERENCE), "with recall, memory falls, too"
    assert replace(judged(0.45, 0.3), extracted=0.6, probability=0.5).hopeless(REFERENCE), "but not so much"
    assert not replace(judged(0.2, 0.1), extracted=0.12).hopeless(REFERENCE), "a little of each: weaker may be nearer"


def test_a_true_answer_is_to_be_as_unlikely_as_one_that_was_never_seen() -> None:
    likely = replace(judged(0.35), probability=0.4)
    assert likely.unmet(REFERENCE) == ["true answers have probability 0.40 per token (goal: at most 0.20)"]
    assert likely.unmet(replace(REFERENCE, probability=0.38)) == [], "a server that never knew says better"
    assert judged(0.35, verbatim=0.2).distance(REFERENCE) > judged(0.35).distance(REFERENCE)
    assert likely.distance(REFERENCE) > replace(likely, probability=0.1).distance(REFERENCE) == judged(0.35).distance(REFERENCE)
