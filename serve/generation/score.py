"""How likely given answers are under a policy: what "forgotten" is measured by, beyond what greedy decoding happens to say.

For operators only: the numbers tell what a set holds, which is what guards keep from clients.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field

from guards.errors import GuardError
from guards.forget_set import Frozen, Text
from guards.policy import DEFAULT
from serve.generation.client import GuardedEngineClient

AT_ONCE = 32
"""Continuations in the engine at a time, of one call."""


class ScoreOrder(Frozen):
    """The body of ``POST /lethe/v1/score``."""

    policy: str = DEFAULT
    question: Text = Field(description="what the user asks, in the model's chat template")
    continuations: tuple[Text, ...] = Field(min_length=1, max_length=256, description="answers")
    end: bool = Field(True, description="count the end of the answer as a token, as in training")
    top_logprobs: int = Field(0, ge=0, le=20, description="tell the likeliest tokens at each place, too")


class Unscorable(GuardError):
    """A question or an answer that does not fit."""


class Scorer:
    """Scores answers in the served model's chat template."""

    def __init__(self, client: GuardedEngineClient, tokenizer: Any, max_model_len: int) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def score(self, order: ScoreOrder) -> list[dict[str, Any]]:
        """For every continuation ``tokens`` (how many), ``logprob`` (their sum, nats) and ``logprobs``.

        With ``top_logprobs`` also ``token_ids`` and, at each of them, the ``top`` pairs of token and log-probability.

        Raises:
            Unscorable, InvalidPolicy, GuardError.
        """
        messages = [{"role": "user", "content": order.question}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        asked = []
        for text in order.continuations:
            tokens = self._tokenizer.encode(text, add_special_tokens=False)
            tokens += [self._tokenizer.eos_token_id] if order.end else []
            if len(prompt) + len(tokens) > self._max_model_len:
                length = len(prompt) + len(tokens)
                raise Unscorable(f"question and answer have {length} tokens, the model takes {self._max_model_len}: shorten them")
            asked.append(tokens)

        async def one(tokens: list[int]) -> dict[str, Any]:
            async with self._slots:
                places = await self._client.score(prompt, tokens, order.policy, order.top_logprobs)
            logprobs = [place[token] for token, place in zip(tokens, places, strict=True)]
            found: dict[str, Any] = {
                "tokens": len(tokens),
                "logprob": sum(logprobs),
                "logprobs": [round(each, 6) for each in logprobs],
            }
            if order.top_logprobs:
                found |= {
                    "token_ids": tokens,
                    "top": [[(token, round(each, 6)) for token, each in place.items()] for place in places],
                }
            return found

        return list(await asyncio.gather(*map(one, asked)))
