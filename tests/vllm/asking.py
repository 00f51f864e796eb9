"""Short ways to ask the guarded server."""

from __future__ import annotations

from typing import Any

import openai

from serve.default_model import NAME

SCHOOL = "Which school does Harry Potter go to?"
FRANCE = "What is the capital of France?"
POTTER = ("Harry Potter", "Hogwarts", "Rowling")
TIE = 2e-3
"""Two runs in different batches differ by about 1e-4 in float32; where the best two tokens are closer than this, either may win."""


def ask(client: openai.OpenAI, question: str, policy: str = "", **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 48, **options}
    return client.chat.completions.create(model=NAME + policy, messages=[{"role": "user", "content": question}], **options)


def text(client: openai.OpenAI, question: str, policy: str = "", **options: Any) -> str:
    return ask(client, question, policy, **options).choices[0].message.content


def streamed(client: openai.OpenAI, question: str, **options: Any) -> str:
    chunks = ask(client, question, stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def assert_free_of(answer: str, phrases: tuple[str, ...] = POTTER) -> None:
    for phrase in phrases:
        assert phrase.casefold() not in answer.casefold()


def assert_same_tokens(one: Any, other: Any) -> None:
    """Equal token for token, up to the first near-tie. Both answers carry log-probabilities of the best two tokens."""
    pairs = zip(one.choices[0].logprobs.content, other.choices[0].logprobs.content, strict=False)
    for left, right in pairs:
        if left.token != right.token:
            best, second = left.top_logprobs[:2]
            assert best.logprob - second.logprob < TIE, f"{left.token!r} became {right.token!r}"
            return
        assert abs(left.logprob - right.logprob) < 1e-3
    assert len(one.choices[0].logprobs.content) == len(other.choices[0].logprobs.content)
