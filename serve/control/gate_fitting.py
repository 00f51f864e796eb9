"""Fitting a gate: measures how near a set's held-out questions and others' prompts come to it, and what thresholds promise."""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict
from typing import Any

from pydantic import Field

from guards.forget_set import Frozen, Name, Text
from guards.similarity.calibrate import error_curves, fit_stream_threshold, fit_threshold
from guards.similarity.declaration import DEFAULT_STREAM_THRESHOLD
from guards.training import general_prompts
from serve.control.similarity import Similarity
from serve.registry.records import NotReady
from serve.registry.store import Registry


class GateOrder(Frozen):
    """What calibrating a gate takes: everything has a default."""

    epsilon: float = Field(0.05, gt=0, lt=1, description="P(miss), at most")
    delta: float = Field(0.01, gt=0, lt=1, description="P(false alarm), at most")
    neighbours: tuple[Name, ...] = Field((), description="sets whose questions must not open the gate")
    prompts: tuple[Text, ...] = Field((), max_length=100_000, description="more prompts that must not")


async def measure_gate(registry: Registry, similarity: Similarity, name: str, order: GateOrder) -> tuple[str, dict[str, Any]]:
    """The thresholds of a set's gate and of its stream filter, with what they promise.

    Returns:
        The fingerprint of the vectors that were measured, and the record to store.

    Raises:
        UnknownName, NotReady, TooFewExamples, EncoderUnavailable.
    """
    content = await asyncio.to_thread(registry.content, name)
    positives = [entry.paraphrases[-1] for entry in content.questions if entry.paraphrases]
    others = [await asyncio.to_thread(registry.content, other) for other in order.neighbours]
    prompts = [*general_prompts(), *order.prompts, *(entry.question for other in others for entry in other.questions)]
    vectors = similarity.fingerprint(content)
    stored = await asyncio.to_thread(registry.forget_set, name)
    artifact = stored.artifact("similarity")
    if vectors is None or artifact is None or artifact.status != "ready" or artifact.fingerprint != vectors:
        raise NotReady(f"the similarity of forget set {name!r} is not ready: {'' if artifact is None else artifact.detail}")
    await similarity.load(also=[vectors])
    scores, found = await similarity.scores(positives, vectors)
    far, named = await similarity.scores(prompts, vectors)
    near = [math.inf if by_name else score for score, by_name in zip(scores, found, strict=True)]
    negatives = [math.inf if by_name else score for score, by_name in zip(far, named, strict=True)]
    fitted = fit_threshold(near, negatives, epsilon=order.epsilon, delta=order.delta)
    told = [entry.answer for other in others for entry in other.questions]
    passages = await similarity.passage_scores(told, vectors)
    record = {
        **asdict(fitted),
        **asdict(fit_stream_threshold(passages, delta=order.delta, default=DEFAULT_STREAM_THRESHOLD)),
        "named_by_others": sum(named),
        "encoder": similarity.encoder_fingerprint,
        "curves": [[round(value, 4) for value in row] for row in error_curves(near, negatives)],
    }
    return vectors, record
