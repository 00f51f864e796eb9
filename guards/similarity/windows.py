"""What is embedded: sentences, and short ones together.

One vector for a long text says what most of it is about; a single question in its middle disappears (measured: cosine .46 where the
question alone has .91; pooling its tokens out of the long text's states, .64). So every sentence is embedded by itself. What is
spread over several short sentences or turns ("There is a writer." "Born in Kuwait City." "1956. Who?") is seen by joining them.
Sentences that no encoder takes whole are cut into overlapping pieces. Nothing is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 60
"""Words of a window, about 80 tokens: the encoders' own limit is 128 or more, and longer ones say less."""
SHORT = 12
"""Words. Neighbours are joined where both are shorter than this."""
JOINED = 30
"""Words of a joined window, at most."""
MOST_LETTERS = 8
"""Characters for one word of a window, where there are more: encoders count tokens."""
_END = re.compile(r"(?<![.!?…؟])[.!?…؟]+[\"'”’)\]]{0,8}(?=\s)|[。！？]|(?<=\s)/{1,2}(?=\s)|\n")  # noqa: RUF001
_INITIAL = re.compile(r"(?:\b\w|\b(?:Mr|Mrs|Ms|Dr|St|Prof|No|vs|etc|e\.g|i\.e))\.\Z")


def sentences(text: str) -> list[str]:
    """Split at sentence ends and line breaks, also where a slash stands for one; abbreviations and initials do not end a sentence.

    White space at the ends is dropped.
    """
    found, start = [], 0
    for end in _END.finditer(text):
        if end[0] == "." and _INITIAL.search(text, max(start, end.end() - 8), end.end()):
            continue
        if piece := text[start : end.end()].strip():
            found.append(piece)
        start = end.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


def windows(turns: Sequence[str]) -> list[str]:
    """Everything to embed of a conversation, each once.

    A window depends only on its own sentences, so a conversation that grows keeps the windows it had, and a cache knows them.
    """
    pieces = [piece for turn in turns for sentence in sentences(turn) for piece in _cut(sentence)]
    found = dict.fromkeys(pieces)
    # By words; where there are no spaces, by characters, of which a word has about eight.
    lengths = [max(len(piece.split()), len(piece) // MOST_LETTERS) for piece in pieces]
    for i in range(len(pieces)):
        total, j = lengths[i], i + 1
        while j < len(pieces) and lengths[j - 1] < SHORT and lengths[j] < SHORT and total + lengths[j] <= JOINED:
            total += lengths[j]
            j += 1
        if j > i + 1 and not (i and lengths[i - 1] < SHORT and lengths[i] < SHORT and total + lengths[i - 1] <= JOINED):
            found[" ".join(pieces[i:j])] = None
    return list(found)


def _cut(sentence: str) -> list[str]:
    words = sentence.split()
    if len(words) <= LONGEST:
        most = LONGEST * MOST_LETTERS  # a text without spaces is one word
        return [sentence] if len(sentence) <= most else [sentence[i : i + most] for i in range(0, len(sentence), most // 2)]
    step = LONGEST // 2
    return [" ".join(words[i : i + LONGEST]) for i in range(0, max(1, len(words) - step), step)]
