"""The choke point: the one way from any of vLLM's endpoints to the engine.

``generate`` stamps the request's plan on, refuses what could reach past a guard, and watches the outputs of requests whose own
constraints (a grammar, allowed tokens) could leave the engine nothing but banned tokens. An endpoint that vLLM adds tomorrow
goes through here too.

Covered: everything that calls ``generate``. ``encode`` (pooling models) is closed. Not covered: text that is not generated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from prometheus_client import Counter
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.errors import GuardError
from guards.forget_set import MAX_PHRASE_CHARACTERS
from guards.policy import DEFAULT
from guards.similarity.gate import Verdict
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.declaration import Suppress
from guards.suppression.vocabulary import Vocabulary
from guards.text_plan import TextPlan
from guards.types import Plan
from serve.control.similarity import Similarity
from serve.control.text_guards import TextGuards
from serve.generation.gate import Request
from serve.generation.note import noted
from serve.generation.outputs import announced, end_answer
from serve.generation.stream import StreamFilter, blocked
from serve.generation.watch import Watch
from serve.hits import MOST_CHARACTERS, Hit, Where, hit_of
from serve.protocol.wire import PLAN_KEY, encode_plan
from serve.registry.snapshot import Snapshot
from serve.request import RequestContext, admitted

_requests = Counter("lethe_requests_total", "Requests that reached the engine.", ["policy", "guarded", "arm"])
SHADOW_PRIORITY = 100
"""Of requests that nobody waits for; clients' have 0, and the engine takes the lowest first."""

REPETITION_PENALTIES = (0.1, 100.0)
"""What vLLM multiplies or divides logits by; within these bounds the floor of banned tokens stays out of reach, and finite."""


