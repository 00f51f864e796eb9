"""What the choke point notes of an answer while it passes: its text, its tokens, its times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from serve.request import Observation

MOST_CHARACTERS = 8_000
"""Of an answer, that are kept to be judged."""


async def noted(
    outputs: AsyncGenerator[RequestOutput, None], seen: Observation, params: SamplingParams
) -> AsyncGenerator[RequestOutput, None]:
    """Pass outputs on and note them in ``seen``, to which several calls of one request may add."""
    texts: dict[int, str] = {}
    tokens: dict[int, int] = {}
    grows = params.output_kind is RequestOutputKind.DELTA
    seen.readable &= params.detokenize
    try:
        async for step in outputs:
            now = time.perf_counter() - seen.started
            for output in step.outputs:
                texts[output.index] = (texts.get(output.index, "") if grows else "") + output.text
                tokens[output.index] = (tokens.get(output.index, 0) if grows else 0) + len(output.token_ids)
            # What is not streamed comes all at once, whatever the engine saw first.
            if seen.first_token_s is None and any(tokens.values()) and params.output_kind is not RequestOutputKind.FINAL_ONLY:
                seen.first_token_s = now
            seen.total_s = max(seen.total_s, now)
            yield step
    except (GeneratorExit, asyncio.CancelledError):
        raise
    except BaseException:
        seen.failed = True
        raise
    finally:
        await outputs.aclose()
        seen.tokens += sum(tokens.values())
        seen.text = "\n".join(text for text in (seen.text, *texts.values()) if text)[:MOST_CHARACTERS]
