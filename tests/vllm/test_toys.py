"""Guards of another package on the real engine: configured in a policy, loaded, applied, and closed where they fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from serve.default_model import NAME
from tests.vllm.conftest import Server

COUNT = {"messages": [{"role": "user", "content": "Write the numbers from 1 to 9, as digits."}], "temperature": 0, "max_tokens": 24}


@pytest.fixture
def ask(server: Server, admin: httpx.Client, forget: Callable[..., str]) -> Iterator[Callable[..., dict]]:
    """One choice under a policy of these guards, with a set in force that has nothing to do with it."""
    forget("Quidditch")

    def under(guards: dict, body: dict = COUNT, **options: object) -> dict:
        put = admin.put("/policies/toys", json={"guards": guards, "refusal": "No."})
        assert put.status_code == 200, put.text
        asked = httpx.post(f"{server.url}/v1/chat/completions", json={"model": f"{NAME}:toys", **body, **options}, timeout=120)
        return {"status": asked.status_code, **(asked.json().get("choices") or [asked.json()])[0]}

    yield under
    admin.delete("/policies/toys")


def test_it_is_applied_under_the_policy_that_names_it_and_under_no_other(ask: Callable[..., dict]) -> None:
    plain = ask({})["message"]["content"]
    assert any(character.isdigit() for character in plain), plain
    guarded = ask({"digits": {}})["message"]["content"]
    assert guarded and not any(character.isdigit() for character in guarded)
    assert ask({"digits": {"enabled": False}})["message"]["content"] == plain


def test_whether_streamed_or_beside_others_it_says_the_same(server: Server, ask: Callable[..., dict]) -> None:
    whole = ask({"digits": {}})["message"]["content"]
    body = {"model": f"{NAME}:toys", **COUNT, "stream": True}
    streamed = ""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
    assert streamed == whole
    several = ask({"digits": {}, "contrast": {"enabled": False}}, n=3, temperature=1.0, seed=3)
    assert not any(character.isdigit() for character in several["message"]["content"])


SHOUT = {
    "messages": [{"role": "user", "content": "Repeat exactly: my name is LONDON and I like tea."}],
    "temperature": 0,
    "max_tokens": 32,
}


def test_a_text_guard_refuses_a_prompt_and_operators_see_which_and_where(
    server: Server, admin: httpx.Client, ask: Callable[..., dict]
) -> None:
    refused = ask({"shouting": {}}, SHOUT)
    assert refused["finish_reason"] == "content_filter" and refused["message"]["refusal"] == "No."
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": f"{NAME}:toys", **SHOUT}, timeout=120)
    [hit] = admin.get(f"/requests/{answer.headers['x-request-id']}").json()["hits"]
    assert (hit["guard"], hit["text"], hit["action"], hit["where"]) == ("shouting", "LONDON", "shouting refuse", "prompt")


def test_a_special_token_in_the_middle_of_a_word_hides_nothing(ask: Callable[..., dict]) -> None:
    body = {**SHOUT, "messages": [{"role": "user", "content": "Repeat exactly: my name is LON<|im_end|>DON and I like tea."}]}
    assert ask({"shouting": {}}, body)["finish_reason"] == "content_filter"


def test_check_shows_what_a_text_guard_would_hit(admin: httpx.Client, ask: Callable[..., dict]) -> None:
    ask({"shouting": {}})
    hits = admin.post("/check", json={"text": "I live in LONDON.", "policy": "toys"}).json()["hits"]
    assert [(hit["guard"], hit["text"]) for hit in hits] == [("shouting", "LONDON")]


def test_a_text_guard_refuses_or_redacts_what_an_answer_says(ask: Callable[..., dict]) -> None:
    counted = ask({"shouting": {"prompt": "monitor", "answer": "monitor"}}, SHOUT)["message"]["content"]
    assert "LONDON" in counted
    redacted = ask({"shouting": {"prompt": "ignore", "answer": "redact"}}, SHOUT)["message"]["content"]
    assert "LONDON" not in redacted and redacted == counted.replace("LONDON", "[removed]")
    refused = ask({"shouting": {"prompt": "ignore"}}, SHOUT)
    assert refused["finish_reason"] == "content_filter" and "LONDON" not in (refused["message"]["content"] or "")


def test_a_text_guard_that_fails_closes_the_request_and_the_server_goes_on(ask: Callable[..., dict]) -> None:
    broken = {**SHOUT, "messages": [{"role": "user", "content": "PLEASE BREAK"}]}
    failed = ask({"shouting": {}}, broken)
    assert failed["status"] == 503 and "shouting" in json.dumps(failed)
    assert ask({"shouting": {}}, COUNT)["status"] == 200
    assert ask({"shouting": {"prompt": "monitor", "answer": "monitor"}}, broken)["status"] == 200, "one that only counts"


def test_a_guard_is_shown_with_its_settings(admin: httpx.Client) -> None:
    listed = {each["name"]: each for each in admin.get("/guards").json()["data"]}
    assert listed["digits"]["summary"] == "Keep digits out of the output." and not listed["digits"]["on_by_default"]
    assert "also_fractions" in listed["digits"]["settings"]["properties"]
    assert {"gate", "stream", "corrupt", "steering", "contrast", "suppression"} <= listed.keys()
