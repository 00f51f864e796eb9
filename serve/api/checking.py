"""Checking: what the sets would do to a text, without asking the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from guards.similarity.gate import Verdict
from guards.similarity.stream import Clauses
from guards.suppression.automaton import CompiledPhrases
from serve.api.similarity import Similarity
from serve.registry.snapshot import Snapshot
from serve.registry.store import Registry


@dataclass(frozen=True, slots=True)
class Hit:
    """A place in a text that a forget set would act on."""

    forget_set: str
    guard: str
    start: int  # characters
    end: int
    text: str
    in_force: bool
    signal: str = "phrase"
    score: float = 1.0
    threshold: float = 1.0
    how: str = "plain"  # how the text had to be read


async def check(
    text: str,
    policy: str,
    *,
    snapshot: Snapshot,
    registry: Registry,
    phrases: Callable[[str], CompiledPhrases],
    similarity: Similarity,
) -> list[Hit]:
    """What the sets would do to this text if it were asked, and if the model were about to write it. Raises InvalidPolicy."""
    in_force = set(snapshot.plan(policy).suppression)
    hits = []
    for stored in await asyncio.to_thread(registry.forget_sets):
        artifact = stored.artifact("phrases")
        if artifact is None or artifact.status != "ready":
            continue
        compiled = await asyncio.to_thread(phrases, artifact.fingerprint)
        for start, end in await asyncio.to_thread(compiled.find, text):
            applies = stored.enabled and artifact.fingerprint in in_force
            hits.append(Hit(stored.name, "suppression", start, end, text[start:end], applies))
    plan = snapshot.text_plans[policy]
    if plan is None:
        return hits

    def hit(guard: str, verdict: Verdict, offset: int = 0) -> Hit:
        place = (verdict.start + offset, verdict.end + offset)
        score = round(verdict.score, 4)
        return Hit(
            plan.sets[verdict.owner], guard, *place, verdict.text, True, verdict.signal, score, verdict.threshold, verdict.how
        )

    if plan.gate is not None:
        hits += [hit("gate", verdict) for verdict in await similarity.look([text], plan.asked)]
    if plan.stream is not None:
        clauses = Clauses()
        for clause in (*clauses.feed(text), *clauses.finish()):
            verdicts = await similarity.said(text[clause.start : clause.end], plan.said)
            hits += [hit("stream", verdict, clause.start) for verdict in verdicts]
    return hits
