"""The watch over outputs whose own constraints (a grammar, allowed tokens) could leave the engine nothing but banned tokens.

Covered: phrases in the text and in what its tokens spell, JSON escapes included. Not covered: meaning (see `held`).
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.suppression.automaton import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary

LONGEST_ESCAPE = 12
"""Characters that JSON may take for one: two surrogates of six."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A phrase that a piece of text completes."""

    start: int  # in the piece; 0 if it begins before it
    text: str
    artifact: int  # whose phrase it is


class _Channel:
    """Text that arrives in pieces, as far as a phrase could still be completed in it."""

    def __init__(self, artifacts: list[CompiledPhrases], half_said: str, *, grows: bool) -> None:
        self._artifacts = artifacts
        self._befores = [artifact.end_of(half_said) for artifact in artifacts]
        self._grows = grows

    def first_hit(self, piece: str) -> Completed | None:
        """The first phrase that this piece completes, if it completes one.

        A tool call's arguments are JSON, which vLLM reads and writes anew: what they say with escapes counts as said.
        """
        hits: list[Completed] = []
        for number, artifact in enumerate(self._artifacts):
            text, known = self._befores[number] + piece, len(self._befores[number])
            found = [(start, end) for start, end in artifact.find(text) if end > known]
            hits += [Completed(max(0, start - known), text[start:end], number) for start, end in found]
            if not found and "\\" in text:
                plain, plain_before = _unescaped(text), _unescaped(self._befores[number])
                places = artifact.find(plain)
                if len(places) > len(artifact.find(plain_before)):
                    hits.append(Completed(0, plain[slice(*places[-1])], number))
            if self._grows:
                self._befores[number] = artifact.end_of(text, LONGEST_ESCAPE)
        return min(hits, key=lambda hit: hit.start, default=None)


class Watch:
    """One choice: its text, and the text that its tokens spell, which may be ahead (vLLM holds text back for stop strings)."""

    def __init__(self, artifacts: list[CompiledPhrases], vocabulary: Vocabulary, params: SamplingParams, half_said: str) -> None:
        self._vocabulary = vocabulary
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = _Channel(artifacts, half_said, grows=self._delta)
        self._spelled = _Channel(artifacts, half_said, grows=self._delta)
        self._shown = 0  # characters that went out before this output
        self.hit: Completed | None = None
        self.ended = False
        self.finished = False

    @property
    def place(self) -> int:
        """Where in the answer the phrase begins; of one that began in an earlier piece, where this piece does."""
        assert self.hit is not None, "ask after completes_a_phrase"
        return self._shown + self.hit.start

    def completes_a_phrase(self, output: CompletionOutput) -> bool:
        if not self._delta:
            self._decoder.reset()
        spelled = self._decoder.decode(self._vocabulary.text_of(output.token_ids))
        hits = [hit for hit in (self._text.first_hit(output.text), self._spelled.first_hit(spelled)) if hit is not None]
        self.hit = min(hits, key=lambda hit: hit.start, default=None)
        if self._delta and not hits:
            self._shown += len(output.text)
        return bool(hits)

    def safe_text(self, output: CompletionOutput) -> str:
        """What may be shown of an output that completes a phrase: nothing of a delta, else what lies before the phrase."""
        return "" if self._delta or self.hit is None else output.text[: self.hit.start]


_ESCAPES = re.compile(r'(?:\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))+')


def _unescaped(text: str) -> str:
    return _ESCAPES.sub(lambda escapes: str(json.loads(f'"{escapes[0]}"')), text)
