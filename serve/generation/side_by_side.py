"""Side by side: one question, answered under several policies at once, in one batch of the engine.

Every arm is a chat request like any client's (`ask`): the same app, the same choke point, its own plan. Only the policy differs.
For operators: the difference between an armed and an unarmed answer is what a set keeps secret.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal

import anyio
from pydantic import Field

from guards.errors import GuardError
from guards.forget_set import Frozen, Text
from guards.policy import DEFAULT, NONE
from serve.generation.ask import InternalRoad, NotAnswered
from serve.registry.snapshot import Caller, Snapshot
from serve.request import RequestContext

MOST_ARMS = 16


class Message(Frozen):
    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=1_000_000)


class CompareOrder(Frozen):
    """The body of ``POST /lethe/v1/compare``: ``question``, or ``messages``."""

    question: Text | None = None
    messages: tuple[Message, ...] = Field((), max_length=2_048)
    arms: tuple[str, ...] = Field(
        (NONE, DEFAULT), min_length=1, max_length=MOST_ARMS, description="policies; the first is compared to"
    )
    max_tokens: int = Field(256, gt=0, le=100_000)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**32, description="the same for all arms")
    stream: bool = False


class Incomparable(GuardError):
    """An order that cannot be carried out."""


@dataclass
class Arm:
    """What one policy answered."""

    policy: str
    text: str = ""
    finish_reason: str | None = None
    refusal: str | None = None
    error: str | None = None
    guard_events: list[str] = field(default_factory=list)  # what guards did, in order
    tokens: int = 0
    first_token_ms: float | None = None
    total_ms: float = 0.0
    token_texts: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Divergence:
    """How an arm's tokens differ from the first arm's."""

    at: int | None  # the first token that differs; None = none does
    same: float  # share of tokens in common, in order


def divergence(base: Sequence[str], other: Sequence[str]) -> Divergence:
    """Compare two answers token for token."""
    if base == other:
        return Divergence(None, 1.0)
    at = next((i for i, (one, two) in enumerate(zip(base, other, strict=False)) if one != two), min(len(base), len(other)))
    return Divergence(at, round(SequenceMatcher(None, base, other, autojunk=False).ratio(), 4))


class SideBySide:
    """Runs comparisons.

    Args:
        road: asks this server.
        served: the base model's name.
        spent: told how many tokens a caller's arm took.
    """

    def __init__(
        self,
        road: InternalRoad,
        served: str,
        snapshot: Callable[[], Snapshot],
        spent: Callable[[Caller, int], None],
    ) -> None:
        self._road = road
        self._spent = spent
        self._served = served
        self._snapshot = snapshot

    def check(self, order: CompareOrder) -> None:
        """Raises Incomparable, InvalidPolicy."""
        if (order.question is None) == (not order.messages):
            raise Incomparable("give either question or messages")
        if len(set(order.arms)) < len(order.arms):
            raise Incomparable(f"arms {', '.join(order.arms)} name a policy twice; every arm is a policy of its own")
        for policy in order.arms:
            self._snapshot().plan(policy)

    async def events(self, order: CompareOrder, caller: Caller) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """("delta", {arm, text}) as text comes, then ("done", everything)."""
        self.check(order)
        snapshot = self._snapshot()  # one revision for all arms
        queue: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
        arms = [Arm(policy) for policy in order.arms]

        async def run(arm: Arm) -> None:
            request = RequestContext(
                caller, snapshot.policies[arm.policy], snapshot.plan(arm.policy), snapshot.text_plans[arm.policy]
            )
            try:
                async for text in self._answer(order, arm, request):
                    await queue.put(("delta", {"arm": arm.policy, "text": text}))
            except NotAnswered as error:
                arm.error = str(error)
            except Exception as error:  # noqa: BLE001 - one arm's failure is its result
                arm.error = f"{type(error).__name__}: {error}"
            finally:  # also of a client that has gone
                self._spent(caller, request.observation.prompt_tokens + request.observation.tokens)
            arm.guard_events = list(request.guard_events)
            if request.blocked:
                arm.refusal = request.policy.refusal
            await queue.put(None)

        tasks = [asyncio.create_task(run(arm)) for arm in arms]
        try:
            running = len(tasks)
            while running:
                event = await queue.get()
                if event is None:
                    running -= 1
                else:
                    yield event
            shown = [self._shown(arm, arms[0]) for arm in arms]
            yield "done", {"revision": snapshot.revision, "arms": shown}
        finally:
            for task in tasks:
                task.cancel()
            # Whoever leaves cancels us again and again; each arm must come to its end, which counts its tokens.
            with anyio.CancelScope(shield=True):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, order: CompareOrder, arm: Arm, request: RequestContext) -> AsyncGenerator[str, None]:
        messages = [message.model_dump() for message in order.messages] or [{"role": "user", "content": order.question}]
        body = {
            "model": self._served,
            "messages": messages,
            "max_tokens": order.max_tokens,
            "temperature": order.temperature,
            "top_p": order.top_p,
            "seed": order.seed,
            "logprobs": True,
            "stream": True,
        }
        started = time.perf_counter()
        async for event in self._road.events("/v1/chat/completions", body, request):
            if "error" in event:
                arm.error = event["error"]["message"]
                break
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content") or ""
                if text and arm.first_token_ms is None:
                    arm.first_token_ms = round(1_000 * (time.perf_counter() - started), 1)
                arm.text += text
                arm.token_texts += [entry["token"] for entry in ((choice.get("logprobs") or {}).get("content") or ())]
                arm.finish_reason = choice.get("finish_reason") or arm.finish_reason
                if text:
                    yield text
        arm.tokens = len(arm.token_texts)
        arm.total_ms = round(1_000 * (time.perf_counter() - started), 1)

    @staticmethod
    def _shown(arm: Arm, first: Arm) -> dict[str, Any]:
        fields = asdict(arm)
        del fields["token_texts"]
        return fields | {"divergence": asdict(divergence(first.token_texts, arm.token_texts))}
