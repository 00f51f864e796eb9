"""What is observed of live answers, without an engine: which figures, of whom, and what is left out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from guards.policy import BUILT_IN
from serve.experiment import Experiment, parse_experiment
from serve.experiments.live import LiveExperiments, unit_of
from serve.experiments.measurements import DROPPED, Figures, Measurements
from serve.registry.snapshot import LOOPBACK, Snapshot
from serve.request import Entry, RequestContext
from tests.plans import made
from tests.serve.experiments.live import live_experiments

ARMS = [{"name": "a", "policy": "none"}, {"name": "b", "policy": "default"}, {"name": "c", "policy": "default"}]


def running(**options: Any) -> Experiment:
    order = parse_experiment({"name": "e", "arms": ARMS, **options})
    return Experiment(id="i", order=order, salt="s", start=0.0, epochs=({arm["name"]: 1.0 for arm in ARMS},))


class Live:
    """Experiments over a snapshot, with an app that says what it is told to."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.snapshot = Snapshot(1, {}, BUILT_IN, (), experiments=(experiment,))
        self.measurements = Measurements(path / "o.db")
        self.experiment = experiment
        self.answers_with = 200
        self.text = "said"

    async def status(self, _path: str, _body: bytes, request: RequestContext) -> int:
        request.observation.text, request.observation.tokens = self.text, 3
        return self.answers_with

    def request(self, arm: str, unit: str = "u", *, text: str = "said", **seen: Any) -> RequestContext:
        chosen = self.experiment.arm(arm)
        request = RequestContext(
            LOOPBACK, BUILT_IN[chosen.policy], self.snapshot.plan(chosen.policy), entry=Entry(self.experiment, unit, chosen)
        )
        for name, value in {"total_s": 1.0, "tokens": 3, "text": text, **seen}.items():
            setattr(request.observation, name, value)
        return request

    def run(self, test: Callable[[LiveExperiments], Awaitable[None]]) -> Figures:
        async def around() -> None:
            live = live_experiments(lambda: self.snapshot, self.measurements)
            live.start(self)  # type: ignore[arg-type]  # it stands for the road
            await test(live)
            for _ in range(500):
                if live.shadow.busy:
                    await asyncio.sleep(0.01)
            await live.settle()
            await live.stop()

        asyncio.run(around())
        return self.measurements.figures("i", self.experiment.epoch)


def test_a_failure_after_the_status_was_sent_is_a_failure(tmp_path: Path) -> None:
    live = Live(tmp_path, running())

    async def test(experiments: LiveExperiments) -> None:
        experiments.completed(live.request("a", failed=True, first_token_s=0.1), 200, "r", "/", b"")

    figures = live.run(test)
    assert figures.sums["a", "error"].total == 1 and ("a", "total_ms") not in figures.sums and ("a", "told") not in figures.sums


def test_whoever_left_is_a_figure_and_says_nothing_else(tmp_path: Path) -> None:
    live = Live(tmp_path, running())

    async def test(experiments: LiveExperiments) -> None:
        experiments.completed(live.request("a"), None, "r1", "/", b"")
        experiments.completed(live.request("a"), 200, "r2", "/", b"")

    figures = live.run(test)
    assert figures.sums["a", "left"].total == 1 and figures.sums["a", "left"].n == 2 and figures.sums["a", "error"].n == 1


def test_times_of_a_first_token_are_those_of_streams_in_every_arm(tmp_path: Path) -> None:
    live = Live(tmp_path, running())

    async def test(experiments: LiveExperiments) -> None:
        experiments.completed(live.request("a"), 200, "r1", "/", b"")
        experiments.completed(live.request("b", first_token_s=0.2), 200, "r2", "/", b"")

    figures = live.run(test)
    assert ("a", "first_token_ms") not in figures.sums and figures.sums["b", "first_token_ms"].n == 1


def test_an_answer_that_a_guard_emptied_tells_nothing_and_counts_as_that(tmp_path: Path) -> None:
    live = Live(tmp_path, running())

    async def test(experiments: LiveExperiments) -> None:
        request = live.request("b", text="")
        request.blocked = True
        experiments.completed(request, 200, "r1", "/", b"")
        experiments.completed(live.request("a", text="", readable=False), 200, "r2", "/", b"")

    figures = live.run(test)
    assert figures.sums["b", "told"].n == 1 and figures.sums["b", "told"].total == 0 and figures.sums["b", "refused"].total == 1
    assert ("a", "told") not in figures.sums and figures.counts["a"]["not judged"] == 1, "what cannot be read is not judged"


