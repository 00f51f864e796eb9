"""What one decoding step of suppression costs, without a model: milliseconds of the guard alone, by phrases, rows and kind of text.

    python -m tests.bench.suppression_step MODEL

MODEL is a directory with a tokenizer. Phrases are made of three words of the vocabulary; texts are made of its tokens: words, words
and white space, and Chinese characters of which each byte is a token. One thread. Milliseconds are the median of the turns; compile
times are of one turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from guards.suppression.automaton import compile_phrases
from guards.suppression.guard import SuppressionGuard
from guards.suppression.vocabulary import Vocabulary
from guards.types import Plan, Rows
from serve.protocol.vocabulary import vocabulary_of
from tests.plans import suppress, suppression_guard

CHINESE = "今天的天气非常好我们一起去公园散步看看花草树木然后回家做饭吃晚餐"


def phrases_of(vocabulary: Vocabulary, count: int, seed: int) -> list[str]:
    """Phrases of three words each."""
    words = [
        text.strip().decode()
        for text in (vocabulary.text_of([token]) for token in range(vocabulary.size))
        if len(text) > 4 and text.startswith(b" ") and text.strip().isalpha()
    ]
    generator = np.random.default_rng(seed)
    return [" ".join(words[i] for i in row) for row in generator.integers(0, len(words), (count, 3))]


def texts_of(vocabulary: Vocabulary, kind: str, rows: int, width: int) -> torch.Tensor:
    """[rows, width] token ids."""
    generator = np.random.default_rng(7)
    if kind == "chinese bytes":
        single = {vocabulary.text_of([token]): token for token in range(vocabulary.size) if vocabulary.lengths[token] == 1}
        spelled = [single[bytes([byte])] for byte in CHINESE.encode()]
        starts = generator.integers(0, len(spelled), rows)
        return torch.tensor([[spelled[(start + i) % len(spelled)] for i in range(width)] for start in starts.tolist()])
    words = np.array([i for i in range(vocabulary.size) if vocabulary.text_of([i]).startswith(b" ") and vocabulary.lengths[i] > 3])
    chosen = generator.choice(words, (rows, width))
    if kind == "much white space":
        white = np.array([i for i in range(vocabulary.size) if vocabulary.lengths[i] and not vocabulary.text_of([i]).strip()])
        chosen = np.where(generator.random((rows, width)) < 0.5, generator.choice(white, (rows, width)), chosen)
    return torch.from_numpy(chosen)


def step_ms(guard: SuppressionGuard, suffix: torch.Tensor, plans: Sequence[Plan], turns: int) -> float:
    rows = Rows(plan=torch.zeros(len(suffix), dtype=torch.long), suffix=suffix[:, -guard.window_tokens :])
    logits = torch.zeros(len(suffix), guard.vocabulary.size)
    times = []
    for _ in range(turns):
        started = time.perf_counter()
        guard.apply(logits, rows, plans)
        times.append(1_000 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 1_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    table = Table("phrases", "compiled in, s", "text", *(f"{rows} rows, ms" for rows in options.rows))
    for count in options.phrases:
        started = time.perf_counter()
        artifact = compile_phrases(phrases_of(vocabulary, count, 1), vocabulary)
        seconds = time.perf_counter() - started
        guard = suppression_guard(vocabulary, artifact)
        for kind in ("english", "much white space", "chinese bytes"):
            plans = [Plan(1, "p", suppress(artifact.fingerprint))]
            figures = [
                step_ms(guard, texts_of(vocabulary, kind, rows, guard.window_tokens), plans, options.turns) for rows in options.rows
            ]
            table.add_row(f"{count:,}", f"{seconds:.2f}", kind, *(f"{figure:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
