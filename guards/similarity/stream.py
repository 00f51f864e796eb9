"""An answer that grows, clause by clause: what may be shown, and what is held until it has been judged.

Clauses depend on the text alone, not on the pieces in which it arrives: where one ends is decided only by what stands there. So the
same text is judged in the same clauses however it is cut, streamed or whole.

Covered: one clause at a time, and phrases across clauses. Not covered: a secret spread over clauses each of which says nothing.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST_WORDS = 3
"""A clause has at least as many: "Yes," and "1." say nothing by themselves and go with what follows."""
SOFT = 40
"""Characters from which a comma ends a clause."""
LONG = 240
"""Characters from which any white space does."""
LONGEST = 4_000
"""Characters from which anything does: base64 has no spaces, and is read as a whole up to here."""
_BOUNDARY = re.compile(
    r"(?<![.!?…])[.!?…]+[\"'”’)\]]{0,8}(?=\s)|[。！？，；]|(?=\n)|(?<=\s)/{1,2}(?=\s)|[,;:—–]+(?=\s)|(?<=\S)(?=\s)"  # noqa: RUF001
)


@dataclass(frozen=True, slots=True)
class Clause:
    """A part of the text, [start, end) in characters."""

    start: int
    end: int


class Clauses:
    """Cuts one text, given piece by piece."""

    def __init__(self) -> None:
        self.text = ""
        self._start = 0

    def feed(self, piece: str) -> list[Clause]:
        """The clauses that this piece completes."""
        self.text += piece
        found = []
        while (end := self._next_end()) is not None:
            found.append(Clause(self._start, end))
            self._start = end
        return found

    def finish(self) -> list[Clause]:
        """What is left at the end of the text, as one clause; nothing if there is none."""
        rest = [Clause(self._start, len(self.text))] if self._start < len(self.text) else []
        self._start = len(self.text)
        return rest

    def cut(self, length: int) -> None:
        """Go back to when the text was this long."""
        self.text = self.text[:length]
        self._start = min(self._start, length)

    def _next_end(self) -> int | None:
        # The last character may still turn out to be within something: a boundary counts once a character follows it.
        known = len(self.text) - 1
        for boundary in _BOUNDARY.finditer(self.text, self._start, len(self.text)):
            end = boundary.end()
            if end > known or end - self._start >= LONGEST:
                break
            length = end - self._start
            mark = boundary[0]
            soft = mark[:1] in tuple(",;:—–，；")  # noqa: RUF001
            blank = not mark and not self.text.startswith("\n", end)
            if (soft and length < SOFT) or (blank and length < LONG):
                continue
            if len(self.text[self._start : end].split()) >= FEWEST_WORDS or length >= LONG:
                return end
        return self._start + LONGEST if len(self.text) - self._start > LONGEST else None


def ends_sentence(clause: str) -> bool:
    """Whether nothing of the clause's sentence can follow it, but for a line break."""
    return clause.rstrip().rstrip("\"'”’)]")[-1:] in tuple(".!?…。！？")  # noqa: RUF001


