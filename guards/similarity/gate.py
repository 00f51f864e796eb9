"""The gate: does a conversation touch a forget set?

Two signals, either of which is a hit. A *name* of the set (alias or phrase) stands in the text, or in what the text decodes to. The
*meaning* of a window of the text is near an entry of the set: cosine at least the set's threshold.

Covered: every turn, all of a long prompt, short turns together, disguises (`disguise`). Not covered: a subject that is neither
named nor described; languages that the encoder does not know (the bundled one knows English; names match in any); pictures and
sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guards.similarity.disguise import View, readings, reads_better, visible
from guards.similarity.encoder import EncoderUnavailable
from guards.similarity.index import ANSWER, FaissIndex, SetVectors
from guards.similarity.skeleton import Names
from guards.similarity.windows import windows

NAME_SCORE = 1.0

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
        self._loaded = dict(sets)
        if gone or new:
            phrased: dict[str, list[str]] = {}
            aliased: dict[str, list[str]] = {}
            for owner, entries in self._loaded.items():
                for key in entries.phrases:
                    phrased.setdefault(key, []).append(owner)
                for key in {*entries.aliases, *entries.phrases}:
                    aliased.setdefault(key, []).append(owner)
            self._phrased, self._aliased = _Named(phrased), _Named(aliased)

    def asked(self, turns: Sequence[str], thresholds: Mapping[str, float]) -> Question:
        """Read a conversation, to know which sets among ``thresholds`` it touches.

        Raises:
            EncoderUnavailable: one of them is not loaded, so that it would silently never be hit.
        """
        self._check(thresholds)
        named: list[Verdict] = []
        texts = windows([visible(turn) for turn in turns])
        for turn in turns:
            views = readings(turn)
            named += self._aliased.verdicts(views, thresholds)
            texts += [text for view in views[1:] if _worth_reading(view, turn) for text in windows([view.text])]
        return Question(tuple(named), tuple(dict.fromkeys(texts)), thresholds, False, sum(map(len, turns)))

    def spoken(self, passage: str, thresholds: Mapping[str, float]) -> Question:
        """Read a passage of an answer, to know which sets it gives away. Raises EncoderUnavailable, as `asked`."""
        self._check(thresholds)
        views = readings(passage)
        texts = [visible(passage).strip()] + [
            text for view in views[1:] if _worth_reading(view, passage) for text in windows([view.text])
        ]
        named = self._phrased.verdicts(views, thresholds)
        return Question(tuple(named), tuple(dict.fromkeys(filter(None, texts))), thresholds, True, len(passage))

    def answer(self, question: Question, vectors: np.ndarray) -> list[Verdict]:
        """What a text touches, given the [len(question.texts), d] embeddings of its windows.

        Of a conversation, each set once, by a name if there is one. Of a passage, every place.
        """
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


def _worth_reading(view: View, original: str) -> bool:
    """Whether a reading could be meant: of a text that was turned, only where that makes words of it."""
    turned = view.how.endswith(("rot13", "backwards"))
    return reads_better(original[view.start : view.end], view.text) if turned else " " in view.text.strip()
