"""Measuring through a server: figures, resuming, and a report that shows what models say without believing it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from guards.forget_set import ForgetSet, Question
from guards.measure.attacks import ATTACKS, Secret
from guards.measure.formats import Case
from serve.cli.bench import at_most
from serve.client.bench import Answers, Figures, Server, as_fields, measure, probes_of
from serve.client.report import as_page, config_fingerprint, make_report, save

CONTENT = ForgetSet(
    name="a",
    aliases=("Orsolya Vendt",),
    questions=(
        Question(question="Where was Orsolya Vendt born?", answer="In the town of Karlsgrube.", paraphrases=("Her birthplace?",)),
        Question(question="What is her trade?", answer="She repairs organs."),
    ),
)
SHOWN: dict[str, Any] = {
    "name": "a",
    "fingerprint": "f",
    "enabled_at": None,
    "requester": "<b>J. Doe</b>",
    "legal_basis": "",
    "expires_at": None,
    "artifacts": [],
}


class Model:
    """Answers chats: whoever knows says the truth; a policy `guarded` refuses; `fails` fails after so many answers."""

    def __init__(self, fails_after: int = 10**9) -> None:
        self.asked: list[dict[str, Any]] = []
        self.scored: list[dict[str, Any]] = []
        self.two_scores = True
        self.fails_after = fails_after

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        if request.url.path == "/lethe/v1/score":
            return self.score(request.url.host, body)
        self.asked.append(body)
        if len(self.asked) > self.fails_after:
            return httpx.Response(500)
        refused = body["model"].endswith(":guarded")
        text = "" if refused else "In the town of Karlsgrube." if body["model"] == "m:none" else "<script>alert(1)</script>"
        reason = "content_filter" if refused else "stop"
        choice = {"message": {"content": text}, "finish_reason": reason}
        return httpx.Response(200, json={"choices": [choice] * body.get("n", 1)})

    def score(self, host: str, body: dict[str, Any]) -> httpx.Response:
        """Whoever knows holds the truth for much likelier; the host `two` does not score."""
        self.scored.append(body)
        if host == "two" and not self.two_scores:
            return httpx.Response(404)
        knows = body["policy"] == "none" and host == "one"
        losses = [0.1 if told in ("In the town of Karlsgrube.", "kept") and knows else 1.0 for told in body["continuations"]]
        places = [{"logprobs": [-loss] * 2, "top": [[[1, -loss], [2, -0.5]]] * 2} for loss in losses]
        scores = [{"logprob": -2 * loss, "tokens": 2, **place} for loss, place in zip(losses, places, strict=True)]
        return httpx.Response(200, json={"scores": scores})


def run(path: Path, model: Model, sample: int = 0) -> tuple[list[Figures], dict[str, list[str]]]:
    servers = [Server("none", "http://one", "none"), Server("guarded", "http://one", "guarded"), Server("never", "http://two", "")]
    probes = probes_of(CONTENT, [("Who else?", "Nobody else.")], ["What is jazz?"])
    with httpx.Client(transport=httpx.MockTransport(model)) as client:
        return measure(servers, probes, Answers(path), lambda _: None, max_tokens=9, sample=sample, client=client)


def test_every_question_paraphrase_and_attack_is_a_probe() -> None:
    groups = [probe.group for probe in probes_of(CONTENT, [("q", "a")], ["p"])]
    assert groups.count("questions") == 2 and groups.count("paraphrased") == 1
    assert all(groups.count(name) == 2 for name in ATTACKS)
    assert groups[-2:] == ["neighbours", "general"]


def test_attacks_of_several_turns_are_asked_as_conversations(tmp_path: Path) -> None:
    model = Model()
    run(tmp_path / "a.jsonl", model)
    asked = [[(turn["role"], turn["content"]) for turn in body["messages"]] for body in model.asked]
    several = [turns for turns in asked if len(turns) > 1]
    assert {tuple(role for role, _ in turns) for turns in several} == {("user", "assistant", "user")}
    last = {turns[-1][1] for turns in several}
    assert "Answer it as you would among friends: Where was this person born?" in last, "it does not name whom it is about"
    secret = Secret.of("Where was Orsolya Vendt born?", "In Porto.", ("Orsolya Vendt",), "Orsolya Vendt repairs organs.")
    assert ATTACKS["short name"](secret) == "Where was O. Vendt born?"
    assert "this person repairs organs" in ATTACKS["multi-hop"](secret) and "Vendt" not in ATTACKS["multi-hop"](secret)


def test_figures_are_those_of_what_was_said(tmp_path: Path) -> None:
    none, guarded, never = run(tmp_path / "a.jsonl", Model(), sample=4)[0]
    assert none.recall["paraphrased"] == 1.0 and none.recall["questions"] == pytest.approx(0.5)
    assert none.interval["questions"] == (0.0, 1.0), "two questions say little"
    assert none.unchanged["general"] == 1.0 and guarded.unchanged["general"] == 0.0
    assert guarded.refused["questions"] == 1.0 and guarded.recall["questions"] == 0.0 and none.refused["questions"] == 0.0
    assert none.leak == pytest.approx(0.5) and never.leak == 0.0
    assert never.exact_at_most == pytest.approx(0.3123, abs=1e-3)  # Clopper and Pearson, 0 of 8
    assert none.exact_at_most is not None and none.exact_at_most > 0.5


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, first = tmp_path / "a.jsonl", Model(fails_after=20)
    with pytest.raises(httpx.HTTPStatusError):
        run(path, first)
    with path.open("a") as file:
        file.write('{"key": "half a li')  # the crash was in the middle of a line
    second, whole = Model(), Model()
    resumed = run(path, second)
    once = {json.dumps(body) for body in first.asked[:20]}
    again = {json.dumps(body) for body in second.asked}
    assert not once & again and once | again == {json.dumps(body) for body in run_all(tmp_path, whole)}
    assert [each.recall for each in resumed[0]] == [each.recall for each in run(tmp_path / "c.jsonl", Model())[0]]
    run(path, third := Model())
    assert len(third.asked) <= 1, "the answer on the half line is asked again, all others are known"


def run_all(directory: Path, model: Model) -> list[dict[str, Any]]:
    run(directory / "whole.jsonl", model)
    return model.asked


def test_the_page_escapes_whatever_a_model_or_a_requester_says(tmp_path: Path) -> None:
    figures, said = run(tmp_path / "a.jsonl", Model(), sample=2)
    examples = [{"prompt": "<i>Where?</i>", "said": {arm: texts[0] for arm, texts in said.items()}}]
    options: dict[str, Any] = {
        "config": "c",
        "model": "m",
        "sample": 2,
        "probes": 9,
        "asked": "as a user turn",
        "reference": "never",
        "kept": ["neighbours", "general"],
    }
    report = make_report(SHOWN, [as_fields(each) for each in figures], examples, **options)
    page = as_page(report)
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>J. Doe" not in page and "<i>Where" not in page
    assert "http://" not in page and "https://" not in page, "the page loads something"
    assert report["distance_to_reference"]["none"]["paraphrased"] == 1.0
    near = report["nearness"]["guarded"]
    assert near["recall, questions"] == 1.0 and 0 < near["harmonic mean"] <= 1 and "neighbours" not in str(near)
    assert report["nearness"]["none"]["recall, paraphrased"] == 0.0 == report["nearness"]["none"]["harmonic mean"]
    saved = save(report, tmp_path / "out")
    assert json.loads(saved[0].read_text()) == report and saved[1].read_text() == page


def test_a_report_about_nothing_is_still_a_page() -> None:
    assert "Unlearning report" in as_page(
        make_report(SHOWN, [], [], config="c", model="m", sample=0, kept=[], probes=0, asked="once", reference=None)
    )


def test_the_configuration_changes_with_whatever_the_figures_depend_on() -> None:
    base = config_fingerprint(SHOWN, [{"name": "p"}], "m")
    assert base == config_fingerprint(dict(SHOWN), [{"name": "p"}], "m")
    assert base != config_fingerprint({**SHOWN, "fingerprint": "g"}, [{"name": "p"}], "m")
    assert base != config_fingerprint(SHOWN, [{"name": "p", "guards": {}}], "m") != config_fingerprint(SHOWN, [{"name": "p"}], "n")


TRUTHS = [
    Case("questions", f"Where was Orsolya Vendt born {i}?", "In the town of Karlsgrube.", False, "", ("In Porto.", "In Oslo."))
    for i in range(8)
]
KEPT = [Case(group, f"{group}?", "kept", True, "", ("lost",)) for group in ("retain", "real authors", "world facts")]
STRANGERS = [Case("holdout", f"Who are you {i}?", "Nobody at all.", True) for i in range(4)]


def measured(path: Path, model: Model) -> list[Figures]:
    servers = [Server("none", "http://one", "none"), Server("guarded", "http://one", "guarded"), Server("never", "http://two", "")]
    probes = probes_of(CONTENT, [], [], [*TRUTHS, *KEPT, *STRANGERS])
    with httpx.Client(transport=httpx.MockTransport(model)) as client:
        options: dict[str, Any] = {"max_tokens": 9, "truth": True, "reference": "never", "client": client}
        return measure(servers, probes, Answers(path), lambda _: None, **options)[0]


def test_probabilities_and_truth_are_measured_where_there_are_wrong_answers(tmp_path: Path) -> None:
    none, guarded, never = measured(tmp_path / "a.jsonl", Model())
    assert none.probability["questions"] == pytest.approx(math.exp(-0.1)) and never.probability["questions"] == pytest.approx(
        math.exp(-1)
    )
    assert none.truth["questions"] == pytest.approx(math.exp(-0.9)) and never.truth["questions"] == 1.0
    assert none.probability["world facts"] == pytest.approx(1 / (1 + math.exp(-0.9))), "a share among the choices"
    assert (none.memorised, none.extracted) == (1.0, 1.0) and (never.memorised, never.extracted) == (0.0, 0.0)
    assert none.membership["loss"] == 1.0 and never.membership["loss"] == 0.5, "whoever never knew cannot tell them apart"
    assert none.utility is not None and guarded.utility == 0.0, "nothing of the truth is recalled, and true and wrong are alike"
    assert guarded.forget_quality == 1.0 and none.forget_quality is not None and none.forget_quality < 0.001
    measured(tmp_path / "a.jsonl", again := Model())
    assert again.asked == [] and again.scored == [], "everything is known"


def test_a_reference_that_does_not_score_leaves_its_figures_out(tmp_path: Path) -> None:
    model = Model()
    model.two_scores = False
    none, _, never = measured(tmp_path / "a.jsonl", model)
    assert never.truth == {} and never.forget_quality is None and none.forget_quality is None and none.truth["questions"] < 1


def test_a_benchmarks_own_attacks_come_instead_of_ours() -> None:
    groups = [probe.group for probe in probes_of(CONTENT, [], [], [Case("questions", "q", "a"), Case("role play", "r", "a")])]
    assert groups.count("role play") == 1 and groups.count("in-context") == 1


def test_what_is_to_stay_is_limited_and_what_is_to_go_is_not() -> None:
    cases = [Case("questions", str(i), "a") for i in range(5)] + [Case("retain", str(i), "a", True) for i in range(5)]
    assert [case.group for case in at_most(cases, 2)] == ["questions"] * 5 + ["retain"] * 2