def test_where_similarity_cannot_judge_nothing_is_told_either_way(tmp_path: Path) -> None:
    live = Live(tmp_path, running())
    live.snapshot = dataclasses.replace(live.snapshot, sets=made("s", similarity="vectors"))

    async def test(experiments: LiveExperiments) -> None:
        experiments.completed(live.request("a"), 200, "r1", "/", b"")

    figures = live.run(test)
    assert ("a", "told") not in figures.sums and figures.counts["a"]["not judged"] == 1


@pytest.mark.parametrize("shown", ["a", "b"])
def test_differences_are_to_the_first_arm_whoever_was_shown(tmp_path: Path, shown: str) -> None:
    live = Live(tmp_path, running(mode="paired"))

    async def test(experiments: LiveExperiments) -> None:
        experiments.completed(live.request(shown, tokens=3 if shown == "a" else 30), 200, "r1", "/", b"{}")

    figures = live.run(test)
    pairs = {arm for arm, metric in figures.pairs if metric == "tokens"}
    assert pairs == {"b", "c"} and figures.units == {shown: 1}
    assert figures.pairs["c", "tokens"].total == pytest.approx(0.0)
    assert (figures.pairs["b", "tokens"].total == pytest.approx(0.0)) is (shown == "a")
    assert ("b", "total_ms") not in figures.pairs and ("c", "error") not in figures.sums, "times and failures are those of clients"


def test_answers_that_fail_in_shadow_are_counted_and_compared_to_nothing(tmp_path: Path) -> None:
    live = Live(tmp_path, running(mode="shadow"))
    live.answers_with = 500

    async def test(experiments: LiveExperiments) -> None:
        experiments.completed(live.request("a"), 200, "r1", "/", b"{}")

    figures = live.run(test)
    assert figures.pairs == {} and figures.counts["b"] == figures.counts["c"] == {"failed in shadow": 1}


def test_prompts_that_find_no_room_are_counted_for_their_arm(tmp_path: Path) -> None:
    live = Live(tmp_path, running(mode="shadow"))

    async def test(experiments: LiveExperiments) -> None:
        experiments.shadow.client_comes()
        for i in range(4):
            experiments.completed(live.request("a", f"u{i}"), 200, f"r{i}", "/", b"{}")
        experiments.shadow.client_goes()

    figures = live.run(test)
    assert figures.counts["b"][DROPPED] == figures.counts["c"][DROPPED] == 2, "four wait"
    assert figures.pairs["b", "tokens"].n == 2


def test_what_waits_for_an_experiment_that_ended_is_not_answered(tmp_path: Path) -> None:
    live = Live(tmp_path, running(mode="shadow"))

    async def test(experiments: LiveExperiments) -> None:
        experiments.shadow.client_comes()
        experiments.completed(live.request("a"), 200, "r", "/", b"{}")
        live.snapshot = dataclasses.replace(live.snapshot, experiments=())
        experiments.shadow.client_goes()

    figures = live.run(test)
    assert figures.pairs == {} and ("b", "tokens") not in figures.sums


CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "first"}]}
LATER = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "x"}, {"role": "user", "content": "second"}]}


@pytest.mark.parametrize(
    ("kind", "fields", "headers", "known"),
    [
        ("key", {}, {}, True),
        ("user", {"user": "u"}, {}, True),
        ("user", {"metadata": {"user_id": "u"}}, {}, True),
        ("user", {"metadata": "u"}, {}, False),
        ("header", {}, {b"x-experiment-key": b"k"}, True),
        ("header", {}, {b"x-experiment-key": b" "}, False),
        ("conversation", CHAT, {}, True),
        ("conversation", {"input": "first"}, {}, True),
        ("conversation", {"prompt": [1, 2]}, {}, True),
        ("conversation", {"input": "second", "previous_response_id": "r"}, {}, False),
        ("conversation", {}, {}, False),
    ],
)
def test_a_unit_is_known_or_the_request_takes_no_part(kind: Any, fields: dict[str, Any], headers: Any, known: bool) -> None:
    assert (unit_of(kind, fields, headers, LOOPBACK) is not None) is known


def test_a_conversation_keeps_its_arm_over_its_turns() -> None:
    first, later = (unit_of("conversation", fields, {}, LOOPBACK) for fields in (CHAT, LATER))
    assert first == later != unit_of("conversation", {"messages": [{"role": "user", "content": "other"}]}, {}, LOOPBACK)
