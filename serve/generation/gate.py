"""The gate: what a conversation touches, decided before the engine is asked.

It reads the whole prompt, back from its tokens, so that no endpoint and no earlier turn can pass beside it.

Covered: every turn of the prompt, special tokens a user writes into it left out, names across turns. Not covered: what is only in
images; what the encoder does not understand (`guards.similarity`).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from prometheus_client import Counter
from vllm.sampling_params import SamplingParams

from guards.similarity.disguise import TooMuchToRead
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.gate import Verdict
from guards.similarity.windows import sentences
from guards.steering.declaration import Corrupt
from guards.suppression.vocabulary import Vocabulary
from guards.text_plan import TextPlan
from guards.types import Plan
from serve.control.similarity import Similarity
from serve.control.text_guards import TextGuards
from serve.hits import Where

gate_outcomes = Counter("lethe_gate_total", "Conversations that the gate judged.", ["policy", "outcome"])

PASTED = 0.85
"""Cosine from which a statement in the prompt counts as the set's own."""
_ROLE = re.compile(r"^(?:system|user|assistant|tool|developer|human|model)\s*(?:\n|$)", re.IGNORECASE)


class RecordEvent(Protocol):
    """Takes note of a guard event."""

    def __call__(self, action: str, verdicts: Iterable[Verdict] = (), *, where: Where = "prompt", offset: int = 0) -> None:
        """``action``: guard and what it did, such as "gate refuse"; ``offset``: characters of the answer before what was judged."""
        ...


def turns_of(token_ids: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """A prompt as its turns: the texts between the chat template's own tokens, without the names of roles."""
    turns: list[str] = []
    run: list[int] = []
    for token in (*token_ids, None):
        if token is None or vocabulary.special[token]:
            text = _ROLE.sub("", vocabulary.text_of(run).decode("utf-8", "replace").strip()).strip()
            if text:
                turns.append(text)
            run = []
        else:
            run.append(token)
    return turns


def spans_of(
    token_ids: Sequence[int], vocabulary: Vocabulary, places: Callable[[str], Sequence[tuple[int, int]]]
) -> list[tuple[int, int]]:
    """The tokens that spell places in a prompt's text, special tokens left out: [first, last + 1), merged where they touch.

    A name may lie across turns, and a token may hold more than the name: it counts whole.
    """
    pieces = [vocabulary.text_of([token]) for token in token_ids]
    ends = list(itertools.accumulate(map(len, pieces)))
    whole = b"".join(pieces).decode("utf-8", "surrogateescape")  # a stray byte is one character, so that lengths can be told
    begins = list(itertools.accumulate(map(_bytes_of, whole), initial=0))
    spans: list[tuple[int, int]] = []
    for start, end in places(_STRAY.sub("\ufffd", whole)):
        first, last = bisect.bisect_right(ends, begins[start]), bisect.bisect_left(ends, begins[end])
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last + 1))
        else:
            spans.append((first, last + 1))
    return spans


_STRAY = re.compile("[\udc80-\udcff]")


def _bytes_of(character: str) -> int:
    """How many bytes of UTF-8 it was decoded from."""
    code = ord(character)
    return 1 if code < 0x80 or 0xDC80 <= code <= 0xDCFF else 2 if code < 0x800 else 3 if code < 0x10000 else 4


