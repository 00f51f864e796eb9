"""Answers under similarity: the gate before the engine, the hold-back filter behind it.

The gate reads the whole prompt, back from its tokens, so that no endpoint and no stored conversation can pass beside it. The answer
is then taken from the engine piece by piece and given out only as far as it has been judged; text, token ids and log-probabilities
go out together, so that vLLM's parsers for tools and reasoning see one consistent answer. Every choice of ``n`` is a request of its
own to the engine, with its own window.

Where a request has to go on differently (the gate opens in mid-answer; a clause is thrown away), it is taken up again from its own
tokens under another plan: the engine's prefix cache makes that cheap. Requests that cannot be taken up (a grammar's state,
penalties that count, ...) end with ``content_filter`` instead.

Covered: everything that `generate` returns as text. Not covered: alternatives in ``top_logprobs``, of which single tokens are seen.
"""

from __future__ import annotations

import asyncio
import bisect
import copy
import itertools
import re
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Protocol

from prometheus_client import Counter
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.similarity.disguise import TooMuchToRead
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.gate import Verdict
from guards.similarity.stream import HeldAnswer, Token, ends_sentence
from guards.similarity.windows import sentences
from guards.suppression.vocabulary import Vocabulary
from guards.types import Corrupt, Plan, TextPlan
from serve.control.similarity import Similarity
from serve.generation.outputs import end_answer, silent
from serve.hits import Where

_gate = Counter("lethe_gate_total", "Conversations that the gate judged.", ["policy", "outcome"])
_hits = Counter("lethe_stream_hits_total", "Passages of answers that the stream filter hit.", ["policy", "action"])
blocked = Counter("lethe_blocked_total", "Outputs that a guard ended.", ["policy", "guard", "action"])

RESAMPLED_TEMPERATURE = 0.7
"""At least: a greedy answer that goes on greedily would say the same again."""
PASTED = 0.85
"""Cosine from which a statement in the prompt counts as the set's own."""
_NEXT_SEED = 7_919
_ROLE = re.compile(r"^(?:system|user|assistant|tool|developer|human|model)\s*(?:\n|$)", re.IGNORECASE)

Start = Callable[[Any, SamplingParams, str, Plan], AsyncGenerator[RequestOutput, None]]
"""(prompt, params, request id, plan) -> the engine's outputs, every other guard in place."""


class Fired(Protocol):
    """Takes note of what a guard did."""

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
    fired: Fired  # a guard did something


@dataclass(frozen=True, slots=True)
class Opened:
    """What a conversation touches, as similarity artifacts."""

    touched: frozenset[str]
    brought: frozenset[str]  # what the user brought along, under a policy that ignores that
    corrupt: Corrupt | None = None  # where the prompt names what it touches

    def also(self, owners: Iterable[str]) -> Opened:
        return replace(self, touched=self.touched | frozenset(owners))


