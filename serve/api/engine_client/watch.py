"""The watch over outputs whose own constraints (a grammar, allowed tokens) could leave the engine nothing but banned tokens.

Covered: phrases in the text and in what its tokens spell, JSON escapes included. Not covered: meaning (see `held`).
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from guards.suppression.automaton import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary
from serve.api.engine_client.outputs import merged

LONGEST_ESCAPE = 12
"""Characters that JSON may take for one: two surrogates of six."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A phrase that a text completes."""

    start: int  # in what has not gone out yet; 0 if it begins before that
    text: str
    artifact: int  # whose phrase it is


class _Channel:
    """A text that arrives in pieces: what may still become a phrase of it, and what has not gone out."""

    def __init__(self, artifacts: list[CompiledPhrases], half_said: str, *, grows: bool) -> None:
        self._artifacts = artifacts
        self._befores = [artifact.end_of(half_said) for artifact in artifacts]
        self._grows = grows
        self.held = ""

    def add(self, piece: str) -> Completed | None:
        """Take a piece. Returns the first phrase that it completes, if it completes one.

        A tool call's arguments are JSON, which vLLM reads and writes anew: what they say with escapes counts as said.
        """
        self.held = self.held + piece if self._grows else piece
        hits: list[Completed] = []
        for number, artifact in enumerate(self._artifacts):
            text, known = self._befores[number] + piece, len(self._befores[number])
            found = [text[start:end] for start, end in artifact.find(text) if end > known]
            if not found and "\\" in text:
                plain = _unescaped(text)
                places = artifact.find(plain)
                if len(places) > len(artifact.find(_unescaped(self._befores[number]))):
                    hits.append(Completed(0, plain[slice(*places[-1])], number))
            if found:
                # Where it begins is told by what is held: that is as much as any phrase may need.
                begun = [start for start, end in artifact.find(self.held) if end > len(self.held) - len(piece)]
                hits.append(Completed(min(begun, default=0), found[0], number))
            if self._grows:
                self._befores[number] = artifact.end_of(text, LONGEST_ESCAPE)
        return min(hits, key=lambda hit: hit.start, default=None)

    def open_from(self) -> int:
        """Where in what is held a phrase may begin that what follows could complete."""
        times = LONGEST_ESCAPE if "\\" in self.held else 1
        return min((artifact.open_from(self.held, times) for artifact in self._artifacts), default=len(self.held))


class Watch:
    """One choice: its text, and the text that its tokens spell, which may be ahead (vLLM holds text back for stop strings).

    A stream gives out only what can no longer become the beginning of a phrase, so that it is never ahead of the answer that the
    same request would get in one piece.
    """

    def __init__(self, artifacts: list[CompiledPhrases], vocabulary: Vocabulary, params: SamplingParams, half_said: str) -> None:
        self._vocabulary = vocabulary
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = _Channel(artifacts, half_said, grows=self._delta)
        self._spelled = _Channel(artifacts, half_said, grows=self._delta)
        self._waiting: list[CompletionOutput] = []  # what has not gone out
        self._shown = 0  # characters that went out
        self.hit: Completed | None = None
        self.ended = False
        self.finished = False

    @property
    def place(self) -> int:
        """Where in the answer the phrase begins that ended it."""
        assert self.hit is not None, "ask when it has ended"
        return self._shown + self.hit.start

    def take(self, output: CompletionOutput) -> CompletionOutput | None:
        """Take what the engine generated; returns what may go out now, if anything.

        If a phrase is complete, `ended` turns true, and what is returned is what lies before the phrase.
        """
        if not self._delta:
            self._decoder.reset()
        spelled = self._decoder.decode(self._vocabulary.text_of(output.token_ids))
        hits = [hit for hit in (self._text.add(output.text), self._spelled.add(spelled)) if hit is not None]
        self.finished = output.finish_reason is not None
        if self._delta:
            self._waiting.append(output)
        if hits:
            self.ended = self.finished = True
            self.hit = min(hits, key=lambda hit: hit.start)
            return self._before(self.hit.start, merged(self._waiting) if self._delta else output)
        if not self._delta:
            return output
        if self.finished:
            return self._release(len(self._waiting))
        text_open, spelled_open = self._text.open_from(), self._spelled.open_from()
        ends = accumulate(len(each.text) for each in self._waiting)
        spelled_ends = accumulate(len(self._spell(each)) for each in self._waiting)
        free = [end <= text_open and ahead <= spelled_open for end, ahead in zip(ends, spelled_ends, strict=True)]
        return self._release(free.index(False) if False in free else len(free))

    def _spell(self, output: CompletionOutput) -> str:
        return self._vocabulary.text_of(output.token_ids).decode("utf-8", "replace")

    def _release(self, count: int) -> CompletionOutput | None:
        """The first outputs that wait, as one; None if that is nothing."""
        if not count:
            return None
        released, self._waiting = merged(self._waiting[:count]), self._waiting[count:]
        self._shown += len(released.text)
        self._text.held = self._text.held[len(released.text) :]
        self._spelled.held = self._spelled.held[len(self._spell(released)) :]
        return released

    def _before(self, cut: int, output: CompletionOutput) -> CompletionOutput:
        """What of an output lies before a place in its text: whole tokens, so that text and log-probabilities say the same."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        ends = list(accumulate(len(decoder.decode(self._vocabulary.text_of([token]))) for token in output.token_ids))
        # vLLM drops a space at the beginning of some answers.
        dropped = int(not self._shown and self._spell(output).startswith(" ") and not output.text.startswith(" "))
        tokens = bisect_right(ends, cut + dropped)
        text = output.text[: max(0, ends[tokens - 1] - dropped)] if tokens else ""
        logprobs = None if output.logprobs is None else output.logprobs[:tokens]
        return replace(output, text=text, token_ids=list(output.token_ids)[:tokens], logprobs=logprobs)


_ESCAPES = re.compile(r'(?:\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))+')


def _unescaped(text: str) -> str:
    return _ESCAPES.sub(lambda escapes: str(json.loads(f'"{escapes[0]}"')), text)