def clauses_of(text: str) -> list[str]:
    """The clauses of a whole text, without the white space around them."""
    clauses = Clauses()
    found = [*clauses.feed(text), *clauses.finish()]
    return [clause for each in found if (clause := text[each.start : each.end].strip())]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer; ``about`` is whatever travels with it."""

    id: int
    text: bytes
    about: Any = None


@dataclass(frozen=True, slots=True)
class Released:
    """What may be shown now. ``tokens`` has None once for each span that was taken out."""

    text: str
    tokens: tuple[Token | None, ...]


class AnswerBuffer:
    """One answer: takes what was generated, names what is to be judged, and gives out what has been cleared.

    What is judged is the text that the tokens spell; the engine's own text may lag behind it (engines hold text back for stop
    strings). Text and tokens are released together, whole tokens at a time, so that an answer can be resumed after the last one.

    Args:
        open_from: where in a text something begins that more text could complete (`Gate.open_from`).
        marker: what is shown in place of a span that was taken out.
        stops: the request's stop strings; the engine does not see one that begins before and ends after a restart.
        hold: False only names passages, and gives everything out at once.
    """

    def __init__(self, open_from: Callable[[str], int], marker: str, stops: Sequence[str] = (), *, hold: bool = True) -> None:
        self._hold = hold
        self._open_from = open_from
        self._marker = marker
        self._stops = [stop for stop in stops if stop]
        self._clauses = Clauses()
        self._waiting: list[Clause] = []
        self._tokens: list[Token] = []
        self._ends: list[int] = []  # where in what is spelled each token ends; one more if it ends inside a character
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self._unfed = ""  # spelled before any text came, so that a leading space which the engine drops can be told
        self._cleared = 0
        self._taken: list[tuple[int, int]] = []
        self._shown = self._shown_tokens = 0
        self._joint: int | None = None
        self._whole_left = False  # text and tokens differ: at the end, the text is judged as one passage
        self.finished = False
        self.stop: str | None = None
        """The stop string that was found across a restart."""

    @property
    def aligned(self) -> bool:
        """Whether the text is what the tokens spell, as far as it goes."""
        return self._clauses.text.startswith(self._text)

    @property
    def place(self) -> int:
        """Where in what the tokens spell the passage begins that is to be judged next."""
        return self._cleared

    @property
    def lost(self) -> bool:
        """Whether spans were taken out that cannot be located, as the engine's text differs from the spelled one: end it."""
        return bool(self._taken) and not self.aligned

    def add(self, text: str, tokens: Sequence[Token], *, finished: bool = False) -> None:
        """Take what the engine generated. ``text`` may lag behind the tokens until ``finished``."""
        first = not self._text and not self._clauses.text
        self._text += text
        self._find_stop()
        finished = finished or self.stop is not None
        spelled = self._unfed
        for token in tokens:
            spelled += self._decoder.decode(token.text)
            self._tokens.append(token)
            self._ends.append(len(self._clauses.text) + len(spelled) + bool(self._decoder.getstate()[0]))
        if finished:
            spelled += self._decoder.decode(b"", True)
        if first and not self._text and not finished:
            self._unfed = spelled
            return
        self._unfed = ""
        if first and spelled.startswith(" ") and self._text and not self._text.startswith(" "):
            spelled = spelled[1:]
            self._ends = [max(0, end - 1) for end in self._ends]
        self._waiting += self._clauses.feed(spelled)
        if finished:
            self._waiting += self._clauses.finish()
            self._whole_left = not self.aligned
        self.finished = finished

    def passage(self) -> str | None:
        """What is to be judged next; None if all that is complete has been."""
        if self._waiting:
            return self._clauses.text[self._cleared : self._waiting[0].end]
        return self._text if self._whole_left else None

    def passed(self) -> None:
        """The passage may be shown."""
        if not self._waiting:
            self._whole_left = False
            return
        end = self._waiting.pop(0).end
        last = self.finished and not self._waiting
        start = max([self._cleared, *(taken for _, taken in self._taken if taken <= end)])
        self._cleared = end if last else start + self._open_from(self._clauses.text[start:end])

    def take_out(self, spans: Sequence[tuple[int, int]]) -> bool:
        """Show the passage without these spans (characters of the passage). False if that cannot be done: end the answer then."""
        if not self._waiting or not self.aligned:
            return False  # places in what is spelled are no places in the text
        end = self._waiting[0].end
        for start, stop in sorted(spans):
            low, high = self._cleared + start, min(self._cleared + stop, end)
            while low < high and self._clauses.text[low].isspace():  # the space before stays
                low += 1
            if self._taken and not self._clauses.text[self._taken[-1][1] : low].strip():
                self._taken[-1] = (self._taken[-1][0], max(high, self._taken[-1][1]))
            elif low < high:
                self._taken.append((low, high))
        self.passed()
        return True

    def release(self) -> Released | None:
        """What has been cleared and was not given out yet; None if there is nothing."""
        if self.lost:
            return None
        if not self._hold or (self.finished and not self._waiting and not self._whole_left):
            tokens, position = len(self._tokens), len(self._text)
        elif self.aligned and not self._whole_left:
            tokens = bisect_right(self._ends, self._cleared)
            position = min(self._ends[tokens - 1] if tokens else 0, len(self._text))
        else:
            return None
        text, given = self._without_taken(self._shown, position), self._tokens_without_taken(self._shown_tokens, tokens)
        self._shown, self._shown_tokens = max(position, self._shown), max(tokens, self._shown_tokens)
        return Released(text, tuple(given)) if text or given else None

    def cut_back(self) -> list[int] | None:
        """Throw away what was not given out, to go on another way: the ids of the tokens that stay. None if that cannot be done."""
        if not self.aligned or self._taken:
            return None
        tokens = self._shown_tokens
        position = self._ends[tokens - 1] if tokens else 0
        if self._clauses.text[:position].endswith("\ufffd"):
            return None  # vLLM's detokenizer would say the whole prompt again after half a character
        text = self._clauses.text[:position]
        del self._tokens[tokens:], self._ends[tokens:]
        self._clauses.cut(position)
        self._waiting = [clause for clause in self._waiting if clause.end <= position]
        self._cleared = min(self._cleared, position)
        self._text, self._joint, self._unfed = text, len(text), ""
        self._shown = min(self._shown, position)
        self.finished = False
        self._decoder.reset()
        return [token.id for token in self._tokens]

    def _find_stop(self) -> None:
        if self._joint is None:
            return
        for stop in self._stops:
            place = self._text.find(stop, max(self._shown, self._joint - len(stop) + 1))
            if 0 <= place < self._joint:
                self._text, self.stop = self._text[:place], stop
                return

    def _without_taken(self, start: int, end: int) -> str:
        shown, place = "", start
        for low, high in self._taken:
            if high <= start or low >= end:
                continue
            if low >= start:
                shown += self._text[place:low] + self._marker
            place = max(place, high)
        return shown + self._text[place:end]

    def _tokens_without_taken(self, first: int, last: int) -> list[Token | None]:
        given: list[Token | None] = []
        for i in range(first, last):
            low, high = self._ends[i - 1] if i else 0, self._ends[i]
            over = next((span for span in self._taken if low < span[1] and high > span[0]), None)
            if over is None:
                given.append(self._tokens[i])
            elif not i or low <= over[0]:  # the first token of the span stands for all of it
                given.append(None)
        return given
