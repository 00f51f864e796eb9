"""Answers under a gate or a stream filter: taken from the engine piece by piece, given out only as far as they have been judged.

Text, token ids and log-probabilities go out together, so that vLLM's parsers for tools and reasoning see one consistent answer.
Every choice of ``n`` is a request of its own to the engine, with its own window.

Where a request has to go on differently (the gate opens in mid-answer; a clause is thrown away), it is taken up again from its own
tokens under another plan: the engine's prefix cache makes that cheap. Requests that cannot be taken up (a grammar's state,
penalties that count, ...) end with ``content_filter`` instead.

Covered: everything that `generate` returns as text. Not covered: alternatives in ``top_logprobs``, of which single tokens are seen.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from prometheus_client import Counter
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.errors import GuardUnavailable
from guards.similarity.disguise import TooMuchToRead
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.gate import Verdict
from guards.similarity.stream import AnswerBuffer, Token, ends_sentence
from guards.suppression.vocabulary import Vocabulary
from guards.text_plan import TextCheck
from guards.types import Plan
from serve.control.similarity import Similarity
from serve.control.text_guards import TextGuards
from serve.generation.gate import Gate, GateDecision, Request, engages, gate_outcomes
from serve.generation.outputs import end_answer, interleaved, silent

_hits = Counter("lethe_stream_hits_total", "Passages of answers that the stream filter hit.", ["policy", "action"])
blocked = Counter("lethe_blocked_total", "Outputs that a guard ended.", ["policy", "guard", "action"])

MARKER = "[removed]"
"""What is shown in place of a span that a guard of another package takes out, under a policy without a stream filter."""
RESAMPLED_TEMPERATURE = 0.7
"""Lowest temperature of a resampled answer: greedy decoding would only repeat itself."""
_NEXT_SEED = 7_919

Start = Callable[[Any, SamplingParams, str, Plan], AsyncGenerator[RequestOutput, None]]
"""(prompt, params, request id, plan) -> the engine's outputs, every other guard in place."""


