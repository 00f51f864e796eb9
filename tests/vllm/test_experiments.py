"""Experiments on the real engine: arms are sticky, shadows show nothing to anybody, and what was observed is what was said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.vllm.asking import POTTER, SCHOOL, assert_free_of, text
from tests.vllm.conftest import Server

ARMS = [{"name": "plain", "policy": "none"}, {"name": "guarded", "policy": "default"}]
TOKENS = 24


@pytest.fixture
def begin(admin: httpx.Client) -> Iterator[Callable[..., None]]:
    names: list[str] = []

    def create(name: str, **options: Any) -> None:
        made = admin.post("/experiments", json={"name": name, "arms": ARMS, "unit": "user", "salt": name, **options})
        assert made.status_code == 201, made.text
        names.append(name)

    yield create
    for name in names:
        assert admin.post(f"/experiments/{name}/stop").status_code == 200
        assert admin.delete(f"/experiments/{name}").status_code == 200


def ask(client: openai.OpenAI, user: str, **options: Any) -> tuple[str, str]:
    """What is said, and the request's id."""
    messages: Any = [{"role": "user", "content": SCHOOL}]
    model = client.models.list().data[0].id
    chosen: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "user": user}
    answer = client.chat.completions.with_raw_response.create(**chosen, **options)
    parsed = answer.parse()
    if options.get("stream"):
        said = "".join(chunk.choices[0].delta.content or "" for chunk in parsed if chunk.choices)
    else:
        said = parsed.choices[0].message.content or ""
    return said, answer.headers["x-request-id"]


def until(admin: httpx.Client, name: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    while not done(found := admin.get(f"/experiments/{name}").json()):
        assert time.monotonic() < deadline, found
        time.sleep(0.3)
    return found


def arms_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in found["arms"]}


def test_every_user_keeps_an_arm_streamed_or_not_and_the_report_counts_what_was_said(
    client: openai.OpenAI, admin: httpx.Client, forget: Any, begin: Any
) -> None:
    forget(*POTTER)
    plain, guarded = text(client, SCHOOL, ":none", max_tokens=TOKENS), text(client, SCHOOL, max_tokens=TOKENS)
    assert "Hogwarts" in plain and plain != guarded
    begin("live")
    users = {f"user-{i}": ask(client, f"user-{i}")[0] for i in range(8)}
    assert set(users.values()) == {plain, guarded}
    for user, said in users.items():
        assert ask(client, user, stream=True)[0] == said
    found = arms_of(admin.get("/experiments/live").json())
    for name, answer, told in (("plain", plain, 1.0), ("guarded", guarded, 0.0)):
        served = [user for user, said in users.items() if said == answer]
        arm = found[name]
        assert arm["units"] == len(served) and arm["counts"]["requests"] == 2 * len(served)
        assert arm["metrics"]["told"] == {"title": arm["metrics"]["told"]["title"], "mean": told, "n": 2 * len(served)}
        assert arm["metrics"]["error"]["mean"] == 0 and arm["metrics"]["tokens"]["mean"] > 1
        assert 0 < arm["metrics"]["first_token_ms"]["mean"] < arm["metrics"]["total_ms"]["mean"]
    assert found["guarded"]["counts"]["guard: suppression"] > 0 and "guard: suppression" not in found["plain"]["counts"]


def test_thumbs_find_their_arm_by_the_answers_id(client: openai.OpenAI, admin: httpx.Client, begin: Any) -> None:
    begin("liked")
    _, request_id = ask(client, "somebody")
    for named in (request_id, f"chatcmpl-{request_id}"):
        assert admin.post("/feedback", json={"request_id": named, "thumb": "down"}).json() == {
            "request_id": request_id,
            "thumb": "down",
        }
    thumbs = [arm["metrics"]["thumb"] for arm in admin.get("/experiments/liked").json()["arms"] if "thumb" in arm["metrics"]]
    assert len(thumbs) == 1 and thumbs[0]["mean"] == 0 and thumbs[0]["n"] == 1
    assert admin.post("/feedback", json={"request_id": "0" * 32, "thumb": "up"}).status_code == 404
    assert admin.post("/feedback", json={"request_id": request_id, "thumb": "sideways"}).status_code == 400


