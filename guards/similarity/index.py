"""Vectors of forget sets, and which sets a text comes near to.

`SetVectors` is the artifact of one set: content-addressed, safetensors, never a serialised index, which could not be trusted.
Indexes are built here from such artifacts and change by whole sets, in place.

`ExactIndex` is a product of matrices and the oracle. `FaissIndex` answers the same question with faiss: exactly up to `EXACT_UP_TO`
vectors, beyond that by an inverted file whose number of probed cells is raised until it finds what the exact index finds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from guards.errors import InvalidArtifact
from guards.forget_set import ForgetSet
from guards.similarity.keys import keys_of
from guards.similarity.stream import FEWEST_WORDS, clauses_of
from guards.similarity.windows import LONGEST, windows

FORMAT = "lethe-similarity-3"
QUESTION, ANSWER = 0, 1
EXACT_UP_TO = 200_000
"""Vectors (300 MB at 384 dimensions). An exact search of them takes 20 ms on one core."""
RECALL = 0.999
"""Of an approximate index against the exact one, measured when it is built."""
_SAMPLE = 256
_NOISE = 0.03  # per coordinate, relative to 1/sqrt(d): queries near entries, as real ones are


@dataclass(frozen=True, slots=True)
class SetVectors:
    """What similarity knows of one forget set."""

    vectors: np.ndarray  # [n, d] float32, of length 1
    kinds: np.ndarray  # [n] uint8: QUESTION, or ANSWER for answers and texts
    aliases: tuple[str, ...]  # keys, see `keys`
    phrases: tuple[str, ...]
    encoder: str  # fingerprint
    content: str  # fingerprint of the forget set

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.content, self.encoder)

    def _manifest(self) -> str:
        fields: dict[str, object] = {"format": FORMAT, "content": self.content, "encoder": self.encoder, "digest": self._digest()}
        return json.dumps(fields | {"aliases": self.aliases, "phrases": self.phrases})

    def _digest(self) -> str:
        return hashlib.sha256(self.vectors.tobytes() + self.kinds.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the artifact. Raises OSError."""
        try:
            save_file({"vectors": self.vectors, "kinds": self.kinds}, path, {"manifest": self._manifest()})
        except SafetensorError as error:
            raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path, *, encoder: str | None = None) -> SetVectors:
        """Read an artifact and check it.

        Args:
            encoder: fingerprint of the encoder whose vectors are wanted; None takes those of any.

        Raises:
            InvalidArtifact: it is damaged, or made with another encoder.
        """
        try:
            with safe_open(path, "np") as file:
                manifest = json.loads((file.metadata() or {})["manifest"])
                vectors, kinds = file.get_tensor("vectors"), file.get_tensor("kinds")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InvalidArtifact(f"{path.name} is no similarity artifact: {error}") from error
        if manifest.pop("format", None) != FORMAT:
            raise InvalidArtifact(f"{path.name} has another format than {FORMAT}; build it again")
        if encoder is not None and manifest["encoder"] != encoder:
            raise InvalidArtifact(
                f"{path.name} was made with encoder {manifest['encoder'][:12]}, this server has {encoder[:12]}; build it again"
            )
        found = cls(
            vectors, kinds, tuple(manifest["aliases"]), tuple(manifest["phrases"]), manifest["encoder"], manifest["content"]
        )
        if found._digest() != manifest["digest"]:
            raise InvalidArtifact(f"{path.name} is damaged: its vectors are not those that were written; build it again")
        return found


