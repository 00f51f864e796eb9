"""The gate: does a conversation touch a forget set?

Two signals, either of which is a hit. A *name* of the set (alias or phrase) stands in the text, or in what the text decodes to. The
*meaning* of a window of the text is near an entry of the set: cosine at least the set's threshold.

Covered: every turn, all of a long prompt, short turns together, disguises (`disguise`). Not covered: a subject that is neither
named nor described; languages that the encoder does not know (the bundled one knows English; names match in any); pictures and
sound.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from guards.similarity.disguise import TooMuchToRead, View, open_from, readings, visible
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.index import ANSWER, FaissIndex, SetVectors
from guards.similarity.keys import Key
from guards.similarity.names import Names
from guards.similarity.stream import FEWEST_WORDS
from guards.similarity.windows import windows

NAME_SCORE = 1.0
MOST_WINDOWS = 4_096
"""Of one conversation: half a minute of one core."""
LONG_PASSAGE, PIECES = 25, (16, 8)
"""Words. Longer passages are also judged in pieces of so many, overlapping by half."""

Signal = Literal["name", "similarity", "guard"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One set that a text touches, and why."""

    owner: str  # fingerprint of the set's artifact; for signal "guard" the set's name, or the guard's
    signal: Signal
    score: float  # cosine; 1 for a name
    threshold: float
    text: str  # what of the text touches it
    how: str = "plain"  # how it had to be read: see `disguise.View`, `names.Found`
    start: int = 0  # where in the text, or in the turn; all of what it was decoded from
    end: int = 0
    turn: int | None = None  # of a conversation, from 0; None where it lies across turns


@dataclass(frozen=True, slots=True)
class Question:
    """A text that was read: what its letters already say, and what is to be embedded to know the rest."""

    named: tuple[Verdict, ...]
    texts: tuple[str, ...]
    thresholds: Mapping[str, float]  # owner -> cosine from which it is a hit
    spoken: bool  # by the model: only answers, texts and phrases count, and every hit does
    length: int  # characters
    turns: tuple[str, ...] = ()  # of a conversation


class Gate:
    """Every loaded set, and the questions that can be asked of them.

    Reading (`read_conversation`, `read_passage`) may happen in any thread; `load` and `answer` belong to one, since the index
    changes in place.
    """

    def __init__(self, dimension: int) -> None:
        self._loaded: dict[str, SetVectors] = {}
        self._anything = FaissIndex(dimension)
        self._said = FaissIndex(dimension)
        self._aliased = _Named({})
        self._phrased = _Named({})

    @property
    def loaded(self) -> frozenset[str]:
        return frozenset(self._loaded)

    def vectors(self, owner: str) -> SetVectors | None:
        """A loaded set's artifact."""
        return self._loaded.get(owner)

    def load(self, sets: Mapping[str, SetVectors]) -> None:
        """Make exactly these sets known (fingerprint -> vectors); those that stay are not touched."""
        gone, new = self._loaded.keys() - sets.keys(), sets.keys() - self._loaded.keys()
        for owner in gone:
            self._anything.remove(owner)
            self._said.remove(owner)
        for owner in new:
            entries = sets[owner]
            self._anything.add(owner, entries.vectors)
            self._said.add(owner, entries.vectors[entries.kinds == ANSWER])
        if gone or new:
            phrased: dict[str, list[str]] = {}
            aliased: dict[str, list[str]] = {}
            for owner, entries in sets.items():
                for key in entries.phrases:
                    phrased.setdefault(key, []).append(owner)
                for key in {*entries.aliases, *entries.phrases}:
                    aliased.setdefault(key, []).append(owner)
            self._phrased, self._aliased = _Named(phrased), _Named(aliased)
        self._loaded = dict(sets)  # last: whoever finds a set here finds its names too

    def read_conversation(self, turns: Sequence[str], thresholds: Mapping[str, float], whole: str = "") -> Question:
        """Read a conversation, to know which sets among ``thresholds`` it touches.

        Args:
            whole: the conversation in one piece, for names that lie across turns.

        Raises:
            EncoderUnavailable: one of them is not loaded, so that it would silently never be hit.
            TooMuchToRead: it has more than `MOST_WINDOWS` windows, or too many encoded passages.
        """
        self._check(thresholds)
        named: list[Verdict] = []
        texts = windows([visible(turn) for turn in turns])
        for number, turn in enumerate(turns):
            views = readings(turn)
            named += [replace(verdict, turn=number) for verdict in self._aliased.verdicts(views, thresholds)]
            texts += [text for view in views[1:] if _worth_embedding(view) for text in windows([view.text])]
        named += [] if whole in turns else self._aliased.plainly(whole, thresholds)
        texts = list(dict.fromkeys(texts))
        if len(texts) > MOST_WINDOWS:
            raise TooMuchToRead(
                f"the conversation has {len(texts):,} sentences to judge, at most {MOST_WINDOWS:,}; send less at once"
            )
        return Question(tuple(named), tuple(texts), thresholds, False, sum(map(len, turns)), tuple(turns))

    def places(self, text: str, owners: Collection[str]) -> list[tuple[int, int]]:
        """Where a text plainly names the subjects of some loaded sets: [start, end) in characters."""
        thresholds = dict.fromkeys(owners, NAME_SCORE)
        return sorted({(each.start, each.end) for each in self._aliased.plainly(text, thresholds)})

    def read_passage(self, passage: str, thresholds: Mapping[str, float]) -> Question:
        """Read a passage of an answer, to know which sets it gives away. Raises EncoderUnavailable, as `read_conversation`."""
        self._check(thresholds)
        views = readings(passage)
        texts = _pieces(visible(passage))
        texts += [text for view in views[1:] if _worth_embedding(view) for text in _pieces(view.text)]
        named = self._phrased.verdicts(views, thresholds)
        return Question(tuple(named), tuple(dict.fromkeys(filter(None, texts))), thresholds, True, len(passage))

    def answer(self, question: Question, vectors: np.ndarray) -> list[Verdict]:
        """What a text touches, given the [len(question.texts), d] embeddings of its windows.

        Of a conversation, each set once, by a name if there is one. Of a passage, every place.
        """
        self._check(question.thresholds)
        near = []
        if len(vectors) and question.thresholds:
            index = self._said if question.spoken else self._anything
            for owner, (score, which) in index.near(vectors, min(question.thresholds.values())).items():
                threshold = question.thresholds.get(owner, 2.0)
                if score >= threshold:
                    text = question.texts[which]
                    near.append(Verdict(owner, "similarity", score, threshold, text, "plain", *_place(text, question)))
        if question.spoken:
            return [*question.named, *near]
        found: dict[str, Verdict] = {}
        for verdict in (*question.named, *near):
            found.setdefault(verdict.owner, verdict)
        return list(found.values())

    def _check(self, thresholds: Mapping[str, float]) -> None:
        if missing := thresholds.keys() - self._loaded.keys():
            raise EncoderUnavailable(f"similarity artifact {min(missing)[:12]} is not loaded; enable its set again")

    def open_from(self, text: str) -> int:
        """Where in ``text`` a phrase or an encoded passage begins that what follows could complete; its length if none does."""
        return min(self._phrased.names.open_from(text), open_from(text)) if self._loaded else len(text)


