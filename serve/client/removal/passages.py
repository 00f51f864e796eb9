"""Passages of the true answers that can be taken as phrases, where other guards let them out: suppression is exact.

A passage is a stretch of an answer with `guards.measure.recall.VERBATIM` content words, the fewest that count as repeated word for
word. It can be taken if it is the subject's own: one of its content words is neither in the questions nor in what the model says
about anybody else, and the whole of it occurs neither there nor in ordinary text.

Covered: sampled answers and every prompt, since suppression reads no prompts. Not covered: the same fact in other words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from guards.measure.recall import CONTENT, VERBATIM, words_of
from guards.ordinary import ordinary_counts

_WORDS = re.compile(r"[^\W_]+")


def own_passages(answers: Iterable[str], others: Sequence[str]) -> tuple[str, ...]:
    """The passages of ``answers``, as they stand there, without repetition.

    Args:
        others: what may be said: questions, and answers about others.
    """
    said = [" ".join(words_of(text)) for text in others]
    known = {word for text in said for word in text.split()}
    everything = "\n".join(f" {text} " for text in said)
    found: dict[str, str] = {}
    for answer in answers:
        words = [(match.start(), match.end(), match[0].lower()) for match in _WORDS.finditer(answer)]
        content = [i for i, (_, _, word) in enumerate(words) if len(word) >= CONTENT]
        for first, last in zip(content, content[VERBATIM - 1 :], strict=False):
            mine = [word for _, _, word in words[first : last + 1]]
            own = any(len(word) >= CONTENT and word not in known for word in mine)
            if own and f" {' '.join(mine)} " not in everything:
                found.setdefault(" ".join(mine), answer[words[first][0] : words[last][1]])
    passages = list(found.values())
    return tuple(each for each, count in zip(passages, ordinary_counts(passages), strict=True) if not count.total)