@dataclass(frozen=True, slots=True)
class Request:
    """One call of ``generate``."""

    prompt: Any  # has prompt_token_ids
    params: SamplingParams
    id: str
    plan: Plan
    text: TextPlan
    restartable: bool
    ended: Callable[[], None]  # an output was ended by a guard
    record: RecordEvent  # a guard did something


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What a conversation touches, as similarity artifacts."""

    touched: frozenset[str]
    brought: frozenset[str]  # what the user brought along, under a policy that ignores that
    corrupt: Corrupt | None = None  # where the prompt names what it touches

    def also(self, owners: Iterable[str]) -> GateDecision:
        return replace(self, touched=self.touched | frozenset(owners))

    def closed(self, text: TextPlan) -> dict[str, float]:
        """The sets to look for in the answer: those whose gate is still closed, and that the user did not bring along."""
        if text.gate is None or text.gate.on_hit == "monitor":
            return {}
        known = self.touched | self.brought
        return {owner: threshold for owner, threshold in text.gate_thresholds.items() if owner not in known}

    def engaged(self, plan: Plan, text: TextPlan) -> Plan:
        """The plan with the gated guards of the sets that were touched only, and of those about which nothing can be said."""
        if text.gate is None or text.gate.on_hit == "monitor":
            return plan
        left_out = engages(text, text.gate_thresholds) - engages(text, self.touched)
        corrupt = () if self.corrupt is None else (self.corrupt,)
        return replace(plan, entries=(*corrupt, *(entry for entry in plan.entries if entry.key not in left_out)))


def engages(text: TextPlan, owners: Iterable[str]) -> set[tuple[str, tuple[str, ...]]]:
    """Keys (`guards.types.Entry.key`) of the entries that act once these sets have opened the gate."""
    return {key for owner in owners for key in text.engages.get(owner, ())}


class Gate:
    """Decides for one server.

    Args:
        similarity, text_guards: judge texts; vocabulary: the served model's.
    """

    def __init__(self, similarity: Similarity, vocabulary: Vocabulary, text_guards: TextGuards) -> None:
        self._similarity = similarity
        self._vocabulary = vocabulary
        self._text_guards = text_guards

    async def decide(self, request: Request) -> GateDecision | None:
        """What the conversation touches; None if it is refused for it. A scored request engages everything instead.

        Raises:
            GuardUnavailable, TooMuchToRead.
        """
        decision = None if await self._refused_by_a_check(request) else await self._by_similarity(request)
        if decision is None and request.plan.forced:
            return GateDecision(frozenset(request.text.gate_thresholds), frozenset())
        return decision

    async def _refused_by_a_check(self, request: Request) -> bool:
        checks = [check for check in request.text.checks if check.config.prompt != "ignore"]
        token_ids = request.prompt["prompt_token_ids"] if checks else []
        # By turns, and in one piece: special tokens that a user writes must not cut a word in two.
        texts = ["\n".join(turns_of(token_ids, self._vocabulary)), self._vocabulary.text_of(token_ids).decode("utf-8", "replace")]
        for check in checks:
            counts = check.config.prompt == "monitor"
            found = [await self._text_guards.judge(check, text, only_counts=counts) for text in texts]
            if verdicts := found[0] or found[1]:
                request.record(f"{check.guard} {check.config.prompt}", verdicts)
                if check.config.prompt == "refuse":
                    return True
        return False

    async def _by_similarity(self, request: Request) -> GateDecision | None:
        gate, text = request.text.gate, request.text
        if gate is None:
            return GateDecision(frozenset(), frozenset())
        token_ids = request.prompt["prompt_token_ids"]
        turns, brought = turns_of(token_ids, self._vocabulary), frozenset[str]()
        # Special tokens that a user writes fall away here, so that a name cannot be cut in two by one.
        whole = self._vocabulary.text_of(token_ids).decode("utf-8", "replace")
        try:
            if gate.pasted == "ignored":
                turns, brought = await self._without_pasted(turns, text)
                whole = ""
            verdicts = await self._similarity.judge_conversation(turns, text.gate_thresholds, whole)
        except (EncoderUnavailable, TooMuchToRead):
            gate_outcomes.labels(request.plan.policy, "error").inc()
            if gate.on_hit == "monitor":
                return GateDecision(frozenset(), frozenset())
            raise
        refused = text.refuses(verdict.owner for verdict in verdicts)
        if verdicts:
            request.record(f"gate {'refuse' if refused else gate.on_hit}", verdicts)
        gate_outcomes.labels(request.plan.policy, "refused" if refused else "hit" if verdicts else "clear").inc()
        if refused:
            return None
        touched = frozenset(verdict.owner for verdict in verdicts)
        corrupt = self._corrupted(text, touched, token_ids)
        if text.corrupt is not None:
            if corrupt is not None:
                request.record("corrupt")
            acting = {entry.key for entry in request.plan.entries}
            for owner in touched & text.corrupt_strength.keys():
                # Touched without being named, or named in a disguise: there is nothing to corrupt, so something else must act.
                named = corrupt is not None and self._corrupted(text, frozenset({owner}), token_ids) is not None
                if not named and not acting & engages(text, [owner]):
                    request.record("corrupt refuse")
                    return None
        return GateDecision(touched, brought, corrupt)

    def _corrupted(self, text: TextPlan, touched: frozenset[str], token_ids: Sequence[int]) -> Corrupt | None:
        """How to corrupt the tokens of a prompt that name what it touches; None if none are to be corrupted."""
        settings = text.corrupt
        touched &= text.corrupt_strength.keys()
        if settings is None or not touched:
            return None
        spans = spans_of(token_ids, self._vocabulary, lambda whole: self._similarity.places(whole, touched))
        strength = max(text.corrupt_strength[owner] for owner in touched)
        return Corrupt(settings.kind, strength, settings.first_n, settings.seed, tuple(spans)) if spans else None

    async def _without_pasted(self, turns: list[str], text: TextPlan) -> tuple[list[str], frozenset[str]]:
        """The turns without passages of a set that the user pasted, and the sets that those passages are from.

        Only passages that say nearly the same as the set count as pasted, and never questions.
        """
        kept: list[str] = []
        brought: set[str] = set()
        thresholds = {owner: max(PASTED, threshold) for owner, threshold in text.gate_thresholds.items()}
        for turn in turns:
            rest = []
            for passage in await asyncio.to_thread(sentences, turn):
                verdicts = [v for v in await self._similarity.judge_passage(passage, thresholds) if v.signal == "similarity"]
                if verdicts and not passage.endswith("?"):
                    brought |= {verdict.owner for verdict in verdicts}
                else:
                    rest.append(passage)
            kept.append(" ".join(rest))
        return kept, frozenset(brought)
