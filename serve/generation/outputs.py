"""What may be done to an answer's outputs, so that text, token ids and log-probabilities keep saying the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

FINISH_REASON = "content_filter"
"""Of an answer that a guard ended."""


def silent(token: int) -> dict[int, Logprob]:
    """Log-probabilities of a token that nobody sampled."""
    return {token: Logprob(logprob=0.0, rank=1, decoded_token="")}


def end_answer(output: CompletionOutput, end_of_text: int) -> None:
    """Turn an output into its own end; what it says stays."""
    output.token_ids = [*output.token_ids, end_of_text]
    if output.logprobs is not None:
        output.logprobs = [*output.logprobs, silent(end_of_text)]
    output.cumulative_logprob = None
    output.finish_reason = FINISH_REASON
    output.stop_reason = None


async def announced(
    outputs: AsyncGenerator[RequestOutput, None], prompt: Any, request_id: str
) -> AsyncGenerator[RequestOutput, None]:
    """An empty output, then the others: vLLM answers it with the role, so that clients see at once that the request arrived."""
    token_ids = list(prompt["prompt_token_ids"])
    yield RequestOutput(request_id, prompt.get("prompt"), token_ids, None, [], False, num_cached_tokens=0)
    async with aclosing(outputs):
        async for output in outputs:
            yield output


def merged(outputs: Sequence[CompletionOutput]) -> CompletionOutput:
    """Pieces of one choice as one piece; what its end says is that of the last."""
    if len(outputs) == 1:
        return outputs[0]
    logprobs = None
    if outputs[0].logprobs is not None:
        logprobs = [place for each in outputs for place in (each.logprobs or [])]
    return replace(
        outputs[-1],
        text="".join(each.text for each in outputs),
        token_ids=[token for each in outputs for token in each.token_ids],
        logprobs=logprobs,
    )


async def interleaved(generators: Sequence[AsyncGenerator[RequestOutput, None]]) -> AsyncGenerator[RequestOutput, None]:
    """What several generators yield, as it comes. Closing it closes them all, before it returns.

    vLLM's ``merge_async_iterators`` only tells them to close: a request could go on for a while when its client has its answer.
    """
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
