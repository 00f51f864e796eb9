"""Compiled phrases: the artifact that the suppression guard runs on, and the scanner of whole texts. `automaton` makes it.

Not covered: see the package.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from guards.errors import InvalidArtifact
from guards.suppression.elements import code_points
from guards.suppression.folding import (
    LEFT_BOUNDARY_KEY,
    Folding,
    Match,
    folding,
    powers,
    symbol_hashes,
)

FORMAT = "lethe-phrases-2"


@dataclass(frozen=True)
class Ranges:
    """Ragged lists of ranges over sorted tokens: list ``i`` is ``low/high[starts[i]:starts[i + 1]]``."""

    starts: np.ndarray  # [N + 1] int64
    low: np.ndarray  # [M] int32
    high: np.ndarray  # [M] int32, exclusive


@dataclass(frozen=True, eq=False)
class CompiledPart:
    """The phrases of one folding. Lists 0 and 1 of ``ranges`` are the tokens banned always, and after a word boundary; the list of
    ``keys[i]`` is ``i + 2``. Hashes of phrases that may start at a word boundary only have `LEFT_BOUNDARY_KEY` added."""

    match: Match
    fold_case: bool
    window: int  # how many symbols back a step has to look
    keys: np.ndarray  # [N] uint64 ascending, hashes of first parts
    ranges: Ranges
    stem_keys: np.ndarray  # [S] uint64 ascending, hashes of phrases without their last symbols
    phrase_keys: np.ndarray  # [P] uint64 ascending, hashes of the whole phrases in all spellings
    phrase_lengths: np.ndarray  # [D] int32, the distinct lengths in symbols

    @property
    def by(self) -> Folding:
        return folding(self.match, self.fold_case)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Every occurrence of a phrase in ``text`` as (start, end) in characters, ordered by start."""
        by = self.by
        places = by.read(text)
        elements = code_points(text)[places]
        symbols, owner = by.expand(elements)
        count = len(symbols)
        if not count or not len(self.phrase_keys):
            return []
        change = np.flatnonzero(np.diff(owner, prepend=-1, append=-1))
        opens, closes = np.zeros(count + 1, dtype=bool), np.zeros(count + 1, dtype=bool)
        opens[change[:-1]] = closes[change[1:]] = True
        row = torch.from_numpy(elements.astype(np.int64))[None]
        words = by.on(row.device).words(row, torch.ones_like(row, dtype=torch.bool))[0].numpy()
        at_boundary = np.concatenate([[True], ~words])[owner]
        with np.errstate(over="ignore"):
            terms = symbol_hashes()[symbols] * powers(count, inverse=True)
            sums = np.concatenate([[np.uint64(0)], np.cumsum(terms, dtype=np.uint64)])
            found: set[tuple[int, int]] = set()
            for length in self.phrase_lengths.tolist():
                if length > count:
                    continue
                hashes = (sums[length:] - sums[:-length]) * powers(count)[length - 1 :]
                last = count - length + 1
                hit = contains(self.phrase_keys, hashes)
                hit |= contains(self.phrase_keys, hashes + np.uint64(LEFT_BOUNDARY_KEY)) & at_boundary[:last]
                hit &= opens[:last] & closes[length:]
                found |= {(int(places[owner[start]]), int(places[owner[start + length - 1]]) + 1) for start in np.flatnonzero(hit)}
        return sorted(found)


_PART_TENSORS = ("keys", "range_starts", "range_low", "range_high", "stem_keys", "phrase_keys", "phrase_lengths")


@dataclass(frozen=True, eq=False)
class CompiledPhrases:
    """The artifact of one forget set's phrases."""

    fingerprint: str
    vocabulary: str  # fingerprint of the vocabulary it was compiled against
    phrase_count: int
    parts: tuple[CompiledPart, ...]

    def find(self, text: str) -> list[tuple[int, int]]:
        """Every occurrence of a phrase in ``text`` as (start, end) in characters, ordered by start.

        This is the guard's definition of "appears", for reports and for checking finished text.
        """
        return sorted({place for part in self.parts for place in part.find(text)})

    @property
    def summary(self) -> str:
        """What it holds, for people."""
        return f"{self.phrase_count:,} phrases"

    def open_from(self, text: str) -> int:
        """Where in a text a phrase may begin at the earliest that what follows could complete."""
        opened = len(text)
        for part in self.parts:
            places = part.by.read(text)
            # All but one of the longest phrase's symbols may be there; one more, since the text before this one is not looked at.
            symbols = int(part.phrase_lengths.max(initial=0))
            if symbols:
                opened = min(opened, int(places[-symbols]) if len(places) > symbols else 0)
        return opened

    def end_of(self, text: str) -> str:
        """As much of the end of a text as phrases that go on after it may need, without characters that do not count anyway."""
        wanted: set[int] = set()
        for part in self.parts:
            # One more, for the letter before a phrase.
            wanted.update(part.by.read(text)[-(int(part.phrase_lengths.max(initial=0)) + 1) :].tolist())
        return "".join(text[place] for place in sorted(wanted))

    def save(self, path: Path) -> None:
        """Write to ``path`` (the caller makes it atomic)."""
        tensors: dict[str, np.ndarray] = {}
        for number, part in enumerate(self.parts):
            columns = (part.keys, part.ranges.starts, part.ranges.low, part.ranges.high, part.stem_keys, part.phrase_keys)
            for name, column in zip(_PART_TENSORS, (*columns, part.phrase_lengths), strict=True):
                tensors[f"{number}.{name}"] = column.view(np.int64) if column.dtype == np.uint64 else column
        header: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary,
            "phrase_count": self.phrase_count,
            "parts": [[part.match, part.fold_case, part.window] for part in self.parts],
        }
        header["content"] = _content_digest(tensors, header)
        path.write_bytes(save(tensors, metadata={"lethe": json.dumps(header)}))

    @staticmethod
    def load(path: Path) -> CompiledPhrases:
        """Read what `save` wrote.

        Raises:
            InvalidArtifact: missing, truncated, altered, or not of this kind and version.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("lethe", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InvalidArtifact(
                f"{path} cannot be read as compiled phrases ({error}); restart the server to have it rebuilt"
            ) from error
        if header.get("format") != FORMAT:
            raise InvalidArtifact(f"{path} has format {header.get('format')!r}, this version reads {FORMAT!r}; rebuild it")
        if header.pop("content", None) != _content_digest(tensors, header):
            raise InvalidArtifact(f"{path} was altered after it was written; restart the server to have it rebuilt")
        parts = []
        for number, (match, fold_case, window) in enumerate(header["parts"]):
            column = {name: tensors[f"{number}.{name}"] for name in _PART_TENSORS}
            parts.append(
                CompiledPart(
                    match=match,
                    fold_case=fold_case,
                    window=window,
                    keys=column["keys"].view(np.uint64),
                    ranges=Ranges(column["range_starts"], column["range_low"], column["range_high"]),
                    stem_keys=column["stem_keys"].view(np.uint64),
                    phrase_keys=column["phrase_keys"].view(np.uint64),
                    phrase_lengths=column["phrase_lengths"],
                )
            )
        return CompiledPhrases(header["fingerprint"], header["vocabulary"], header["phrase_count"], tuple(parts))


def contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    position = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[position] == values


def _content_digest(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