class Held:
    """Runs requests under similarity.

    Args:
        marker_tokens: token ids of a text, for spans that were taken out; end_of_text: the token that ends a refused answer.
    """

    def __init__(
        self,
        start: Start,
        similarity: Similarity,
        vocabulary: Vocabulary,
        marker_tokens: Callable[[str], list[int]],
        end_of_text: int,
    ) -> None:
        self.start = start
        self.similarity = similarity
        self.vocabulary = vocabulary
        self.marker_tokens = marker_tokens
        self.end_of_text = end_of_text

    async def run(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs, in the kind that it asked for.

        Raises:
            GracefulHTTPError: 503, similarity cannot judge.
            VLLMValidationError: 400, the prompt is too much to judge.
        """
        try:
            opened = await self._open(request)
            if opened is None:
                yield self._refused(request)
                return
            if request.params.detokenize and (request.text.stream is not None or self.closed(request.text, opened)):
                outputs = self._choices(request, opened)
            else:
                outputs = self.start(request.prompt, request.params, request.id, _engaged(request, opened))
            async with aclosing(outputs) as open_outputs:
                async for output in open_outputs:
                    yield output
        except TooMuchToRead as error:
            raise VLLMValidationError(f"the prompt cannot be judged: {error}") from error
        except EncoderUnavailable as error:
            raise GracefulHTTPError(f"a guard is not available: {error}", HTTPStatus.SERVICE_UNAVAILABLE) from error

    async def plan_of(self, request: Request) -> Plan:
        """The plan that the gate would give a request; one that it would refuse is engaged. Raises EncoderUnavailable."""
        opened = await self._open(request)
        everything = Opened(frozenset(request.text.asked), frozenset())
        return _engaged(request, everything if opened is None else opened)

    async def _open(self, request: Request) -> Opened | None:
        """What the conversation touches; None if it is refused for it."""
        gate, text = request.text.gate, request.text
        if gate is None:
            return Opened(frozenset(), frozenset())
        token_ids = request.prompt["prompt_token_ids"]
        turns, brought = turns_of(token_ids, self.vocabulary), frozenset[str]()
        # Special tokens that a user writes fall away here, so that a name cannot be cut in two by one.
        whole = self.vocabulary.text_of(token_ids).decode("utf-8", "replace")
        try:
            if gate.pasted == "ignored":
                turns, brought = await self._without_pasted(turns, text)
                whole = ""
            verdicts = await self.similarity.look(turns, text.asked, whole)
        except (EncoderUnavailable, TooMuchToRead):
            _gate.labels(request.plan.policy, "error").inc()
            if gate.on_hit == "monitor":
                return Opened(frozenset(), frozenset())
            raise
        refused = bool(verdicts) and gate.on_hit == "refuse"
        if verdicts:
            request.fired(f"gate {gate.on_hit}", verdicts)
        _gate.labels(request.plan.policy, "refused" if refused else "hit" if verdicts else "clear").inc()
        if refused:
            return None
        touched = frozenset(verdict.owner for verdict in verdicts)
        corrupt = self._corrupted(text, touched, token_ids)
        if text.corrupt is not None:
            if corrupt is not None:
                request.fired("corrupt")
            acting = {*(each.assistant for each in request.plan.contrast), *(each.artifact for each in request.plan.steering)}
            for owner in touched:
                # Touched without being named, or named in a disguise: there is nothing to corrupt, so something else must act.
                named = corrupt is not None and self._corrupted(text, frozenset({owner}), token_ids) is not None
                if not named and not acting & set(text.assistants.get(owner, ())):
                    request.fired("corrupt refuse")
                    return None
        return Opened(touched, brought, corrupt)

    def _corrupted(self, text: TextPlan, touched: frozenset[str], token_ids: Sequence[int]) -> Corrupt | None:
        """The tokens of a prompt that name what it touches; None if that changes nothing."""
        settings = text.corrupt
        if settings is None or not touched:
            return None
        spans = spans_of(token_ids, self.vocabulary, lambda whole: self.similarity.places(whole, touched))
        strength = max(text.corrupt_strength[owner] for owner in touched)
        return Corrupt(settings.kind, strength, settings.first_n, settings.seed, tuple(spans)) if spans else None

    async def _without_pasted(self, turns: list[str], text: TextPlan) -> tuple[list[str], frozenset[str]]:
        """The turns without statements of a set that the user brought along, and the sets whose they are. The rest stays.

        Only what says nearly the same as the set counts as brought along: whoever asks for something does not state it.
        """
        kept: list[str] = []
        brought: set[str] = set()
        thresholds = {owner: max(PASTED, threshold) for owner, threshold in text.asked.items()}
        for turn in turns:
            rest = []
            for passage in await asyncio.to_thread(sentences, turn):
                verdicts = [v for v in await self.similarity.said(passage, thresholds) if v.signal == "similarity"]
                if verdicts and not passage.endswith("?"):
                    brought |= {verdict.owner for verdict in verdicts}
                else:
                    rest.append(passage)
            kept.append(" ".join(rest))
        return kept, frozenset(brought)

    @staticmethod
    def closed(text: TextPlan, opened: Opened) -> dict[str, float]:
        """The sets to look for in the answer: those whose gate is still closed, and that the user did not bring along."""
        if text.gate is None or text.gate.on_hit == "monitor":
            return {}
        known = opened.touched | opened.brought
        return {owner: threshold for owner, threshold in text.asked.items() if owner not in known}

    async def _choices(self, request: Request, opened: Opened) -> AsyncGenerator[RequestOutput, None]:
        """All choices, merged."""
        n, kind = request.params.n, request.params.output_kind
        choices = [_Choice(self, request, opened, index) for index in range(n)]
        if n == 1:
            async with aclosing(choices[0].run()) as outputs:
                async for output in outputs:
                    yield output
            return
        finals: dict[int, CompletionOutput] = {}
        async with aclosing(_merged([choice.run() for choice in choices])) as merged:
            async for output in merged:
                done = output.outputs[0]
                if done.finish_reason is not None:
                    finals[done.index] = done
                output.finished = len(finals) == n
                if kind is not RequestOutputKind.FINAL_ONLY:
                    yield output
                elif output.finished:
                    output.outputs = [finals[index] for index in range(n)]
                    yield output

    def _refused(self, request: Request) -> RequestOutput:
        request.ended()
        blocked.labels(request.plan.policy, "gate", "content_filter").inc()
        outputs = []
        for index in range(request.params.n):
            output = CompletionOutput(index, "", [], None, None if request.params.logprobs is None else [])
            end_answer(output, self.end_of_text)
            outputs.append(output)
        token_ids = list(request.prompt["prompt_token_ids"])
        return RequestOutput(request.id, request.prompt.get("prompt"), token_ids, None, outputs, True, num_cached_tokens=0)


def _engaged(request: Request, opened: Opened) -> Plan:
    """The plan with contrast for the sets that were touched only, and for those about which nothing can be said."""
    text, plan = request.text, request.plan
    if text.gate is None or text.gate.on_hit == "monitor":
        return plan
    judged = {assistant for owner in text.asked for assistant in text.assistants.get(owner, ())}
    engaged = {assistant for owner in opened.touched for assistant in text.assistants.get(owner, ())}
    left_out = judged - engaged
    return replace(
        plan,
        contrast=tuple(each for each in plan.contrast if each.assistant not in left_out),
        steering=tuple(each for each in plan.steering if each.artifact not in left_out),
        corrupt=opened.corrupt,
    )


class _Choice:
    """One choice of a request."""

    def __init__(self, held: Held, request: Request, opened: Opened, index: int) -> None:
        self._held = held
        self._request = request
        self._opened = opened
        stream, gate = request.text.stream, request.text.gate
        holding = (stream is not None and stream.on_hit != "monitor") or (gate is not None and gate.on_hit != "monitor")
        marker = "" if stream is None else stream.marker
        open_from = held.similarity.open_from if stream is not None and holding else len
        self._answer = HeldAnswer(open_from, marker, list(request.params.stop or ()), hold=holding)
        self._marker = held.marker_tokens(marker)
        self._index = index
        self._retries = 0
        self._before = ""  # the passage before
        self._ending = False
        self._tainted = False  # the sentence's beginning was taken out
        self._given = self._nothing()

    async def run(self) -> AsyncGenerator[RequestOutput, None]:
        """Outputs with this choice only."""
        kept: list[int] | None = []
        while kept is not None:
            async with aclosing(self._generate(kept)) as outputs:
                kept = None
                async for step in outputs:
                    output = step.outputs[0]
                    self._take(output)
                    kept = await self._judge()
                    self._collect()
                    ends = self._ending or (self._answer.finished and kept is None)
                    if (given := self._give(output, ends=ends)) is not None:
                        step.request_id, step.outputs, step.finished = self._request.id, [given], ends
                        step.prompt_token_ids = list(self._request.prompt["prompt_token_ids"])
                        yield step
                    if ends:
                        return
                    if kept is not None:
                        break

    def _generate(self, kept: list[int]) -> AsyncGenerator[RequestOutput, None]:
        """The engine's answer after the tokens that stay."""
        request, params = self._request, self._request.params.clone()
        params.n, params.output_kind = 1, RequestOutputKind.DELTA
        if params.seed is not None:
            params.seed += self._index  # as vLLM does for its own choices
        prompt, plan = request.prompt, _engaged(request, self._opened)
        if kept:
            if params.max_tokens is not None:
                params.max_tokens = max(1, params.max_tokens - len(kept))
            plan = replace(plan, output_start=len(prompt["prompt_token_ids"]))
            prompt = {key: value for key, value in prompt.items() if key != "prompt"}
            prompt["prompt_token_ids"] = [*prompt["prompt_token_ids"], *kept]
        if self._retries:
            if params.seed is None and params.temperature == 0:
                # A greedy request is the same every time, and stays so: its dice come from its own prompt.
                params.seed = zlib.crc32(repr(prompt["prompt_token_ids"]).encode()) + self._index
            if params.seed is not None:
                params.seed += _NEXT_SEED * self._retries
            params.temperature = max(params.temperature, RESAMPLED_TEMPERATURE)
        return self._held.start(prompt, params, f"{request.id}-{self._index}-{len(kept)}-{self._retries}", plan)

    def _take(self, output: CompletionOutput) -> None:
        text_of = self._held.vocabulary.text_of
        about = output.logprobs if output.logprobs is not None else [None] * len(output.token_ids)
        tokens = [Token(token, text_of([token]), each) for token, each in zip(output.token_ids, about, strict=True)]
        self._answer.add(output.text, tokens, finished=output.finish_reason is not None)

    async def _judge(self) -> list[int] | None:
        """Judge what is complete. Returns the tokens to go on from where the answer has to be taken up again."""
        while not self._ending and (passage := self._answer.passage()) is not None:
            try:
                if (kept := await self._look_again(passage)) is not None:
                    return kept
                if not self._ending and (kept := await self._filter(passage)) is not None:
                    return kept
            except TooMuchToRead:  # what cannot be judged is not shown
                self._end("stream")
        if self._answer.lost and not self._ending:
            self._end("stream")
        return None

    async def _look_again(self, passage: str) -> list[int] | None:
        """The gate on what the answer says: a reference may first appear there. The passage is said again with contrast then."""
        gate, closed = self._request.text.gate, self._held.closed(self._request.text, self._opened)
        if gate is None or not closed:
            return None
        turns = [passage, f"{self._before} {passage}"] if self._before else [passage]
        self._before = passage.strip()
        verdicts = await self._held.similarity.look(turns, closed)
        if not verdicts:
            return None
        _gate.labels(self._request.plan.policy, "later").inc()
        self._request.fired(f"gate {gate.on_hit} later", verdicts, where="answer", offset=self._answer.place)
        self._opened = self._opened.also(verdict.owner for verdict in verdicts)
        if gate.on_hit == "refuse":
            self._end("gate")
            return None
        plan = self._request.plan
        engages = {*(each.assistant for each in plan.contrast), *(each.artifact for each in plan.steering)}
        if not any(engages & set(self._request.text.assistants.get(verdict.owner, ())) for verdict in verdicts):
            return None
        if (kept := self._cut_back()) is None:
            self._end("gate")
        return kept

    async def _filter(self, passage: str) -> list[int] | None:
        """The stream filter on one passage: it passes, or something is taken out, or the answer goes on another way, or ends."""
        stream, verdicts = self._request.text.stream, list[Verdict]()
        self._tainted = self._tainted and not passage.startswith("\n")
        if self._tainted and self._answer.take_out([(0, len(passage))]):
            self._tainted = not ends_sentence(passage)
            return None
        if stream is not None:
            try:
                verdicts = await self._held.similarity.said(passage, self._request.text.said)
            except (EncoderUnavailable, TooMuchToRead):
                if stream.on_hit != "monitor":
                    raise
        if stream is None or not verdicts:
            self._answer.passed()
            return None
        _hits.labels(self._request.plan.policy, stream.on_hit).inc()
        self._request.fired(f"stream {stream.on_hit}", verdicts, where="answer", offset=self._answer.place)
        if stream.on_hit == "monitor":
            self._answer.passed()
            return None
        spans = [(verdict.start, verdict.end) for verdict in verdicts]
        if stream.on_hit == "redact" and not await self._still_hit(passage, spans) and self._answer.take_out(spans):
            # The rest of a sentence belongs to what was taken out of it.
            self._tainted = any(verdict.signal == "similarity" for verdict in verdicts) and not ends_sentence(passage)
            return None
        if stream.on_hit == "resample" and self._retries < stream.retries and (kept := self._cut_back()) is not None:
            self._retries += 1
            self._opened = self._opened.also(verdict.owner for verdict in verdicts)
            return kept
        self._end("stream")
        return None

    async def _still_hit(self, passage: str, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether what is left without the spans is hit as well: the same phrase again, in a disguise whose place is not known."""
        rest = "".join(c for i, c in enumerate(passage) if not any(start <= i < end for start, end in spans))
        return bool(rest.strip()) and bool(await self._held.similarity.said(rest, self._request.text.said))

    def _cut_back(self) -> list[int] | None:
        """Throw away what is not cleared; the ids of the tokens that stay. None if the request cannot be taken up again."""
        if not self._request.restartable:
            return None
        self._collect()
        self._before = ""
        return self._answer.cut_back()

    def _end(self, guard: str) -> None:
        self._ending = True
        self._request.ended()
        blocked.labels(self._request.plan.policy, guard, "content_filter").inc()

    def _nothing(self) -> CompletionOutput:
        return CompletionOutput(self._index, "", [], None, None if self._request.params.logprobs is None else [])

    def _collect(self) -> None:
        """Take over what may go out."""
        if (released := self._answer.release()) is None:
            return
        given = self._given
        given.text += released.text
        for token in released.tokens:
            shown = self._marker if token is None else [token.id]
            given.token_ids = [*given.token_ids, *shown]
            if given.logprobs is not None:
                about = [silent(each) for each in shown] if token is None else [token.about]
                given.logprobs = [*given.logprobs, *about]

    def _give(self, output: CompletionOutput, *, ends: bool) -> CompletionOutput | None:
        """What goes out now, in the kind that the request asked for; None if nothing does."""
        kind, given = self._request.params.output_kind, self._given
        if not ends and (kind is RequestOutputKind.FINAL_ONLY or not (given.text or given.token_ids)):
            return None
        if kind is RequestOutputKind.DELTA:
            self._given = self._nothing()
        else:
            given = copy.copy(given)
        if self._ending:
            end_answer(given, self._held.end_of_text)
        elif ends:
            given.cumulative_logprob = output.cumulative_logprob
            given.finish_reason, given.stop_reason = output.finish_reason, output.stop_reason
            if self._answer.stop is not None:
                given.finish_reason, given.stop_reason = "stop", self._answer.stop
        return given


async def _merged(generators: Sequence[AsyncGenerator[RequestOutput, None]]) -> AsyncGenerator[RequestOutput, None]:
    """What several generators yield, as it comes. Closing it closes them all."""
    queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue(maxsize=len(generators))

    async def pump(generator: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(generator):
                async for output in generator:
                    await queue.put(output)
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - whoever waits for the outputs gets it
            await queue.put(error)

    tasks = [asyncio.create_task(pump(generator)) for generator in generators]
    try:
        running = len(tasks)
        while running:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
