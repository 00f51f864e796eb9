"""What the choke point notes of an answer while it passes: its text, its tokens, its times."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from serve.api.admission import Observation

MOST_CHARACTERS = 100_000
"""Of an answer, that are kept to be judged."""


async def observed(
    outputs: AsyncGenerator[RequestOutput, None], seen: Observation, kind: RequestOutputKind, timed: bool
) -> AsyncGenerator[RequestOutput, None]:
    """Pass outputs on and note them in ``seen``, to which several calls of one request may add.

    Args:
        timed: the time of a first token that only the engine saw is the client's as well; it is not if a guard held it back.
    """
    texts: dict[int, str] = {}
    tokens: dict[int, int] = {}
    try:
        async for step in outputs:
            now = time.perf_counter() - seen.started
            for output in step.outputs:
                grows = kind is RequestOutputKind.DELTA
                texts[output.index] = (texts.get(output.index, "") if grows else "") + output.text
                tokens[output.index] = (tokens.get(output.index, 0) if grows else 0) + len(output.token_ids)
            if seen.first_token_s is None and any(tokens.values()):
                if kind is not RequestOutputKind.FINAL_ONLY:
                    seen.first_token_s = now
                elif timed and step.metrics is not None and step.metrics.first_token_latency > 0:
                    seen.first_token_s = min(now, step.metrics.first_token_latency)
            seen.total_s = max(seen.total_s, now)
            yield step
    finally:
        await outputs.aclose()
        seen.tokens += sum(tokens.values())
        seen.text = "\n".join(text for text in (seen.text, *texts.values()) if text)[:MOST_CHARACTERS]