class _Named:
    """Names and whose they are."""

    def __init__(self, owners: Mapping[str, Sequence[str]]) -> None:
        self._owners = owners
        self.names = Names(owners)

    def plainly(self, text: str, thresholds: Mapping[str, float]) -> list[Verdict]:
        """Names that stand in a text without being encoded or turned."""
        return [
            Verdict(owner, "name", NAME_SCORE, NAME_SCORE, text[hit.start : hit.end], hit.how, hit.start, hit.end)
            for hit in self.names.find(text)
            for owner in self._owners[hit.key]
            if owner in thresholds
        ]

    def verdicts(self, views: Sequence[View], thresholds: Mapping[str, float]) -> list[Verdict]:
        """Every place where a set's name stands, once for each way to read it."""
        found: dict[tuple[str, int, int], Verdict] = {}
        for view in views:
            if view.how != "plain" and not view.passages:
                continue  # rewritten for the encoder: names in it were found in what it was made from
            for hit in (*self.names.find(view.text), *self.names.find_turned(view.text)):
                touched = view.touched(hit.start, hit.end)
                if view.passages and not touched:
                    continue  # it stands in the text itself
                if len(Key.of(hit.key).units) < max((passage.least for passage in touched), default=0):
                    continue
                hows = [*dict.fromkeys(passage.how for passage in touched), *([hit.how] if hit.how != "plain" else [])]
                start, end = view.place(hit.start, hit.end)
                for owner in self._owners[hit.key]:
                    if owner in thresholds:
                        verdict = Verdict(
                            owner,
                            "name",
                            NAME_SCORE,
                            NAME_SCORE,
                            view.text[hit.start : hit.end],
                            ", ".join(hows) or "plain",
                            start,
                            end,
                        )
                        found.setdefault((owner, start, end), verdict)
        return list(found.values())


def _place(window: str, question: Question) -> tuple[int, int, int | None]:
    """Where a window stands: start, end, turn. All of the text if it was joined, rewritten, or is part of an answer's passage."""
    for number, turn in enumerate(question.turns):
        if (start := turn.find(window)) >= 0:
            return start, start + len(window), number
    return 0, question.length, None


def _pieces(passage: str) -> list[str]:
    """What to embed of a passage of an answer: all of it, and parts in which what it says is not diluted."""
    found = [passage.strip(), *windows([passage])]
    words = passage.split()
    if len(words) > LONG_PASSAGE:
        for size in PIECES:
            found += [" ".join(words[i : i + size]) for i in range(0, len(words) - size // 2, size // 2)]
    if '"' in passage:  # JSON: what its strings say
        found += [part.strip() for part in re.split(r'[\[\]{}"]+', passage) if len(part.split()) >= FEWEST_WORDS]
    return found


def _worth_embedding(view: View) -> bool:
    """Whether a reading says more than names: a rewritten one does, of decoded ones those that hold words."""
    if not view.passages:
        return " " in view.text.strip()
    return len(view.passages) > 2 or any(" " in passage.text.strip() or passage.how == "escapes" for passage in view.passages)
