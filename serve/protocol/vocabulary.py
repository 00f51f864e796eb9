"""A tokenizer's bytes, the same in the API process (which compiles phrases) and in the engine (which masks tokens)."""

from __future__ import annotations

from typing import Any

from guards.errors import VocabularyMismatch
from guards.suppression.vocabulary import Vocabulary

_SAMPLES = ("The quick brown fox's 12 jumps.", "na\u00efve \u00c9cole \u0414\u043e\u043c \u4e2d\u6587 \U0001f600", "a\tb\n  c")


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Read the bytes of every token from a Hugging Face tokenizer.

    Args:
        tokenizer: a transformers tokenizer (byte-level BPE or SentencePiece with byte fallback).
        size: rows of the model's output; ids beyond the tokenizer count as having no text.

    Raises:
        VocabularyMismatch: the bytes do not reproduce what the tokenizer decodes, so phrases could not be matched exactly.
    """
    import xgrammar  # heavy, and needed only where a model is loaded

    try:
        token_bytes = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size).decoded_vocab
    except (ValueError, TypeError) as error:
        raise VocabularyMismatch(
            f"cannot read the bytes of {type(tokenizer).__name__}: {error}; lethe needs a Hugging Face fast tokenizer"
        ) from error
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < size}
    special |= {i for i in tokenizer.all_special_ids if i < size}
    texts = [bytes(text) for text in token_bytes][:size]
    texts += [b""] * (size - len(texts))
    for sample in _SAMPLES:
        ids = tokenizer.encode(sample, add_special_tokens=False)
        joined = b"".join(texts[i] for i in ids)
        decoded = tokenizer.decode(ids)
        if joined.decode("utf-8", "replace").lstrip(" ") != decoded.lstrip(" "):
            raise VocabularyMismatch(
                f"tokens of {decoded!r} spell {joined!r}: this tokenizer changes text while decoding, "
                "so suppression could not be exact; use a model with a byte-level or byte-fallback tokenizer"
            )
    return Vocabulary(texts, sorted(special))
