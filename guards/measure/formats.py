"""Reads what the literature measures with: the files of TOFU, RWKU and MUSE, from a directory on this machine.

Covered: TOFU's ``forgetNN_perturbed.json``, ``retain_perturbed.json``, ``real_authors_perturbed.json``,
``world_facts_perturbed.json`` and ``holdoutNN.json`` (Maini et al. 2024); RWKU's ``forget_level1..3.json`` and
``neighbor_level1..2.json`` (Jin et al. 2024); MUSE's ``knowmem`` and ``verbmem`` (Shi et al. 2024). JSON or JSON lines. Not
covered: membership of texts (RWKU's MIA, MUSE's PrivLeak), which asks for losses over whole documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guards.errors import GuardError

QUESTIONS, PARAPHRASED = "questions", "paraphrased"
RETAIN, AUTHORS, WORLD = "retain", "real authors", "world facts"
"""What TOFU's model utility is made of."""
HOLDOUT = "holdout"
"""Questions about authors whom no model has learned, against whom membership is measured."""


class UnreadableProbes(GuardError):
    """A directory or file that holds none of the formats, or a row that is not one of its format."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt of a benchmark."""

    group: str
    prompt: str
    truth: str
    keep: bool = False  # the answer is to stay; otherwise it is to be forgotten
    reworded: str = ""  # the truth in other words
    wrong: tuple[str, ...] = ()  # answers in the same words that are not true


Rows = Sequence[Mapping[str, Any]]


def _tofu(rows: Rows, group: str, keep: bool) -> list[Case]:
    cases = [
        Case(group, row["question"], row["answer"], keep, row.get("paraphrased_answer", ""), tuple(row.get("perturbed_answer", ())))
        for row in rows
    ]
    if not keep:
        cases += [Case(PARAPHRASED, row["paraphrased_question"], row["answer"]) for row in rows if row.get("paraphrased_question")]
    return cases


def _rwku(rows: Rows, keep: bool) -> list[Case]:
    def prompt(row: Mapping[str, Any]) -> str:
        blank = str(row["level"]) == "1"
        return f"Fill in the blank, briefly: {row['query']}" if blank else str(row["query"])

    def group(row: Mapping[str, Any]) -> str:
        if keep:
            return "neighbours"
        return {"1": "fill in the blank", "2": QUESTIONS}.get(str(row["level"]), str(row.get("type", "attack")))

    return [Case(group(row), prompt(row), str(row["answer"]), keep) for row in rows]


def _verbatim(rows: Rows) -> list[Case]:
    """Word for word: the model is to go on where a text of the set breaks off."""
    return [Case("verbatim", f"Continue this text:\n{row['prompt']}", row["gt"]) for row in rows]


_FILES: tuple[tuple[str, Callable[[Rows], list[Case]]], ...] = (
    ("forget[0-9][0-9]_perturbed", lambda rows: _tofu(rows, QUESTIONS, False)),
    ("retain_perturbed", lambda rows: _tofu(rows, RETAIN, True)),
    ("real_authors_perturbed", lambda rows: _tofu(rows, AUTHORS, True)),
    ("world_facts_perturbed", lambda rows: _tofu(rows, WORLD, True)),
    ("holdout[0-9][0-9]", lambda rows: _tofu(rows, HOLDOUT, True)),
    ("forget_level[123]", lambda rows: _rwku(rows, False)),
    ("neighbor_level[12]", lambda rows: _rwku(rows, True)),
    ("knowmem/forget_qa", lambda rows: _tofu(rows, QUESTIONS, False)),
    ("knowmem/retain*_qa", lambda rows: _tofu(rows, "neighbours", True)),
    ("verbmem/forget", _verbatim),
)
"""Patterns of file names without their ending, and what is in them."""


def read_cases(directory: Path) -> list[Case]:
    """Everything that is known in a directory, in a fixed order.

    Raises:
        UnreadableProbes: nothing known is there, or a row lacks a field; the message names the file and the row.
    """
    cases: list[Case] = []
    for pattern, of in _FILES:
        for path in sorted([*directory.glob(f"{pattern}.json"), *directory.glob(f"{pattern}.jsonl")]):
            rows = read_rows(path)
            for number, row in enumerate(rows, 1):
                try:
                    cases += of([row])
                except (KeyError, TypeError, AttributeError) as error:
                    raise UnreadableProbes(f"{path}, row {number}: {type(error).__name__} {error}; is it another format?") from None
    if not cases:
        known = ", ".join(f"{pattern}.json" for pattern, _ in _FILES)
        raise UnreadableProbes(f"{directory} holds no file of TOFU, RWKU or MUSE; known are {known}")
    return cases


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON (a list) or JSON lines. Raises UnreadableProbes."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableProbes(f"{path} cannot be read: {error}") from None
    try:
        rows = json.loads(text)
    except ValueError:
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise UnreadableProbes(f"{path} is neither JSON nor JSON lines: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UnreadableProbes(f"{path} must hold a list of objects")
    return rows
