"""Which disguises of a name the gate and the stream filter see through, and how often either finds a name that is not there.

    python -m tests.bench.disguises [--data TOFU] [--markdown FILE]

Each disguise is applied to each of `NAMES` that it can be applied to, inside a prompt and inside an answer. Answers are held back
as the server does it, one character a token. Nothing is embedded: only names are asked about. No server and no model are needed.
Ordinary texts: the general prompts of this repository and, with ``--data``, everything in TOFU's files; a name that stands in a
text is not counted for it.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import guards
from guards.forget_set import ForgetSet
from guards.similarity.gate import Gate
from guards.similarity.index import Entries
from guards.similarity.stream import AnswerBuffer, Token
from tests.disguises import DISGUISES, NOT_READ, Disguise

NAMES = (
    "Harry Potter",
    "Basil Mahfouz Al-Kuwaiti",
    "Łukasz Wójcik",
    "Johanna van der Berg",
    "Гарри Поттер",
    "Paul",
    "哈利波特",
    "김민수",
    "أحمد القاسم",
)
PROMPTS = Path(__file__).with_name("prompts")
GENERAL = Path(guards.__file__).with_name("general.jsonl")
COMMON = tuple((PROMPTS / "names.txt").read_text("utf-8").split("\n")[:-1])
"""About 200 common names, many of them short."""


def gate_of(names: Sequence[str]) -> Gate:
    """A gate with one set for each name, called like it, and no vectors."""
    gate = Gate(4)
    sets = {}
    for name in names:
        entries = Entries.of(ForgetSet(name="set", aliases=(name,), phrases=(name,)))
        sets[name] = entries.embedded(np.zeros((0, 4), np.float32), "none")
    gate.load(sets)
    return gate


def asked(gate: Gate, text: str) -> set[str]:
    """The names that the gate finds in a prompt."""
    return {verdict.owner for verdict in gate.read_conversation([text], dict.fromkeys(gate.loaded, 2.0)).named}


def said(gate: Gate, text: str) -> set[str]:
    """The names that the stream filter finds in an answer, which it holds back as it comes."""
    held = AnswerBuffer(gate.open_from, "")
    found: set[str] = set()
    for i, character in enumerate(text):
        held.add(character, [Token(i, character.encode())], finished=i == len(text) - 1)
        while (passage := held.passage()) is not None:
            found |= {verdict.owner for verdict in gate.read_passage(passage, dict.fromkeys(gate.loaded, 2.0)).named}
            held.passed()
    return found


def ordinary(data: Path | None) -> list[str]:
    """Texts in which nothing is disguised."""
    texts = (PROMPTS / "general.txt").read_text("utf-8").splitlines()
    texts += [str(value) for line in GENERAL.read_text("utf-8").splitlines() for value in _values(json.loads(line))]
    for file in sorted(data.glob("*.json")) if data else ():
        texts += [str(value) for row in json.loads(file.read_text("utf-8")) for value in _values(row)]
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _values(row: object) -> Iterable[object]:
    if isinstance(row, dict):
        row = list(row.values())
    return [value for each in row for value in _values(each)] if isinstance(row, list) else [row]


def stands_in(name: str, text: str) -> bool:
    """Whether a text plainly holds a name."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def measured(disguises: Sequence[Disguise]) -> list[tuple[str, int, int, int, list[str]]]:
    """Name of the disguise, how many names, in how many the gate and the filter find it, and what passes both or one."""
    gates = {name: gate_of([name]) for name in NAMES}
    rows = []
    for disguise in disguises:
        tried = by_gate = by_filter = 0
        passed = []
        for name in NAMES:
            if (written := disguise.write(name)) is None:
                continue
            tried += 1
            in_prompt = name in asked(gates[name], disguise.frame("Tell me, please: who is {} and what is known of that?", written))
            in_answer = name in said(gates[name], disguise.frame("The one you ask about is {} as far as I know.", written))
            by_gate += in_prompt
            by_filter += in_answer
            if not (in_prompt and in_answer):
                passed.append(written.replace("\n", "⏎"))
        rows.append((disguise.name, tried, by_gate, by_filter, passed))
    return rows


def false_alarms(names: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) for every name that is found in a text in which it does not stand."""
    gate = gate_of(names)
    return [(name, text) for text in texts for name in asked(gate, text) if not stands_in(name, text)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a directory with TOFU's files")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    rows, not_read = measured(DISGUISES), measured(NOT_READ)
    texts = ordinary(options.data)
    started = time.perf_counter()
    alarms = false_alarms(COMMON, texts)
    seconds = time.perf_counter() - started
    tried, by_gate, by_filter = (sum(row[i] for row in rows) for i in (1, 2, 3))
    lines = [
        f"{len(rows)} disguises of {len(NAMES)} names, {tried} texts: the gate finds {by_gate}, the stream filter {by_filter}.",
        f"{len(COMMON)} common names in {len(texts):,} ordinary texts ({sum(map(len, texts)):,} characters, {seconds:.0f} s): "
        f"{len(alarms)} false alarms.",
        "",
        "| disguise | names | gate | filter | passes |",
        "|---|---|---|---|---|",
    ]
    for name, count, gate, stream, passed in (*rows, *not_read):
        shown = ", ".join(f"`{each[:40]}`" for each in passed[:3]).replace("|", "\\|")
        lines.append(f"| {name} | {count} | {gate} | {stream} | {shown} |")
    table = "\n".join(lines) + "\n"
    print(table)
    for name, text in alarms:
        print(f"false alarm: {name}: {text[:100]}")
    if options.markdown:
        options.markdown.write_text(table, "utf-8")


if __name__ == "__main__":
    main()
