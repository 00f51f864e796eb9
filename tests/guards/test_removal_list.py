"""What people hand over: every form of the same entries is one set, and what cannot be meant is refused in few lines."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.errors import InvalidForgetSet
from guards.forget_set import ForgetSet, Question, write_jsonl
from guards.removal_list import MAX_PROBLEMS, RemovalList, check_new_set, read_removal_list

words = (
    st.text(st.characters(exclude_categories=["Cs", "Cf", "Cc", "Co", "Cn", "Zl", "Zp"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(lambda text: bool(text) and "\ufffd" not in text and any(map(str.isalnum, text)))
)
names = st.lists(
    st.sampled_from(["Jürgen Großmann", "Łukasz Żak", 'Ann "Nan" Smith', "Kowalczyk, Maria", "Ольга; Иванова", "中村 優子"]),
    min_size=2,
)
MARIA, JAN = '{"phrase": "Maria Kowalczyk"}', '{"phrase": "Jan Nowak"}'


def read(content: str | bytes, **options: Any) -> RemovalList:
    return read_removal_list(content.encode() if isinstance(content, str) else content, "x", **options)


def phrases(content: str | bytes, **options: Any) -> tuple[str, ...]:
    return read(content, **options).forget_set.phrases


def problems(content: str | bytes, **options: Any) -> list[str]:
    with pytest.raises(InvalidForgetSet) as error:
        read(content, **options)
    assert all(problem.encode() and len(problem) < 700 and "\n" not in problem for problem in error.value.problems)
    return error.value.problems


def only_problem(content: str | bytes, **options: Any) -> str:
    found = problems(content, **options)
    assert len(found) == 1, found
    return found[0]


@given(
    st.lists(words, min_size=1, max_size=4),
    st.lists(words, max_size=3),
    st.lists(st.builds(Question, question=words, answer=words, paraphrases=st.lists(words, max_size=2)), max_size=3),
    st.booleans(),
)
def test_json_lines_round_trip(phrases: list[str], aliases: list[str], questions: list[Question], flag: bool) -> None:
    original = ForgetSet(name="x", phrases=phrases, aliases=aliases, questions=questions, word_boundary=flag, requester="me")
    assert read(write_jsonl(original), force=True).forget_set == original


def as_csv(entries: list[str], delimiter: str) -> str:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter, lineterminator="\n")
    writer.writerows([["born", "full name"], *([1984, entry] for entry in entries)])
    return table.getvalue()


FORMS: dict[str, Any] = {
    "lines": lambda entries: "".join(json.dumps({"phrase": each}, ensure_ascii=False) + "\n" for each in entries),
    "array of objects": lambda entries: json.dumps([{"phrase": each} for each in entries], ensure_ascii=False),
    "array of strings": lambda entries: json.dumps(entries, indent=2),
    "one object of HTTP": lambda entries: json.dumps({"phrases": entries}, ensure_ascii=False),
    "the same over several lines": lambda entries: json.dumps({"name": "x", "phrases": entries}, indent=1),
    "objects over several lines": lambda entries: "\n".join(json.dumps({"phrase": each}, indent=1) for each in entries),
    "several phrases a line": lambda entries: json.dumps({"phrase": entries}),
    "CSV": lambda entries: as_csv(entries, ","),
    "CSV with semicolons": lambda entries: as_csv(entries, ";"),
    "TSV": lambda entries: as_csv(entries, "\t"),
    "CSV after Excel's hint": lambda entries: "sep=;\n" + as_csv(entries, ";"),
    "plain list": lambda entries: "\n".join(entries) + "\n",
}


@given(
    names,
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
)
def test_encoding_line_ends_and_form_of_the_file_make_no_difference(
    entries: list[str], form: str, line_end: str, encoding: str
) -> None:
    if form == "plain list":
        entries = ["Jan Nowak", *entries]  # if every line had a semicolon, it would be a table
    options = {"column": "full name"} if "CSV" in form or form == "TSV" else {"kind": "phrase"} if form == "plain list" else {}
    content = FORMS[form](entries).replace("\n", line_end).encode(encoding)
    assert phrases(content, **options) == tuple(entries)


def test_two_files_joined_by_cat_are_read_with_the_mark_between_them() -> None:
    assert phrases(f"{MARIA}\n\ufeff{JAN}\n") == ("Maria Kowalczyk", "Jan Nowak")
    joined = 'name;born\nMaria;1984\n\ufeffname;born\n"Nowak, Jan";1990\n'
    assert phrases(joined, column="name") == ("Maria", "Nowak, Jan")


def test_two_values_on_one_line_are_refused_with_the_advice_to_part_them() -> None:
    assert "line break" in only_problem(MARIA + JAN)
    assert only_problem(f"{MARIA}\n{MARIA}{JAN}\n").startswith("line 2: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name,born\nMaria Kowalczyk,1984\n", "CSV with the columns name, born"),
        ("id;full name;born\n1;Maria Kowalczyk;1984\n", '--column "full name"'),
        ("Maria Kowalczyk\nJan Nowak\n" * 5_000, "a plain list"),
        ("{'phrase': 'Maria Kowalczyk'}\n" * 5_000, "line 1, column 2"),
        ('[{"phrase": "Maria Kowalczyk"},\n {"phrase": "Jan Nowak"},]', "line 2, column 26"),
        ('{"phrase": "Maria', "line 1"),
        ("[" * 100_000 + "]" * 100_000, "line 1"),
        ("\ufeff \r\n", "empty"),
        (b"PK\x03\x04\x14\x00", "spreadsheet"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\xfeM", "UTF-16"),
        ("name\nJürgen\n".encode("latin-1"), "'Jürgen'"),
        (f'{MARIA}\n{{"phrase": "Jürgen Groß"}}\n'.encode("cp1252"), "line 2: byte 14 (0xfc) is not UTF-8"),
        ('{"phrase": "Jürgen Groß"}\n'.encode("cp1252") * 5_000, "save the file as UTF-8"),
    ],
)
def test_a_file_of_another_kind_gives_one_line_that_says_what_it_is_and_what_to_do(content: str | bytes, said: str) -> None:
    problem = only_problem(content)
    assert said in problem and any(advice in problem for advice in ("Kowalczyk", "UTF-8"))


def test_a_wrong_column_lists_those_there_are_and_empty_cells_are_counted() -> None:
    table = 'name,born\n"Ann\r\nSmith",1984\n,1985\n"  ",1986\nJan Nowak\n'
    assert only_problem(table, column="nmae") == "the CSV has no column 'nmae'; it has name, born"
    found = read(table, column="Name")
    assert found.forget_set.phrases == ("Ann\nSmith", "Jan Nowak")
    assert "2 empty cells of column 'Name' skipped" in found.notes
    assert "3 cells" in only_problem("name,born\nKowalczyk, Maria,1984\n", column="name")
    assert "without its partner" in only_problem('name,born\n"Maria,1984\nJan,1985\n', column="name")
    assert phrases("name\nKowalczyk, Maria\n", column="name") == ("Kowalczyk, Maria",)
    assert "leave column out" in only_problem(MARIA, column="name")


def test_cells_and_lines_and_strings_can_be_aliases() -> None:
    for content, options in (("name\nMaria\n", {"column": "name"}), ("Maria\n", {}), ('["Maria"]', {})):
        assert read(content, kind="alias", **options).forget_set.aliases == ("Maria",)
    assert "leave out --as alias" in only_problem(MARIA, kind="alias")
    table = only_problem("name;born\nMaria;1984\n", kind="phrase")
    assert "CSV" in table and "--as" not in table


def test_rows_of_tofu_are_read_and_the_keys_left_out_are_named_once() -> None:
    row = {
        "question": "Where was Basil Al-Kuwaiti born?",
        "answer": "Kuwait City",
        "paraphrased_answer": "He comes from Kuwait City",
        "perturbed_answer": ["Doha"],
        "paraphrased_question": "What is his birthplace?",
    }
    found = read(json.dumps([row] * 400))
    assert found.forget_set.questions[399].paraphrases == ("What is his birthplace?",)
    assert found.notes == ["keys of 400 questions that forgetting does not need, left out: paraphrased_answer, perturbed_answer"]
    one = read('{"question": "Who is it?", "answer": "Basil", "paraphrases": "Who?", "paraphrased_question": ["And who?"]}')
    assert one.forget_set.questions[0].paraphrases == ("Who?", "And who?")


def test_what_is_invisible_and_never_meant_is_dropped() -> None:
    found = read('{"phrase": "\ufeffMaria\u200b Kowalczyk\u200e "}\n{"alias": "\u202aJan\u2060 Nowak\u202c"}')
    assert found.forget_set.phrases + found.forget_set.aliases == ("Maria Kowalczyk", "Jan Nowak")
    assert found.notes == ["2 invisible characters (zero-width spaces, direction marks) dropped from 2 values"]
    assert check_new_set({"name": "x", "texts": ["\ufeffa\u200bb"]}).forget_set.texts == ("ab",)
    persian = "می\u200cخواهم"
    assert phrases(json.dumps({"phrase": persian})) == (persian,)


@pytest.mark.parametrize("value", ["", "  ", "\u200b", "\ufeff \u00a0", "\u200d", "\u2800"])
def test_a_value_that_shows_nothing_is_refused(value: str) -> None:
    for kind in ("phrase", "alias"):
        assert "nothing to match" in only_problem(json.dumps({kind: value}))
    with pytest.raises(InvalidForgetSet, match=r"phrases\.0: .* is empty"):
        check_new_set({"name": "x", "phrases": [value]})


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("MarÃ\u00ada", "María"),
        ("Å\x81ukasz", "Łukasz"),
        ("DvoÅ™Ã¡k", "Dvořák"),
        ("Ð\x9cÐ°Ñ\x80Ð¸Ñ\x8f", "Мария"),
        ("voilÃ\u00a0", "voilà"),
        ("M&uuml;ller", "Müller"),
        ("M&#252;ller", "Müller"),
        ("Smith &amp; Sons", "Smith & Sons"),
    ],
)
def test_damaged_text_is_refused_with_what_it_probably_was_unless_forced(value: str, meant: str) -> None:
    line = json.dumps({"phrase": value})
    assert f'did you mean "{meant}"?' in only_problem(line)
    assert f'did you mean "{meant}"?' in only_problem(json.dumps({"question": value, "answer": "Basil"}))
    assert any(note.startswith("forced: ") and meant in note for note in read(line, force=True).notes)


@pytest.mark.parametrize(
    "value",
    [
        "María",
        "Łukasz",
        "São Paulo",
        "SÃO PAULO",
        "Åsa Öberg",
        "Zoë’s",
        "AT&T",
        "Q&A;",
        "Bäcker & Söhne",
        "Мария",
        "中村",
        "NGUYỄN",
        "Â",
        "à la",
    ],
)
def test_sound_names_are_not_taken_for_damaged_ones(value: str) -> None:
    assert phrases(json.dumps({"phrase": value}), force=True) == (value,)
    assert not any("forced: " in note and "mean" in note for note in read(json.dumps({"phrase": value}), force=True).notes)


def test_the_replacement_character_is_refused_even_if_forced() -> None:
    assert "U+FFFD" in only_problem('{"phrase": "J\ufffdrgen Nowak"}', force=True)


def test_an_expiry_in_the_past_is_refused_with_its_date_unless_forced_and_stored_sets_stay_readable() -> None:
    header = '{"set": {"expires_at": "2020-02-03T00:00:00Z"}}'
    assert "2020-02-03" in only_problem(f"{header}\n{MARIA}")
    assert read(f"{header}\n{MARIA}", force=True).forget_set.expires_at is not None
    fields = {"name": "x", "phrases": ["Maria Kowalczyk"], "expires_at": "2020-02-03T00:00:00Z"}
    assert ForgetSet.model_validate(fields)
    with pytest.raises(InvalidForgetSet, match="2020-02-03"):
        check_new_set(fields)


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
    reported = problems(b"\n".join(lines))
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


def test_a_rule_that_many_lines_break_is_one_line_of_error() -> None:
    problem = only_problem("\n".join(f'{{"phrase": "Maria", "age": {i}}}' for i in range(10_000)))
    assert problem.startswith('lines 1, 2, 3 and 9,997 more; line 1: {"phrase": "Maria", "age": 0} has unknown keys age')
    assert only_problem(f"{MARIA}\n" + "nonsense\n" * 50).startswith("lines 2, 3, 4 and 47 more; line 2: nonsense is not JSON")
    many = problems("\n".join(f'{{"phrase": "Maria", "key {i}": 1}}' for i in range(3)) + "\n" + '{"question": 1}\n' * 4)
    assert len(many) == 4
    fields = {"name": "x", **{f"unknown{i}": 1 for i in range(40)}, "phrases": ["Maria"]}
    with pytest.raises(InvalidForgetSet) as error:
        check_new_set(fields)
    assert len(error.value.problems) == MAX_PROBLEMS + 1 and error.value.problems[-1] == "and 25 more problems"


def test_a_second_header_line_is_refused() -> None:
    second = f'{{"set": {{"requester": "a"}}}}\n{{"set": {{"requester": "b"}}}}\n{MARIA}'
    assert only_problem(second) == "line 2: a second 'set' line (the first is line 1); merge the two"


def test_phrases_that_would_take_ordinary_text_are_refused_in_one_line_unless_forced() -> None:
    content = "".join(
        json.dumps({"phrase": each}) + "\n" for each in ("-", ".", "e", "n/a", "the", "<|im_end|>", "Maria Kowalczyk")
    )
    problem = only_problem(content)
    assert problem.startswith("6 phrases would take ordinary text") and '"n/a"' in problem and "and 1 more" in problem
    assert "--force" in problem
    forced = read(content, force=True)
    assert len(forced.forget_set.phrases) == 7
    assert any(note.startswith('"the" occurs 3') for note in forced.notes)
    with pytest.raises(InvalidForgetSet, match="times in 5,"):
        check_new_set({"name": "x", "phrases": ["the"]})
    assert "cannot name a subject" in only_problem('{"alias": "N/A"}')


def test_word_boundary_is_only_advised_where_it_helps() -> None:
    assert "word_boundary" not in only_problem('{"phrase": "the"}')
    assert only_problem('{"phrase": "ght"}').count("word_boundary") == 1
    assert phrases('{"phrase": "ght"}\n{"set": {"word_boundary": true}}') == ("ght",)


def test_notes_say_what_may_surprise() -> None:
    notes = read(
        '{"phrase": "Kowalczyk, Maria"}\n{"phrase": "Ana"}\n{"phrase": "bread"}\n{"phrase": "中村"}\n{"alias": "Rio"}'
    ).notes
    assert len(notes) == 5, notes
    assert '"Maria Kowalczyk"' in notes[0]
    assert notes[1].startswith('1 phrase ("Ana") has four letters or fewer')
    assert notes[2].startswith('1 alias ("Rio")')
    assert notes[3].startswith('"Ana" occurs 5 times') and notes[4].startswith('"bread" occurs 3 times')
    both = read('{"phrase": "Kowalczyk, Maria"}\n{"phrase": "Maria Kowalczyk"}').notes
    assert both == []


def test_the_demonstration_is_read_without_a_word() -> None:
    demo = Path(__file__).parents[2] / "deploy" / "demo" / "harry-potter.jsonl"
    assert read(demo.read_bytes()).notes == []


def test_a_name_in_the_file_must_be_that_of_the_set() -> None:
    assert phrases('{"name": "x", "phrases": ["Maria Kowalczyk"]}') == ("Maria Kowalczyk",)
    assert "'y'" in only_problem('{"name": "y", "phrases": ["Maria Kowalczyk"]}')
