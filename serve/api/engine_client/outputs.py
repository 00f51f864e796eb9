"""What may be done to an answer's outputs, so that text, token ids and log-probabilities keep saying the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput

from serve.api.refusal import FINISH_REASON


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
