"""Phrases however they are written, on the real engine; and what an operator is told of a refusal."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from serve.default_model import NAME
from tests.vllm.conftest import Server

WRITTEN = [
    (
        ["\u0130brahim I\u015f\u0131k", "Stra\u00dfe", "\u03a0\u03b1\u03c0\u03b1\u03b4\u03cc\u03c0\u03bf\u03c5\u03bb\u03bf\u03c2"],
        [
            "\u0130BRAH\u0130M I\u015eIK",
            "IBRAHIM I\u015eIK",
            "STRASSE",
            "\u03a0\u0391\u03a0\u0391\u0394\u039f\u03a0\u039f\u03a5\u039b\u039f\u03a3",
        ],
        ["Ibrahim", "Strase"],
    ),
    (
        ["Maria\u00a0Kowalczyk", "O'Brien and sons", "the herons go\nand nobody"],
        [
            "Maria Kowalczyk",
            "MARIA\n\nKOWALCZYK",
            "O\u2019Brien and sons",
            "the herons go / and nobody",
            "the herons go\r\nand nobody",
        ],
        ["Maria K", "the herons go"],
    ),
    (
        [
            "+49 30 9018 2000",
            "DE89 3704 0044 0532 0130 00",
            "\u0645\u062d\u0645\u062f \u0627\u0644\u0633\u064a\u062f",
            "\uae40\ubbfc\uc218",
        ],
        [
            "+493090182000",
            "(030) 9018-2000",
            "DE89370400440532013000",
            "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f \u0627\u0644\u0633\u064a\u062f",
            "\uae40\ubbfc\uc218\ub294",
        ],
        ["030 9018 2001", "\uae40\ubbfc\uc21c"],
    ),
]


def say(server: Server, text: str, **fields: Any) -> httpx.Response:
    """Make the model say exactly one text, so that suppression alone decides."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Say it."}],
        "temperature": 0,
        "max_tokens": 100,
        "structured_outputs": {"choice": [text]},
        **fields,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


@pytest.mark.parametrize(("phrases", "texts", "others"), WRITTEN)
def test_a_phrase_is_not_said_however_it_is_written(
    server: Server, forget: Any, phrases: list[str], texts: list[str], others: list[str]
) -> None:
    forget(*phrases)
    for text in texts:
        choice = say(server, text).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter", text
        assert text not in choice["message"]["content"]
        streamed = say(server, text, stream=True).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert said == choice["message"]["content"], "a stream shows what the whole answer shows"
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
    for text in others:
        choice = say(server, text).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)


def test_in_a_script_without_spaces_a_word_starts_anywhere(server: Server, forget: Any) -> None:
    forget("\u5f20\u4f1f\u660e", word_boundary=True)
    assert say(server, "\u4ed6\u53eb\u5f20\u4f1f\u660e\u3002").json()["choices"][0]["finish_reason"] == "content_filter"


def test_an_exact_set_matches_what_is_written_only(server: Server, forget: Any) -> None:
    forget("Maria Kowalczyk", match="exact")
    assert say(server, "MARIA KOWALCZYK").json()["choices"][0]["finish_reason"] == "content_filter"
    assert say(server, "Maria\u00a0Kowalczyk").json()["choices"][0]["finish_reason"] == "stop"


def test_an_operator_learns_which_set_refused_an_answer_and_where(server: Server, admin: httpx.Client, forget: Any) -> None:
    name = forget("Maria Kowalczyk")
    answer = say(server, "Ask for maria\u2009KOWALCZYK today")
    shown = admin.get(f"/requests/{answer.headers['x-request-id']}").json()
    (hit,) = shown["hits"]
    assert shown["refused"] and shown["policy"] == "default"
    assert (hit["forget_set"], hit["guard"], hit["signal"], hit["where"]) == (name, "suppression", "phrase", "answer")
    assert (hit["start"], hit["end"], hit["text"]) == (8, 23, "maria\u2009KOWALCZYK")
    assert admin.get("/requests/nosuch").status_code == 404


def test_a_client_cannot_ask_why(server: Server, client: openai.OpenAI, admin: httpx.Client, forget: Any) -> None:
    """The answer to a client says the policy's sentence, and nothing of the set."""
    name = forget("Maria Kowalczyk")
    body = say(server, "Maria Kowalczyk").text
    assert name not in body and "Kowalczyk" not in body


def test_a_constrained_stream_shows_nothing_of_a_phrase_that_it_then_refuses(server: Server, forget: Any) -> None:
    forget("Hogwarts School of Witchcraft")
    text = "He went to Hogwarts School of Witchcraft"
    chunks = [json.loads(line[6:]) for line in say(server, text, stream=True).text.splitlines() if line.startswith("data: {")]
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert said.strip() == "He went to"
    assert chunks[-1]["choices"][0]["delta"]["refusal"]
    whole = say(server, text, logprobs=True, top_logprobs=1).json()["choices"][0]
    assert "".join(entry["token"] for entry in whole["logprobs"]["content"]) == whole["message"]["content"]


def test_an_answer_that_a_minimum_of_tokens_forces_on_ends_and_the_engine_goes_on(server: Server, forget: Any) -> None:
    forget("Harry Potter")
    choice = {"structured_outputs": {"choice": ["Harry Potter"]}, "min_tokens": 40, "max_tokens": 60}
    answer = say(server, "", **choice)
    assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "content_filter")
    assert say(server, "Harry").json()["choices"][0]["message"]["content"] == "Harry"
