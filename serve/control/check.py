"""Checking: what the sets would do to a text, without asking the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from guards.similarity.stream import Clauses
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.declaration import Suppress
from serve.control.similarity import Similarity
from serve.control.text_guards import TextGuards
from serve.hits import Hit, hit_of
from serve.registry.snapshot import Snapshot
from serve.registry.store import Registry


async def check(
    text: str,
    policy: str,
    *,
    snapshot: Snapshot,
    registry: Registry,
    phrases: Callable[[str], CompiledPhrases],
    similarity: Similarity,
    text_guards: TextGuards,
) -> list[Hit]:
    """What the sets would do to this text if it were asked, and if the model were about to write it. Raises InvalidPolicy."""
    in_force = set(snapshot.plan(policy).artifacts_of(Suppress))
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

    for each in plan.checks:
        hits += [hit_of(each.guard, verdict, verdict.owner) for verdict in await text_guards.judge(each, text)]
    if plan.gate is not None:
        verdicts = await similarity.judge_conversation([text], plan.gate_thresholds)
        hits += [hit_of("gate", verdict, plan.sets[verdict.owner]) for verdict in verdicts]
    if plan.stream is not None:
        clauses = Clauses()
        for clause in (*clauses.feed(text), *clauses.finish()):
            verdicts = await similarity.judge_passage(text[clause.start : clause.end], plan.stream_thresholds)
            hits += [hit_of("stream", verdict, plan.sets[verdict.owner], offset=clause.start) for verdict in verdicts]
    return hits
