"""The watch over outputs whose own constraints (a grammar, allowed tokens) could leave the engine nothing but banned tokens.

Covered: phrases in the text and in what its tokens spell, JSON escapes included. Not covered: meaning (see `stream`).
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

from guards.suppression.artifact import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary
from serve.generation.outputs import merged


@dataclass(frozen=True, slots=True)
class Completed:
    """A phrase that a text completes."""

    start: int  # in what has not gone out yet; 0 if it begins before that
    text: str
    artifact: int  # whose phrase it is


class _Channel:
    """A text that arrives in pieces: what may still become a phrase of it, and what has not gone out."""

    def __init__(self, artifacts: list[CompiledPhrases], befores: list[str], *, grows: bool) -> None:
        self._artifacts = artifacts
        self.befores = befores
        self._grows = grows
        self.held = ""

    def add(self, piece: str) -> Completed | None:
        """Take a piece. Returns the first phrase that it completes, if it completes one."""
        self.held = self.held + piece if self._grows else piece
        hits: list[Completed] = []
        for number, artifact in enumerate(self._artifacts):
            text, known = self.befores[number] + piece, len(self.befores[number])
            found = [text[start:end] for start, end in artifact.find(text) if end > known]
            if found:
                # What is held is as much as any phrase may need, unless it began in the prompt.
                begun = [start for start, end in artifact.find(self.held) if end > len(self.held) - len(piece)]
                hits.append(Completed(min(begun) if len(begun) == len(found) else 0, found[0], number))
            if self._grows:
                self.befores[number] = artifact.end_of(text)
        return min(hits, key=lambda hit: hit.start, default=None)

    def open_from(self) -> int:
        """Where in what is held a phrase may begin that what follows could complete."""
        return min((artifact.open_from(self.held) for artifact in self._artifacts), default=len(self.held))


class _Unescaped:
    """A text with its JSON escapes decoded: vLLM parses a tool call's arguments and writes them anew, so escaped phrases count.

    Args:
        befores, held: of the channel of the text as it stands, before the first backslash came.
    """

    def __init__(self, artifacts: list[CompiledPhrases], befores: list[str], held: str, *, grows: bool) -> None:
        self._channel = _Channel(artifacts, list(befores), grows=grows)
        self._channel.held = held
        self._ends = list(range(1, len(held) + 1))  # where in the text as it stands each character ends
        self._read = len(held)
        self._unfinished = ""

    def add(self, piece: str) -> Completed | None:
        text, plain = self._unfinished + piece, ""
        position = 0
        for escape in _ESCAPE.finditer(text):
            between = text[position : escape.start()]
            plain += between + str(json.loads(f'"{escape[0]}"'))
            self._note(len(between), 1)
            self._note(1, len(escape[0]))
            position = escape.end()
        unfinished = _UNFINISHED.search(text, position)
        end = unfinished.start() if unfinished else len(text)
        plain += text[position:end]
        self._note(end - position, 1)
        self._unfinished = text[end:]
        hit = self._channel.add(plain)
        if hit is None:
            return None
        return Completed(self._raw(hit.start), hit.text, hit.artifact)

    def open_from(self) -> int:
        return self._raw(self._channel.open_from())

    def release(self, count: int) -> None:
        """The first characters of the text as it stands went out."""
        gone = bisect_right(self._ends, count)
        self._channel.held = self._channel.held[gone:]
        self._ends = [end - count for end in self._ends[gone:]]
        self._read -= count

    def _note(self, characters: int, width: int) -> None:
        for _ in range(characters):
            self._read += width
            self._ends.append(self._read)

    def _raw(self, place: int) -> int:
        return max(0, self._ends[place - 1]) if place else 0


_ESCAPE = re.compile(r'\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]')
_UNFINISHED = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z")


class Watch:
    """One choice: its text, and the text that its tokens spell, which may be ahead (vLLM holds text back for stop strings).

    A stream gives out only what can no longer become the beginning of a phrase, so that it is never ahead of the answer that the
    same request would get in one piece.
    """

    def __init__(self, artifacts: list[CompiledPhrases], vocabulary: Vocabulary, params: SamplingParams, half_said: str) -> None:
        self._artifacts = artifacts
        self._vocabulary = vocabulary
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._befores = [artifact.end_of(half_said) for artifact in artifacts]
        self._text = _Channel(artifacts, list(self._befores), grows=self._delta)
        self._spelled = _Channel(artifacts, list(self._befores), grows=self._delta)
        self._plain: _Unescaped | None = None  # from the first backslash on
        self._waiting: list[tuple[CompletionOutput, int]] = []  # what has not gone out, and how many characters its tokens spell
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
        hits = [hit for hit in (self._add_plain(output.text), self._text.add(output.text), self._spelled.add(spelled)) if hit]
        self.finished = output.finish_reason is not None
        if self._delta:
            self._waiting.append((output, len(spelled)))
        if hits:
            self.ended = self.finished = True
            self.hit = min(hits, key=lambda hit: hit.start)
            return self._before(self.hit.start, merged([each for each, _ in self._waiting]) if self._delta else output)
        if not self._delta:
            return output
        if self.finished:
            return self._release(len(self._waiting))
        text_open, spelled_open = self._text.open_from(), self._spelled.open_from()
        if self._plain is not None:
            text_open = min(text_open, self._plain.open_from())
        ends = accumulate(len(each.text) for each, _ in self._waiting)
        spelled_ends = accumulate(length for _, length in self._waiting)
        free = [end <= text_open and ahead <= spelled_open for end, ahead in zip(ends, spelled_ends, strict=True)]
        return self._release(free.index(False) if False in free else len(free))

    def _add_plain(self, piece: str) -> Completed | None:
        """Read a piece as JSON, before the channel of the text takes it."""
        if not self._delta:
            self._plain = None
        if self._plain is None:
            if "\\" not in piece:
                return None
            held, befores = (self._text.held, self._text.befores) if self._delta else ("", self._befores)
            self._plain = _Unescaped(self._artifacts, befores, held, grows=self._delta)
        return self._plain.add(piece)

    def _spell(self, output: CompletionOutput) -> str:
        return self._vocabulary.text_of(output.token_ids).decode("utf-8", "replace")

    def _release(self, count: int) -> CompletionOutput | None:
        """The first outputs that wait, as one; None if that is nothing."""
        if not count:
            return None
        released = merged([each for each, _ in self._waiting[:count]])
        spelled = sum(length for _, length in self._waiting[:count])
        self._waiting = self._waiting[count:]
        self._shown += len(released.text)
        self._text.held, self._spelled.held = self._text.held[len(released.text) :], self._spelled.held[spelled:]
        if self._plain is not None:
            self._plain.release(len(released.text))
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