class StreamFilter:
    """Runs requests under a gate or a stream filter.

    Args:
        start: asks the engine.
        similarity, text_guards: judge texts.
        marker_tokens: token ids of a text, for spans that were taken out; end_of_text: the token that ends a refused answer.
    """

    def __init__(
        self,
        start: Start,
        similarity: Similarity,
        text_guards: TextGuards,
        vocabulary: Vocabulary,
        marker_tokens: Callable[[str], list[int]],
        end_of_text: int,
    ) -> None:
        self.start = start
        self.similarity = similarity
        self.text_guards = text_guards
        self.vocabulary = vocabulary
        self.marker_tokens = marker_tokens
        self.end_of_text = end_of_text
        self._gate = Gate(similarity, vocabulary, text_guards)

    async def run(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs, in the kind that it asked for.

        Raises:
            GracefulHTTPError: 503, a guard cannot judge.
            VLLMValidationError: 400, the prompt is too much to judge.
        """
        try:
            decision = await self._gate.decide(request)
            if decision is None:
                yield self._refused(request)
                return
            answer_is_judged = request.text.stream is not None or bool(_checks(request)) or bool(decision.closed(request.text))
            if request.params.detokenize and answer_is_judged and not request.plan.forced:
                outputs = self._choices(request, decision)
            else:
                outputs = self.start(request.prompt, request.params, request.id, decision.engaged(request.plan, request.text))
            async with aclosing(outputs) as open_outputs:
                async for output in open_outputs:
                    yield output
        except TooMuchToRead as error:
            raise VLLMValidationError(f"the prompt cannot be judged: {error}") from error
        except GuardUnavailable as error:
            raise GracefulHTTPError(f"a guard is not available: {error}", HTTPStatus.SERVICE_UNAVAILABLE) from error

    async def _choices(self, request: Request, decision: GateDecision) -> AsyncGenerator[RequestOutput, None]:
        """All choices, merged."""
        n, kind = request.params.n, request.params.output_kind
        choices = [_Choice(self, request, decision, index) for index in range(n)]
        if n == 1:
            async with aclosing(choices[0].run()) as outputs:
                async for output in outputs:
                    yield output
            return
        finals: dict[int, CompletionOutput] = {}
        async with aclosing(interleaved([choice.run() for choice in choices])) as outputs:
            async for output in outputs:
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


class _Choice:
    """One choice of a request."""

    def __init__(self, owner: StreamFilter, request: Request, decision: GateDecision, index: int) -> None:
        self._owner = owner
        self._request = request
        self._decision = decision
        stream, gate = request.text.stream, request.text.gate
        self._checks = _checks(request)
        acting = any(check.config.answer != "monitor" for check in self._checks)
        by_similarity = (stream is not None and stream.on_hit != "monitor") or (gate is not None and gate.on_hit != "monitor")
        holding = acting or by_similarity
        redacts = any(check.config.answer == "redact" for check in self._checks)
        marker = stream.marker if stream is not None else MARKER if redacts else ""
        open_from = owner.similarity.open_from if stream is not None and by_similarity else len
        self._answer = AnswerBuffer(open_from, marker, list(request.params.stop or ()), hold=holding)
        self._marker = owner.marker_tokens(marker)
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
        prompt, plan = request.prompt, self._decision.engaged(request.plan, request.text)
        if kept:
            if params.max_tokens is not None:
                params.max_tokens = max(1, params.max_tokens - len(kept))
            plan = replace(plan, output_start=len(prompt["prompt_token_ids"]))
            prompt = {key: value for key, value in prompt.items() if key != "prompt"}
            prompt["prompt_token_ids"] = [*prompt["prompt_token_ids"], *kept]
        if self._retries:
            if params.seed is None and params.temperature == 0:
                # A greedy request stays reproducible: its seed is derived from its own prompt.
                params.seed = zlib.crc32(repr(prompt["prompt_token_ids"]).encode()) + self._index
            if params.seed is not None:
                params.seed += _NEXT_SEED * self._retries
            params.temperature = max(params.temperature, RESAMPLED_TEMPERATURE)
        return self._owner.start(prompt, params, f"{request.id}-{self._index}-{len(kept)}-{self._retries}", plan)

    def _take(self, output: CompletionOutput) -> None:
        text_of = self._owner.vocabulary.text_of
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
        gate, closed = self._request.text.gate, self._decision.closed(self._request.text)
        if gate is None or not closed:
            return None
        turns = [passage, f"{self._before} {passage}"] if self._before else [passage]
        self._before = passage.strip()
        verdicts = await self._owner.similarity.judge_conversation(turns, closed)
        if not verdicts:
            return None
        gate_outcomes.labels(self._request.plan.policy, "later").inc()
        refused = self._request.text.refuses(verdict.owner for verdict in verdicts)
        did = f"gate {'refuse' if refused else gate.on_hit} later"
        self._request.record(did, verdicts, where="answer", offset=self._answer.place)
        self._decision = self._decision.also(verdict.owner for verdict in verdicts)
        if refused:
            self._end("gate")
            return None
        acting = {entry.key for entry in self._request.plan.entries}
        if not acting & engages(self._request.text, (verdict.owner for verdict in verdicts)):
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
        spans = await self._check(passage)
        if self._ending:
            return None
        if stream is not None:
            try:
                verdicts = await self._owner.similarity.judge_passage(passage, self._request.text.stream_thresholds)
            except (EncoderUnavailable, TooMuchToRead):
                if stream.on_hit != "monitor":
                    raise
        if stream is not None and verdicts:
            _hits.labels(self._request.plan.policy, stream.on_hit).inc()
            self._request.record(f"stream {stream.on_hit}", verdicts, where="answer", offset=self._answer.place)
        if stream is None or not verdicts or stream.on_hit == "monitor":
            if not spans:
                self._answer.passed()
            elif not self._answer.take_out(spans):
                self._end("stream")
            return None
        spans += [(verdict.start, verdict.end) for verdict in verdicts]
        if stream.on_hit == "redact" and not await self._still_hit(passage, spans) and self._answer.take_out(sorted(spans)):
            # The rest of a sentence belongs to what was taken out of it.
            self._tainted = any(verdict.signal == "similarity" for verdict in verdicts) and not ends_sentence(passage)
            return None
        if stream.on_hit == "resample" and self._retries < stream.retries and (kept := self._cut_back()) is not None:
            self._retries += 1
            self._decision = self._decision.also(verdict.owner for verdict in verdicts)
            return kept
        self._end("stream")
        return None

    async def _check(self, passage: str) -> list[tuple[int, int]]:
        """Guards of other packages on one passage: the spans that they take out; or the answer ends."""
        spans: list[tuple[int, int]] = []
        for check in self._checks:
            action = check.config.answer
            if not (verdicts := await self._owner.text_guards.judge(check, passage, only_counts=action == "monitor")):
                continue
            _hits.labels(self._request.plan.policy, action).inc()
            self._request.record(f"{check.guard} {action}", verdicts, where="answer", offset=self._answer.place)
            places = [(verdict.start, verdict.end) for verdict in verdicts]
            if action == "refuse" or (action == "redact" and await self._owner.text_guards.judge(check, _without(passage, places))):
                self._end(check.guard)
                return []
            spans += places if action == "redact" else []
        return sorted(spans)

    async def _still_hit(self, passage: str, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether what is left without the spans is hit as well: the same phrase again, in a disguise whose place is not known."""
        rest = _without(passage, spans)
        return bool(rest.strip()) and bool(await self._owner.similarity.judge_passage(rest, self._request.text.stream_thresholds))

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
            end_answer(given, self._owner.end_of_text)
        elif ends:
            given.cumulative_logprob = output.cumulative_logprob
            given.finish_reason, given.stop_reason = output.finish_reason, output.stop_reason
            if self._answer.stop is not None:
                given.finish_reason, given.stop_reason = "stop", self._answer.stop
        return given


def _checks(request: Request) -> list[TextCheck]:
    """The guards of other packages that judge the answer."""
    return [check for check in request.text.checks if check.config.answer != "ignore"]


def _without(passage: str, spans: Sequence[tuple[int, int]]) -> str:
    return "".join(c for i, c in enumerate(passage) if not any(start <= i < end for start, end in spans))
