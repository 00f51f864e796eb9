"""Hits: which forget set a guard found in a request, by which signal, and where; kept for a while, for operators to ask.

A refused client is told nothing but the policy's sentence. Whoever runs the server can ask by the answer's ``x-request-id``:
``GET /lethe/v1/requests/{id}``, `lethe why ID`.

Kept in memory, the last `KEPT` requests that a guard hit, with no more of their text than the hit itself; a restart forgets them.
Not covered: what suppression took from an unconstrained answer, since the engine never samples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cachetools import FIFOCache

from guards.similarity.gate import Verdict
from serve.registry.records import now

KEPT = 10_000
MOST_HITS = 100
"""Of one request."""
MOST_CHARACTERS = 200
"""Of the text of one hit."""
Where = Literal["prompt", "answer", "text"]


@dataclass(frozen=True, slots=True)
class Hit:
    """A place in a text that a forget set acts on, or would act on."""

    forget_set: str
    guard: str
    start: int  # characters of ``where``, or of its turn
    end: int
    text: str
    in_force: bool = True
    signal: str = "phrase"
    score: float = 1.0
    threshold: float = 1.0
    how: str = "plain"  # how the text had to be read
    where: Where = "text"
    turn: int | None = None  # of a prompt, counted from 0; None for a text that has no turns, or a name that lies across two
    action: str = ""  # what the guard did about it; empty in a check


def hit_of(guard: str, verdict: Verdict, forget_set: str, *, where: Where = "text", offset: int = 0, action: str = "") -> Hit:
    """A verdict of similarity as a hit. ``offset``: characters before the text that was judged."""
    return Hit(
        forget_set,
        guard,
        verdict.start + offset,
        verdict.end + offset,
        verdict.text[:MOST_CHARACTERS],
        True,
        verdict.signal,
        round(verdict.score, 4),
        verdict.threshold,
        verdict.how,
        where,
        verdict.turn if where == "prompt" else None,
        action,
    )


@dataclass(frozen=True, slots=True)
class HitRequest:
    """A request that a guard hit."""

    request_id: str
    at: str
    caller: str
    policy: str
    revision: int
    refused: bool
    hits: Sequence[Hit]


class RecentHits:
    """The last requests that a guard hit. One per API process; belongs to its event loop."""

    def __init__(self) -> None:
        self._requests: FIFOCache[str, HitRequest] = FIFOCache(KEPT)

    def keep(self, request_id: str, caller: str, policy: str, revision: int, hits: Sequence[Hit], *, refused: bool) -> None:
        self._requests[request_id] = HitRequest(request_id, now(), caller, policy, revision, refused, tuple(hits[:MOST_HITS]))

    def get(self, request_id: str) -> HitRequest | None:
        return self._requests.get(request_id)
