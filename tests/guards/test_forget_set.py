"""Forget sets and policies: what is refused, and that it is refused with the place, the value and the rule."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.errors import InvalidForgetSet, InvalidPolicy
from guards.forget_set import ForgetSet, Question, parse_forget_set, read_jsonl, write_jsonl
from guards.policy import parse_policy

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: bool(text.strip()))


@given(
    st.lists(words, min_size=1, max_size=4),
    st.lists(words, max_size=3),
    st.lists(st.builds(Question, question=words, answer=words, paraphrases=st.lists(words, max_size=2)), max_size=3),
    st.booleans(),
)
def test_json_lines_round_trip(phrases: list[str], aliases: list[str], questions: list[Question], flag: bool) -> None:
    original = ForgetSet(name="x", phrases=phrases, aliases=aliases, questions=questions, word_boundary=flag, requester="me")
    assert read_jsonl(write_jsonl(original).encode(), "x") == original


def test_every_bad_line_is_reported_with_its_number_value_and_rule() -> None:
    lines = [
        b'{"phrase": "fine"}',
        b'{"phrase": "   "}',
        b"nonsense",
        b"",
        b'{"phrase": "a", "alias": "b"}',
        b'{"phrase": "caf\xff"}',
        b'{"question": "Who?"}',
        b'{"set": {"expires_at": "soon"}}',
        b'{"phrase": 7}',
        b'{"alias": ""}',
        b'{"set": {"colour": "red"}}',
        b'["a list"]',
        b'{"phrase": "' + b"x" * 1_000_000 + b'"}',
        b'{"phrase": "lost", "phrase": "kept"}',
        b'{"foo": "\\ud800"}',
    ]
    with pytest.raises(InvalidForgetSet) as error:
        read_jsonl(b"\n".join(lines), "x")
    reported = error.value.problems
    numbers = [int(problem.split(":")[0].removeprefix("line ")) for problem in reported]
    assert sorted(set(numbers)) == [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    for number, expected in (
        (2, "empty"),
        (3, "nonsense"),
        (5, "exactly one"),
        (6, "UTF-8"),
        (7, "answer"),
        (9, "7"),
        (13, "at most 512"),
        (14, "twice"),
    ):
        assert expected in next(problem for problem in reported if problem.startswith(f"line {number}:"))
    assert all(problem.encode() and len(problem) < 400 for problem in reported)


def test_a_second_header_line_is_refused() -> None:
    with pytest.raises(InvalidForgetSet, match="line 2: a second 'set' line"):
        read_jsonl(b'{"set": {"requester": "a"}}\n{"set": {"requester": "b"}}\n{"phrase": "x"}', "x")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "Not A Name", "phrases": ["x"]}, "name"),
        ({"name": "x"}, "the set is empty"),
        ({"name": "x", "phrases": ["x"], "phrase": "y"}, "phrase"),
        ({"name": "x", "phrases": ["x"], "expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"name": "x", "phrases": "x"}, "phrases"),
        ({"name": "x", "phrases": ["\ud800"]}, "surrogate"),
    ],
)
def test_an_impossible_set_is_refused(fields: dict, problem: str) -> None:
    with pytest.raises(InvalidForgetSet, match=problem):
        parse_forget_set(fields)


def test_the_fingerprint_is_of_the_content_not_of_its_order_or_paperwork() -> None:
    one = ForgetSet(name="a", phrases=["x", "y"], requester="me")
    assert one.fingerprint == ForgetSet(name="b", phrases=["y", "x", "x"]).fingerprint
    assert one.fingerprint != ForgetSet(name="a", phrases=["x", "y"], word_boundary=True).fingerprint
    assert one.fingerprint != ForgetSet(name="a", phrases=["x"]).fingerprint


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "none"}, "built in"),
        ({"name": "x", "on_hit": "explode"}, "on_hit"),
        ({"name": "x", "guards": {"supression": {}}}, "supression"),
        ({"name": "x", "forget_sets": "all"}, "forget_sets"),
        ({"name": "x", "refusal": ""}, "refusal"),
    ],
)
def test_an_impossible_policy_is_refused(fields: dict, problem: str) -> None:
    with pytest.raises(InvalidPolicy, match=problem):
        parse_policy(fields)


def test_a_deeply_nested_line_is_an_error_like_any_other() -> None:
    with pytest.raises(InvalidForgetSet, match="line 1"):
        read_jsonl(b"[" * 100_000 + b"]" * 100_000, "x")
    assert json.loads(write_jsonl(ForgetSet(name="x", phrases=["a"])))