class GuardedEngineClient:
    """Wraps vLLM's engine client; everything that is not about generating passes through.

    Args:
        inner: vLLM's own client.
        snapshot: what is in force now, for calls outside of an admitted request.
        phrases: loads compiled phrases by fingerprint.
        vocabulary: the served model's.
        max_choices: the most that ``n`` may be, checked again here, where it is what vLLM made of it.
        similarity, text_guards: judge prompts and answers.
        unavailable: trained artifacts that a worker could not load, and why.
    """

    def __init__(
        self,
        inner: EngineClient,
        snapshot: Callable[[], Snapshot],
        phrases: Callable[[str], CompiledPhrases],
        vocabulary: Vocabulary,
        max_choices: int,
        similarity: Similarity,
        text_guards: TextGuards,
        unavailable: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._inner = inner
        self._similarity = similarity
        self._text_guards = text_guards
        self._unavailable = unavailable
        self._snapshot = snapshot
        self._phrases = phrases
        self._vocabulary = vocabulary
        self._max_choices = max_choices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        raise VLLMValidationError("pooling is not served by lethe: embeddings cannot be guarded")

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Like ``EngineClient.generate``; raises VLLMValidationError (a 400) before anything is sampled."""
        request = admitted.get()
        if request is None:
            return self._guarded(prompt, sampling_params, request_id, None, options)
        if request.in_shadow:
            options["priority"] = SHADOW_PRIORITY
        outputs = self._guarded(prompt, sampling_params, request_id, request, options)
        if sampling_params.detokenize or not request.observation.prompt_tokens:  # beam search asks anew for every token
            request.observation.prompt_tokens += len(prompt.get("prompt_token_ids", ())) if isinstance(prompt, dict) else 0
        return noted(outputs, request.observation, sampling_params)

    def _guarded(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        request: RequestContext | None,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        plan = request.plan if request is not None else self._snapshot().plan(DEFAULT)
        text = request.text if request is not None else self._snapshot().text_plans[DEFAULT]
        if sampling_params.extra_args:
            names = ", ".join(sorted(sampling_params.extra_args))
            raise VLLMValidationError(f"extra arguments ({names}) are not accepted from clients", parameter="vllm_xargs")
        if sampling_params.n > self._max_choices:
            raise VLLMValidationError(f"n={sampling_params.n} exceeds this server's limit of {self._max_choices}", parameter="n")
        guarded = plan.engages or plan.forced != () or text is not None
        if request is not None and text is None:
            request.guard_events += plan.guards
        entry = None if request is None else request.entry
        arm = "" if entry is None else f"{entry.experiment.name}/{entry.arm.name}"
        _requests.labels(plan.policy, str(guarded).lower(), arm).inc()
        if not guarded:
            plain: AsyncGenerator[RequestOutput, None] = self._inner.generate(prompt, sampling_params, request_id, **options)
            return plain

        _refuse_what_cannot_be_guarded(prompt, sampling_params)
        params = sampling_params if sampling_params.skip_clone else sampling_params.clone()
        # Only vLLM's beam search generates without text (detokenize); no client can ask for that. The client's own
        # use_beam_search is not consulted: vLLM may read it differently, or not at all.
        if params.detokenize:
            self._refuse_half_a_character(prompt)
        if text is None:
            return self._start(prompt, params, request_id, plan, request, options)
        if not plan.forced:  # scored requests are judged by the gate alone, which reports itself if it cannot
            self._refuse_what_cannot_be_judged(text, params)
        tokenizer = self._inner.renderer.get_tokenizer()

        def end() -> None:
            if request is not None:
                request.blocked = True

        stream_filter = StreamFilter(
            lambda prompt, params, each, plan: self._start(prompt, params, each, plan, request, options),
            self._similarity,
            self._text_guards,
            self._vocabulary,
            lambda marker: list(tokenizer.encode(marker, add_special_tokens=False)) if marker else [],
            tokenizer.eos_token_id,
        )

        def record(action: str, verdicts: Iterable[Verdict] = (), *, where: Where = "prompt", offset: int = 0) -> None:
            if request is not None:
                guard = action.split()[0]
                request.guard_events.append(action)
                request.hits += [
                    hit_of(guard, verdict, text.sets.get(verdict.owner, verdict.owner), where=where, offset=offset, action=action)
                    for verdict in verdicts
                ]

        outputs = stream_filter.run(Request(prompt, params, request_id, plan, text, _can_be_taken_up(params), end, record))
        if request is not None and request.announced and params.output_kind is RequestOutputKind.DELTA:
            return announced(outputs, prompt, request_id)
        return outputs

    def _start(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        plan: Plan,
        request: RequestContext | None,
        options: Mapping[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Send a request to the engine under a plan, with the watch over its outputs that its constraints call for."""
        if not plan.engages and not plan.forced:
            return self._inner.generate(prompt, params, request_id, **options)
        searching_beams = not params.detokenize
        if searching_beams:
            # Beams come back as prompts, so it is not known where the output began: none of their tokens ends a match.
            plan = replace(plan, output_start=0)
        if _constrained(params) and not plan.forced:
            plan = replace(plan, entries=tuple(entry.under_constraints() for entry in plan.entries))
        params.extra_args = {PLAN_KEY: encode_plan(plan)}
        if plan.cache_salt is not None:
            prompt = {**prompt, "cache_salt": plan.cache_salt}
        try:
            artifacts = [self._phrases(fingerprint) for fingerprint in plan.artifacts_of(Suppress)]
        except GuardError as error:
            raise GracefulHTTPError(f"a guard is not available: {error}", HTTPStatus.SERVICE_UNAVAILABLE) from error
        for artifact in plan.artifacts:
            if artifact.fingerprint in self._unavailable():
                reason = self._unavailable()[artifact.fingerprint]
                raise GracefulHTTPError(f"a guard is not available: {reason}", HTTPStatus.SERVICE_UNAVAILABLE)
        outputs = self._inner.generate(prompt, params, request_id, **options)
        if searching_beams and not _constrained(params):
            return _without_banned_candidates(outputs)
        if plan.forced:
            return outputs  # nobody is shown it
        if _constrained(params) or (request is not None and request.has_tools):
            return self._watch(outputs, artifacts, plan, params, request, self._half_said(prompt))
        return outputs

    def _refuse_what_cannot_be_judged(self, text: TextPlan, params: SamplingParams) -> None:
        monitors = text.gate is None or text.gate.on_hit == "monitor"
        if text.by_similarity and self._similarity.failure is not None and not (monitors and not text.acts):
            message = f"a guard is not available: similarity: {self._similarity.failure}"
            raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
        if text.missing and (text.acts or text.corrupt is not None):
            names = ", ".join(text.missing)
            message = f"a guard is not available: the similarity of {names} is not ready (see `lethe forget show`)"
            raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
        judged = text.stream is not None or any(check.config.answer != "ignore" for check in text.checks)
        if judged and not params.detokenize:
            raise VLLMValidationError("beam search is not available where answers are judged; remove use_beam_search")

    def _refuse_half_a_character(self, prompt: dict[str, Any]) -> None:
        """vLLM's detokenizer repeats the whole prompt as output when the prompt ends in half a character or U+FFFD."""
        token_ids = prompt["prompt_token_ids"]
        end = self._vocabulary.text_of(token_ids[-64:]) or self._vocabulary.text_of(token_ids)
        if end.decode("utf-8", "replace").endswith("\ufffd"):
            raise VLLMValidationError(
                "the prompt ends in half a character or in U+FFFD; end it with a whole one", parameter="prompt"
            )

    def _half_said(self, prompt: dict[str, Any]) -> str:
        """The end of the prompt, back to its last special token: an output may complete a phrase that starts there."""
        tokenizer = self._inner.renderer.get_tokenizer()
        token_ids = prompt["prompt_token_ids"][-MAX_PHRASE_CHARACTERS:]
        special = set(tokenizer.all_special_ids)
        start = next((i for i in range(len(token_ids), 0, -1) if token_ids[i - 1] in special), 0)
        return str(tokenizer.decode(token_ids[start:]))[-MAX_PHRASE_CHARACTERS:]

    async def _watch(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        artifacts: list[CompiledPhrases],
        plan: Plan,
        params: SamplingParams,
        request: RequestContext | None,
        half_said: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        """End an output before the piece of text that completes a phrase, for every choice by itself."""
        watches = [Watch(artifacts, self._vocabulary, params, half_said) for _ in range(params.n)]
        end_of_text = self._inner.renderer.get_tokenizer().eos_token_id
        try:
            async for step in outputs:
                kept = []
                for output in step.outputs:
                    watch = watches[output.index]
                    if watch.ended:
                        continue
                    given = watch.take(output)
                    if watch.ended:
                        assert given is not None, "the end of an answer goes out"
                        end_answer(given, end_of_text)
                        blocked.labels(plan.policy, "suppression", "content_filter").inc()
                        if request is not None:
                            request.blocked = True
                            request.guard_events.append("suppression content_filter")
                            request.hits += self._phrase_hits(watch, plan)
                    if given is not None:
                        kept.append(given)
                finished = all(watch.finished for watch in watches)
                if kept or finished or step.finished:
                    step.outputs = kept
                    step.finished = step.finished or finished
                    yield step
                if finished:
                    return
        finally:
            await outputs.aclose()  # aborts what is still running

    def _phrase_hits(self, watch: Watch, plan: Plan) -> list[Hit]:
        """The phrase that a watch saw completed, once for each set that holds it."""
        assert watch.hit is not None, "it completed one"
        fingerprint, place = plan.artifacts_of(Suppress)[watch.hit.artifact], watch.place
        names = [name for name, made in self._snapshot().sets.items() if made.artifacts.get("phrases") == fingerprint]
        end, text = place + len(watch.hit.text), watch.hit.text[:MOST_CHARACTERS]
        action = "suppression content_filter"
        return [Hit(name, "suppression", place, end, text, where="answer", action=action) for name in names]


EngineClient.register(GuardedEngineClient)


def _refuse_what_cannot_be_guarded(prompt: Any, params: SamplingParams) -> None:
    kind = prompt.get("type") if isinstance(prompt, dict) else type(prompt).__name__
    if kind not in ("token", "multimodal"):
        raise VLLMValidationError(f"a prompt of type {kind!r} cannot be guarded; send text or token ids", parameter="prompt")
    for name in ("prompt_logprobs", "prompt_logprob_token_ids", "trace_decode_token_ids"):
        if getattr(params, name) is not None:
            raise VLLMValidationError(f"{name} is not available under a policy; remove it", parameter=name)
    low, high = REPETITION_PENALTIES
    if not low <= params.repetition_penalty <= high:
        raise VLLMValidationError(
            f"repetition_penalty={params.repetition_penalty} must lie in [{low}, {high}] under a policy",
            parameter="repetition_penalty",
        )


def _constrained(params: SamplingParams) -> bool:
    """Could anything but the guard take tokens away, or show text that the guard does not count as text?"""
    return bool(
        params.structured_outputs
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.thinking_token_budget is not None
        or not params.skip_special_tokens
        or params.include_stop_str_in_output
    )


def _can_be_taken_up(params: SamplingParams) -> bool:
    """Could the engine go on from an answer's tokens as if it had never stopped? Not where it counts or parses them."""
    return not (_constrained(params) or params.presence_penalty or params.frequency_penalty)


async def _without_banned_candidates(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    """Beam search picks from the log-probabilities: keep tokens at the floor out of its choice."""
    async for step in outputs:
        for output in step.outputs:
            if output.logprobs:
                output.logprobs = [
                    {token: entry for token, entry in position.items() if entry.logprob > _FLOOR_LOGPROB}
                    for position in output.logprobs
                ]
        yield step


_FLOOR_LOGPROB = -1e4
"""Far below any real log-probability, far above that of a token at the floor."""
