"""Requests in experiments: who takes part, and which policy answers."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from guards.policy import BUILT_IN
from serve.experiment import Experiment, parse_experiment
from serve.generation.ask import InternalRoad
from serve.registry.snapshot import LOOPBACK, Key, digest_secret
from serve.request import RequestContext
from tests.plans import made
from tests.serve.http.around import KEYED, SNAPSHOT, call, chat

EXPERIMENT = Experiment(
    id="i",
    order=parse_experiment(
        {"name": "e", "arms": [{"name": "a", "policy": "default"}, {"name": "b", "policy": "none"}], "unit": "user"}
    ),
    salt="s",
    start=0.0,
    epochs=({"a": 1.0, "b": 1.0},),
)
RUNNING = dataclasses.replace(SNAPSHOT, experiments=(EXPERIMENT,))


def test_an_experiment_chooses_the_policy_of_requests_that_choose_none() -> None:
    seen = set()
    for i in range(40):
        reached = chat({"user": f"u{i}"}, snapshot=RUNNING)[1].reached[0]["request"]
        assert reached.entry is not None and reached.policy.name == reached.entry.arm.policy == reached.plan.policy
        assert chat({"user": f"u{i}"}, snapshot=RUNNING)[1].reached[0]["request"].entry.arm == reached.entry.arm, "it is sticky"
        seen.add(reached.policy.name)
    assert seen == {"default", "none"}


@pytest.mark.parametrize("body", [{}, {"user": ""}, {"user": 3}, {"model": "m:default", "user": "u"}])
def test_who_has_no_unit_or_chose_a_policy_takes_no_part(body: dict[str, Any]) -> None:
    reached = chat(body, snapshot=RUNNING)[1].reached[0]["request"]
    assert reached.entry is None and reached.policy.name == "default"


def test_an_arm_is_forced_by_those_who_may_choose_policies_and_nobody_else() -> None:
    keyed = dataclasses.replace(KEYED, experiments=(EXPERIMENT,))
    forced = {"x-experiment-arm": "e/b"}
    answer, _ = chat({"user": "u"}, snapshot=keyed, headers={"authorization": "Bearer chat-secret", **forced})
    assert answer.status_code == 403
    answer, app = chat({"user": "u"}, snapshot=keyed, headers={"authorization": "Bearer root", **forced})
    assert answer.status_code == 200 and app.reached[0]["request"].policy.name == "none" and app.reached[0]["request"].entry.forced
    answer, _ = chat({}, snapshot=keyed, headers={"authorization": "Bearer root", "x-experiment-arm": "e/gone"})
    assert answer.status_code == 404 and "e/gone" in answer.json()["error"]["message"]


ASKING = [
    ("/v1/chat/completions", {"logprobs": True}),
    ("/v1/completions", {"logprobs": 0}),
    ("/v1/completions", {"prompt_logprobs": 0}),
    ("/v1/chat/completions", {"logprob_token_ids": [5]}),
    ("/v1/responses", {"include": ["message.output_text.logprobs"]}),
]


@pytest.mark.parametrize(("path", "fields"), ASKING)
def test_only_an_operator_sees_log_probabilities_of_more_than_the_default_policy(path: str, fields: dict[str, Any]) -> None:
    """What differs between two policies' is what was removed."""
    keys = (*KEYED.keys, Key("k3", digest_secret("comparing"), "compare"))
    keyed = dataclasses.replace(KEYED, keys=keys, experiments=(EXPERIMENT,))

    def ask(
        secret: str, model: str, *, user: str = "u1", headers: dict[str, str] | None = None
    ) -> tuple[int, RequestContext | None]:
        sent = {"authorization": f"Bearer {secret}", **(headers or {})}
        answer, app = call("POST", path, {"model": model, "user": user, **fields}, snapshot=keyed, headers=sent)
        return answer.status_code, app.reached[0]["request"] if app.reached else None

    assert ask("comparing", "m:none") == (403, None)
    assert ask("comparing", "m", headers={"x-experiment-arm": "e/b"}) == (403, None)
    for secret in ("comparing", "chat-secret"):
        for i in range(8):
            status, reached = ask(secret, "m", user=f"u{i}")
            assert status == 200 and reached is not None
            assert (reached.entry, reached.policy.name) == (None, "default"), "two arms are two policies"
    status, reached = ask("root", "m:none")
    assert status == 200 and reached is not None and reached.policy.name == "none"


def test_an_answer_that_nobody_waits_for_ends_when_it_is_cancelled() -> None:
    """vLLM's handlers run in tasks of their own and end when their client goes away, and only then."""
    ended: list[str] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()

        async def generate() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("aborted")
                raise

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(generate()), asyncio.create_task(listen())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel_one() -> None:
        road = InternalRoad(app, None)
        request = RequestContext(LOOPBACK, BUILT_IN["none"], SNAPSHOT.plan("none"), in_shadow=True)
        answering = asyncio.create_task(road.status("/v1/chat/completions", b"{}", request))
        await asyncio.sleep(0.05)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering

    asyncio.run(cancel_one())
    assert ended == ["aborted"]


def test_an_experiment_refuses_what_any_of_its_arms_would() -> None:
    """Otherwise who fails would depend on the arm, and the arm would show."""
    acting = dataclasses.replace(RUNNING, sets=made("a", phrases="fingerprint"))
    statuses = {chat({"user": f"u{i}", "prompt_logprobs": 1}, snapshot=acting)[0].status_code for i in range(20)}
    assert statuses == {400}
