"""The watch over outputs whose own constraints (a grammar, allowed tokens) could leave the engine nothing but banned tokens.

Covered: phrases in the text and in what its tokens spell, JSON escapes included. Not covered: meaning (see `held`).
"""

from __future__ import annotations

import codecs
import json
import re

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.suppression.automaton import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary


LONGEST_ESCAPE = 12
"""Characters that JSON may take for one: two surrogates of six."""


class _Channel:
    """Text that arrives in pieces, as far as a phrase could still be completed in it."""

    def __init__(self, artifacts: list[CompiledPhrases], half_said: str, *, grows: bool) -> None:
        self._artifacts = artifacts
        self._befores = [artifact.end_of(half_said) for artifact in artifacts]
        self._grows = grows

    def first_hit(self, piece: str) -> int | None:
        """Where in ``piece`` the first phrase that it completes begins (0 if before it); None if it completes none.

        A tool call's arguments are JSON, which vLLM reads and writes anew: what they say with escapes counts as said.
        """
        hits: list[int] = []
        for number, artifact in enumerate(self._artifacts):
            text, known = self._befores[number] + piece, len(self._befores[number])
            found = [start - known for start, end in artifact.find(text) if end > known]
            if not found and "\\" in text:
                plain, plain_before = _unescaped(text), _unescaped(self._befores[number])
                if len(artifact.find(plain)) > len(artifact.find(plain_before)):
                    found = [0]
            hits += found
            if self._grows:
                self._befores[number] = artifact.end_of(text, LONGEST_ESCAPE)
        return max(0, min(hits)) if hits else None


class Watch:
    """One choice: its text, and the text that its tokens spell, which may be ahead (vLLM holds text back for stop strings)."""

    def __init__(self, artifacts: list[CompiledPhrases], vocabulary: Vocabulary, params: SamplingParams, half_said: str) -> None:
        self._vocabulary = vocabulary
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = _Channel(artifacts, half_said, grows=self._delta)
        self._spelled = _Channel(artifacts, half_said, grows=self._delta)
        self._safe = 0
        self.ended = False
        self.finished = False

    def completes_a_phrase(self, output: CompletionOutput) -> bool:
        if not self._delta:
            self._decoder.reset()
        spelled = self._decoder.decode(self._vocabulary.text_of(output.token_ids))
        hits = [hit for hit in (self._text.first_hit(output.text), self._spelled.first_hit(spelled)) if hit is not None]
        self._safe = min(hits, default=0)
        return bool(hits)

    def safe_text(self, output: CompletionOutput) -> str:
        """What may be shown of an output that completes a phrase: nothing of a delta, else what lies before the phrase."""
        return "" if self._delta else output.text[: self._safe]


_ESCAPES = re.compile(r'(?:\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))+')


def _unescaped(text: str) -> str:
    return _ESCAPES.sub(lambda escapes: str(json.loads(f'"{escapes[0]}"')), text)
