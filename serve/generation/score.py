"""How likely given answers are under a policy: what "forgotten" is measured by, beyond what greedy decoding happens to say.

For operators only: the numbers tell what a set holds, which is what guards keep from clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import Field

from guards.errors import GuardError
from guards.forget_set import Frozen, Text
from guards.policy import DEFAULT
from serve.generation.ask import InternalRoad
from serve.registry.snapshot import Caller, Snapshot
from serve.request import RequestContext

_PREFIX = "token_id:"
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
    """A question and an answer that are too long together, or an engine that cannot be made to say an answer."""


class Scorer:
    """Scores answers in the served model's chat template.

    Args:
        road: asks this server; served: the base model's name.
    """

    def __init__(
        self, road: InternalRoad, served: str, snapshot: Callable[[], Snapshot], tokenizer: Any, max_model_len: int
    ) -> None:
        self._road = road
        self._served = served
        self._snapshot = snapshot
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def score(self, order: ScoreOrder, caller: Caller) -> list[dict[str, Any]]:
        """For every continuation ``tokens`` (how many), ``logprob`` (their sum, nats) and ``logprobs``.

        With ``top_logprobs`` also ``token_ids`` and, at each of them, the ``top`` pairs of token and log-probability.

        Raises:
            Unscorable, InvalidPolicy, NotAnswered.
        """
        snapshot = self._snapshot()
        plan = snapshot.plan(order.policy)
        messages = [{"role": "user", "content": order.question}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        continuations = []
        for text in order.continuations:
            tokens = self._tokenizer.encode(text, add_special_tokens=False)
            tokens += [self._tokenizer.eos_token_id] if order.end else []
            if len(prompt) + len(tokens) > self._max_model_len:
                length = len(prompt) + len(tokens)
                raise Unscorable(f"question and answer have {length} tokens, the model takes {self._max_model_len}: shorten them")
            continuations.append(tokens)

        async def one(tokens: list[int]) -> dict[str, Any]:
            request = RequestContext(
                caller,
                snapshot.policies[order.policy],
                replace(plan, forced=tuple(tokens)),
                snapshot.text_plans[order.policy],
            )
            async with self._slots:
                places = await self._places(list(prompt), tokens, order.top_logprobs, request)
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

        return list(await asyncio.gather(*map(one, continuations)))

    async def _places(
        self, prompt: list[int], continuation: list[int], top: int, request: RequestContext
    ) -> list[dict[int, float]]:
        """At each place of a continuation, token -> log-probability, as sampling at temperature 1 would use it.

        The engine is made to say the continuation; each token's log-probability is that of the combined distribution (base,
        assistants, masks) after the ones before it. A gate judges the prompt once; a stream filter does not judge at all.
        """
        body = {
            "model": self._served,
            "prompt": prompt,
            "max_tokens": len(continuation),
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": top,
            "skip_special_tokens": False,
            "return_tokens_as_token_ids": True,
        }
        [choice] = (await self._road.whole("/v1/completions", body, request))["choices"]
        found = choice["logprobs"]
        own = [int(token.removeprefix(_PREFIX)) for token in found["tokens"]]
        if own != continuation and own == continuation[: len(own)]:
            raise Unscorable(f"this server ends answers after {len(own)} tokens (--override-generation-config); shorten the answer")
        if own != continuation:
            raise Unscorable(
                "this engine said something else than it was made to say, so nothing can be read off; please report it"
            )
        tops = found["top_logprobs"] or [{}] * len(own)
        places = []
        for token, logprob, likeliest in zip(own, found["token_logprobs"], tops, strict=True):
            places.append({token: logprob} | {int(each.removeprefix(_PREFIX)): value for each, value in (likeliest or {}).items()})
        return places
