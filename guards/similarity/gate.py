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
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guards.similarity.disguise import TooMuchToRead, View, readings, reads_better, visible
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.index import ANSWER, FaissIndex, SetVectors
from guards.similarity.skeleton import Names
from guards.similarity.stream import FEWEST_WORDS
from guards.similarity.windows import windows

NAME_SCORE = 1.0
MOST_WINDOWS = 4_096
"""Of one conversation: half a minute of one core."""
LONG_PASSAGE, PIECES = 25, (16, 8)
"""Words. Longer passages are also judged in pieces of so many, overlapping by half."""

Signal = Literal["name", "similarity"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One set that a text touches, and why."""

    owner: str  # fingerprint of the set's artifact
    signal: Signal
    score: float  # cosine; 1 for a name
    threshold: float
    text: str  # what of the text touches it
    how: str = "plain"  # how it had to be read: see `disguise.View`
    start: int = 0  # where in the text, if it is known
    end: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """A text that was read: what its letters already say, and what is to be embedded to know the rest."""

    named: tuple[Verdict, ...]
    texts: tuple[str, ...]
    thresholds: Mapping[str, float]  # owner -> cosine from which it is a hit
    spoken: bool  # by the model: only answers, texts and phrases count, and every hit does
    length: int  # characters


class Gate:
    """Every loaded set, and the questions that can be asked of them.

    Reading (`asked`, `spoken`) may happen in any thread; `load` and `answer` belong to one, since the index changes in place.
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

    def asked(self, turns: Sequence[str], thresholds: Mapping[str, float], whole: str = "") -> Question:
        """Read a conversation, to know which sets among ``thresholds`` it touches.

        Args:
            whole: the conversation in one piece, for names that lie across turns.

        Raises:
            EncoderUnavailable: one of them is not loaded, so that it would silently never be hit.
            TooMuchToRead: it has more than `MOST_WINDOWS` windows, or too many encoded passages.
        """
        self._check(thresholds)
        named = self._aliased.verdicts([View(whole, "plain", 0, len(whole))], thresholds)
        texts = windows([visible(turn) for turn in turns])
        for turn in turns:
            views = readings(turn)
            named += self._aliased.verdicts(views, thresholds)
            texts += [text for view in views[1:] if _worth_reading(view, turn) for text in windows([view.text])]
        texts = list(dict.fromkeys(texts))
        if len(texts) > MOST_WINDOWS:
            raise TooMuchToRead(
                f"the conversation has {len(texts):,} sentences to judge, at most {MOST_WINDOWS:,}; send less at once"
            )
        return Question(tuple(named), tuple(texts), thresholds, False, sum(map(len, turns)))

    def places(self, text: str, owners: Collection[str]) -> list[tuple[int, int]]:
        """Where a text plainly names the subjects of some loaded sets: [start, end) in characters."""
        thresholds = dict.fromkeys(owners, NAME_SCORE)
        return sorted({(each.start, each.end) for each in self._aliased.verdicts([View(text, "plain", 0, len(text))], thresholds)})

    def spoken(self, passage: str, thresholds: Mapping[str, float]) -> Question:
        """Read a passage of an answer, to know which sets it gives away. Raises EncoderUnavailable, as `asked`."""
        self._check(thresholds)
        views = readings(passage)
        texts = _pieces(visible(passage))
        texts += [text for view in views[1:] if _worth_reading(view, passage) for text in _pieces(view.text)]
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
                    near.append(Verdict(owner, "similarity", score, threshold, question.texts[which], "plain", 0, question.length))
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
        """Where in ``text`` a phrase begins that what follows could complete; its length if none does."""
        return self._phrased.names.open_from(text)


class _Named:
    """Names and whose they are."""

    def __init__(self, owners: Mapping[str, Sequence[str]]) -> None:
        self._owners = owners
        self.names = Names(owners)

    def verdicts(self, views: Sequence[View], asked: Mapping[str, float]) -> list[Verdict]:
        found: list[Verdict] = []
        plainly: set[str] = set()
        for view in views:
            plain, whole = view.how == "plain", view.start == 0 and view.end == len(views[0].text)
            for hit in self.names.find(view.text):
                if plain:
                    plainly.add(hit.key)
                elif whole and hit.key in plainly:
                    continue  # the text read in another way, of which nobody knows where the name is: it stands there anyway
                start, end = (hit.start, hit.end) if plain else (view.start, view.end)
                found += [
                    Verdict(owner, "name", NAME_SCORE, NAME_SCORE, view.text[hit.start : hit.end], view.how, start, end)
                    for owner in self._owners[hit.key]
                    if owner in asked
                ]
        return found


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


def _worth_reading(view: View, original: str) -> bool:
    """Whether a reading could be meant: of a text that was turned, only where that makes words of it."""
    turned = view.how.endswith(("rot13", "backwards"))
    return reads_better(original[view.start : view.end], view.text) if turned else " " in view.text.strip()
