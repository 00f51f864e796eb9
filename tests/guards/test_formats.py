"""The files of TOFU, RWKU and MUSE, as they are published, and what is no such file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guards.measure.formats import Case, UnreadableProbes, read_cases, read_rows


def write(directory: Path, **files: list[dict[str, Any]]) -> Path:
    for name, rows in files.items():
        path = directory / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
    return directory


def test_tofu(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["x", "y"], "paraphrased_question": "p"}
    fact = {"question": "q", "answer": "a", "perturbed_answer": ["x"]}
    found = read_cases(write(tmp_path, forget01_perturbed=[row], retain_perturbed=[row], world_facts_perturbed=[fact]))
    assert found == [
        Case("questions", "q", "a", False, "b", ("x", "y")),
        Case("paraphrased", "p", "a"),
        Case("retain", "q", "a", True, "b", ("x", "y")),
        Case("world facts", "q", "a", True, "", ("x",)),
    ]


def test_rwku(tmp_path: Path) -> None:
    def row(level: str, kind: str = "", query: str = "Who is ___?") -> dict[str, str]:
        return {"query": query, "answer": "a", "level": level, "type": kind, "subject": "s"}

    levels = {
        "forget_level1": [row("1")],
        "forget_level2": [row("2")],
        "forget_level3": [row("3", "role play"), row("3", "reverse query")],
    }
    found = read_cases(write(tmp_path, **levels, neighbor_level1=[row("1")], neighbor_level2=[row("2")]))
    assert [(case.group, case.keep) for case in found] == [
        ("fill in the blank", False),
        ("questions", False),
        ("role play", False),
        ("reverse query", False),
        ("neighbours", True),
        ("neighbours", True),
    ]
    assert found[0].prompt == "Fill in the blank, briefly: Who is ___?" and found[1].prompt == "Who is ___?"


def test_muse(tmp_path: Path) -> None:
    pair = {"question": "q", "answer": "a"}
    files = {"knowmem__forget_qa": [pair], "knowmem__retain_qa": [pair], "knowmem__forget_qa_icl": [pair]}
    found = read_cases(write(tmp_path, **files, verbmem__forget=[{"prompt": "Once", "gt": "upon a time"}]))
    assert [(case.group, case.truth, case.keep) for case in found] == [
        ("questions", "a", False),
        ("neighbours", "a", True),
        ("verbatim", "upon a time", False),
    ]


def test_lines_are_read_as_well_as_lists(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_rows(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", b"\xff"])
def test_what_is_no_list_of_objects_is_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "forget01_perturbed.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if content == '{"a": 1}':  # one line of JSON lines is a list of one
        with pytest.raises(UnreadableProbes):
            read_cases(tmp_path)
        return
    with pytest.raises(UnreadableProbes, match="forget01_perturbed"):
        read_cases(tmp_path)


def test_a_row_of_another_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableProbes, match="row 2"):
        read_cases(write(tmp_path, forget01_perturbed=[{"question": "q", "answer": "a"}, {"prompt": "p"}]))


def test_a_directory_without_any_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UnreadableProbes, match="forget_level"):
        read_cases(tmp_path)