@pytest.mark.parametrize("mode", ["shadow", "paired"])
def test_what_other_arms_say_is_observed_and_shown_to_nobody(
    client: openai.OpenAI, admin: httpx.Client, server: Server, forget: Any, begin: Any, mode: str
) -> None:
    forget(*POTTER)
    guarded = text(client, SCHOOL, max_tokens=TOKENS)
    # The guarded arm is the one that clients see: first in shadow mode, by weight in paired mode.
    arms = [{**ARMS[1], "weight": 1}, {**ARMS[0], "weight": 0}]
    begin(mode, mode=mode, arms=arms)
    for stream in (False, True):
        for i in range(2):
            said, _ = ask(client, f"user-{i}", stream=stream)
            assert said == guarded
            assert_free_of(said)
    found = until(admin, mode, lambda found: arms_of(found)["plain"]["metrics"].get("told", {}).get("n") == 4)
    told = {name: arm["metrics"]["told"]["mean"] for name, arm in arms_of(found).items()}
    assert told == {"guarded": 0.0, "plain": 1.0}
    row = next(row for row in found["comparisons"] if row["metric"] == "told")
    assert row["estimate"] == 1.0 and row["arm"] == "plain" and row["units"] == 2 and not row["decided"]
    assert server.metric("lethe_shadow_waiting") == 0
    assert not found["sample_ratio"]["mismatch"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_counted_as_that_and_nothing_else(
    client: openai.OpenAI, admin: httpx.Client, server: Server, begin: Any, stream: bool
) -> None:
    name = f"gone-{str(stream).lower()}"
    begin(name)
    model = client.models.list().data[0].id
    body = {"model": model, "messages": [{"role": "user", "content": SCHOOL}], "max_tokens": 400, "stream": stream, "user": "u"}
    body |= {"ignore_eos": True}
    url = f"{server.url}/v1/chat/completions"
    if stream:
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=1.5)
    found = until(admin, name, lambda found: any(arm["metrics"] for arm in found["arms"]))
    metrics = [arm["metrics"] for arm in found["arms"] if arm["metrics"]]
    assert len(metrics) == 1 and metrics[0].keys() == {"left"} and metrics[0]["left"]["mean"] == 1.0


def test_a_forced_arm_answers_and_is_not_a_figure(client: openai.OpenAI, admin: httpx.Client, forget: Any, begin: Any) -> None:
    forget(*POTTER)
    begin("forced", arms=[{**ARMS[0], "weight": 0}, ARMS[1]])
    said, _ = ask(client, "u", extra_headers={"X-Experiment-Arm": "forced/plain"})
    assert "Hogwarts" in said
    assert_free_of(ask(client, "u")[0])
    found = until(admin, "forced", lambda found: bool(arms_of(found)["guarded"]["counts"]))
    assert arms_of(found)["plain"]["counts"] == {"arm forced": 1} and arms_of(found)["plain"]["metrics"] == {}


def test_errors_of_requests_are_figures_and_errors_in_orders_are_refused(
    client: openai.OpenAI, admin: httpx.Client, begin: Any
) -> None:
    begin("failing")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=client.models.list().data[0].id, messages=[{"role": "user", "content": "word " * 3_000}], user="u"
        )
    found = until(admin, "failing", lambda found: any("error" in arm["metrics"] for arm in found["arms"]))
    assert [arm["metrics"]["error"]["mean"] for arm in found["arms"] if "error" in arm["metrics"]] == [1.0]
    for path, body, status in (
        ("/experiments", {"name": "x", "arms": ARMS[:1]}, 400),
        ("/experiments", {"name": "x", "arms": [ARMS[0], {"name": "b", "policy": "gone"}], "unit": "user", "share": 0.5}, 400),
        ("/experiments", {"name": "failing", "arms": ARMS, "unit": "user"}, 409),
        ("/experiments", {"name": "other", "arms": ARMS, "unit": "user"}, 409),
        ("/experiments/gone/stop", {}, 404),
    ):
        answer = admin.post(path, json=body)
        assert answer.status_code == status, answer.text
    assert admin.put("/experiments/failing/weights", json={"plain": "many"}).status_code == 400
    assert admin.delete("/experiments/failing").status_code == 409