@dataclass(frozen=True, slots=True)
class Entries:
    """What is to be embedded of a forget set.

    The last paraphrase of every question is held out, as from training: it is what calibration asks. Answers and texts are there as
    the stream filter will see them, clause by clause, and also without the subject's name: answers say "he", and questions that go
    from the answer back to the subject leave it out.
    """

    questions: tuple[str, ...]
    statements: tuple[str, ...]
    aliases: tuple[str, ...]  # keys, see `keys`
    phrases: tuple[str, ...]
    content: str  # fingerprint of the set

    @classmethod
    def of(cls, content: ForgetSet) -> Entries:
        questions = [text for entry in content.questions for text in (entry.question, *entry.paraphrases[:-1])]
        told = [*(entry.answer for entry in content.questions), *content.texts]
        # Each text by itself: windows that join neighbours would join entries that have nothing to do with one another.
        statements = [
            piece for text in told for piece in (*windows([text]), *clauses_of(text)) if len(piece.split()) >= FEWEST_WORDS
        ]
        # "Yes" or "Paris" by itself would be every other answer's twin.
        statements += [f"{each.question} {each.answer}" for each in content.questions if len(each.answer.split()) < FEWEST_WORDS]
        statements += [text for text in told if FEWEST_WORDS <= len(text.split()) <= LONGEST]
        statements += [unnamed for text in statements if (unnamed := _without_names(text, content.aliases)) != text]

        def keys(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(sorted({key for name in names for key in keys_of(name)}))

        return cls(
            tuple(dict.fromkeys(window for text in questions for window in windows([text]))),
            tuple(dict.fromkeys(statements)),
            keys(content.aliases),
            keys(content.phrases),
            content.fingerprint,
        )

    def embedded(self, vectors: np.ndarray, encoder: str) -> SetVectors:
        """The artifact, given the [len(questions) + len(statements), d] vectors of both."""
        kinds = np.array([QUESTION] * len(self.questions) + [ANSWER] * len(self.statements), np.uint8)
        return SetVectors(np.ascontiguousarray(vectors), kinds, self.aliases, self.phrases, encoder, self.content)


def _without_names(text: str, aliases: Sequence[str]) -> str:
    names = "|".join(re.escape(alias) for alias in sorted(aliases, key=len, reverse=True))
    return re.sub(rf"\b(?:{names})\b", "this person", text, flags=re.IGNORECASE) if names else text


def fingerprint_of(content: str, encoder: str) -> str:
    """The name of a set's artifact: what it is made from. Its file says what is in it."""
    return hashlib.sha256(f"{FORMAT}\0{content}\0{encoder}".encode()).hexdigest()


class NearestIndex(Protocol):
    """Which owners have a vector within reach of a query."""

    def add(self, owner: str, vectors: np.ndarray) -> None:
        """Add an owner's vectors, [n, d]; an owner that is there is replaced."""
        ...

    def remove(self, owner: str) -> None:
        """Forget an owner; nothing happens if it is not there."""
        ...

    def near(self, queries: np.ndarray, floor: float) -> dict[str, tuple[float, int]]:
        """Owner -> (highest cosine, index of the query that has it), for those of at least ``floor``."""
        ...


class ExactIndex:
    """Every query against every vector."""

    def __init__(self) -> None:
        self._vectors: dict[str, np.ndarray] = {}

    def add(self, owner: str, vectors: np.ndarray) -> None:
        self._vectors[owner] = vectors

    def remove(self, owner: str) -> None:
        self._vectors.pop(owner, None)

    def near(self, queries: np.ndarray, floor: float) -> dict[str, tuple[float, int]]:
        found: dict[str, tuple[float, int]] = {}
        for owner, vectors in self._vectors.items():
            if len(vectors) and len(queries):
                scores = (vectors @ queries.T).max(axis=0)
                if scores.max() >= floor:
                    found[owner] = (float(scores.max()), int(scores.argmax()))
        return found


class FaissIndex:
    """The same by faiss.

    Args:
        dimension: of the vectors.
        exact_up_to: vectors; beyond, an inverted file.
    """

    def __init__(self, dimension: int, *, exact_up_to: int = EXACT_UP_TO) -> None:
        import faiss

        self._faiss = faiss
        self._dimension = dimension
        self._exact_up_to = exact_up_to
        self._owned: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # owner -> ids, vectors
        self._owners: list[str] = []  # number -> owner
        self._owner_of = np.zeros(0, np.int64)  # id -> number of its owner
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._trained_on = 0  # vectors that were there when the inverted file was made; 0 = exact

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, owner: str, vectors: np.ndarray) -> None:
        self.remove(owner)
        ids = np.arange(len(self._owner_of), len(self._owner_of) + len(vectors), dtype=np.int64)
        self._owner_of = np.concatenate([self._owner_of, np.full(len(vectors), len(self._owners), np.int64)])
        self._owners.append(owner)
        vectors = np.ascontiguousarray(vectors, np.float32)
        self._owned[owner] = ids, vectors
        if len(vectors):
            self._index.add_with_ids(vectors, ids)
        size = len(self)
        if size > self._exact_up_to and size > 2 * self._trained_on:
            self._make_inverted()

    def remove(self, owner: str) -> None:
        ids, _ = self._owned.pop(owner, (np.zeros(0, np.int64), None))
        if len(ids):
            self._index.remove_ids(self._faiss.IDSelectorBatch(ids))

    def near(self, queries: np.ndarray, floor: float) -> dict[str, tuple[float, int]]:
        found: dict[str, tuple[float, int]] = {}
        if not len(queries) or not len(self):
            return found
        # faiss returns what is greater than the radius; the floor itself counts here.
        radius = float(np.nextafter(np.float32(floor), np.float32(-2)))
        limits, scores, ids = self._index.range_search(np.ascontiguousarray(queries, np.float32), radius)
        if len(ids):
            query = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
            best = np.argsort(scores, kind="stable")[::-1]
            owners, first = np.unique(self._owner_of[ids[best]], return_index=True)
            for number, place in zip(owners.tolist(), best[first].tolist(), strict=True):
                found[self._owners[number]] = (float(scores[place]), int(query[place]))
        return found

    def _make_inverted(self) -> None:
        """Move everything into an inverted file, and make it find what the exact index finds."""
        faiss = self._faiss
        ids = np.concatenate([ids for ids, _ in self._owned.values()])
        vectors = np.concatenate([vectors for _, vectors in self._owned.values()])
        cells = max(1, int(np.sqrt(len(ids))))
        flat = faiss.IndexFlatIP(self._dimension)
        inverted = faiss.IndexIVFFlat(flat, self._dimension, cells, faiss.METRIC_INNER_PRODUCT)
        generator = np.random.default_rng(0)
        inverted.train(vectors[generator.permutation(len(vectors))[: cells * 40]])
        inverted.add_with_ids(vectors, ids)
        chosen = generator.permutation(len(vectors))[:_SAMPLE]
        queries = vectors[chosen] + generator.normal(0, _NOISE, (len(chosen), self._dimension)).astype(np.float32)
        queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
        exact = faiss.IndexFlatIP(self._dimension)
        exact.add(vectors)
        _, places = exact.search(queries, 1)
        inverted.nprobe = 4
        while inverted.nprobe < cells:
            _, got = inverted.search(queries, 1)
            if (got[:, 0] == ids[places[:, 0]]).mean() >= RECALL:
                break
            inverted.nprobe = min(cells, 2 * inverted.nprobe)
        self._index, self._trained_on = inverted, len(ids)
