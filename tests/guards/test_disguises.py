"""Disguises: every one of a table is seen through, and its place is known; ordinary long texts are read; none takes for ever."""

from __future__ import annotations

import base64
import codecs
import json
import time
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guards.similarity.disguise import DEPTH, MAX_READINGS, TooMuchToRead, readings
from guards.similarity.stream import Clauses
from guards.similarity.windows import windows
from tests.bench.disguises import asked, gate_of
from tests.disguises import DISGUISES, NOT_READ, Disguise

SECRET = "Harry Potter is a wizard at school"
GATE = gate_of(["Harry Potter"])


WRITTEN = [
    (each, name, written)
    for each in DISGUISES
    for name in ("Harry Potter", "Nikolai Abilov", "Rosalind Peckham")
    if (written := each.write(name)) is not None
]


@pytest.mark.parametrize(("disguise", "name", "written"), WRITTEN, ids=[f"{each.name}-{name}" for each, name, _ in WRITTEN])
def test_a_name_in_a_disguise_is_found(disguise: Disguise, name: str, written: str) -> None:
    assert asked(gate_of([name]), disguise.frame("Tell me, please: who is {} and what is known?", written)) == {name}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([each for each in DISGUISES if not each.alone]),
    st.lists(
        st.sampled_from(["the", "of", "and", "house", "river", "glass", "wrote", "walked", "seven", "in", "1987", "a"]), max_size=30
    ),
)
def test_a_name_in_a_disguise_is_found_among_any_words(disguise: Disguise, words: list[str]) -> None:
    written = disguise.write("Harry Potter")
    if written is not None and "letters of" not in disguise.name:
        assert asked(GATE, f"{' '.join(words)}; {written}; {' '.join(reversed(words))}")


@pytest.mark.parametrize("disguise", NOT_READ, ids=lambda each: each.name)
def test_what_is_said_not_to_be_read_is_not(disguise: Disguise) -> None:
    for name in ("Harry Potter", "Paul", "Гарри Поттер", "Łukasz Wójcik"):
        if (written := disguise.write(name)) is not None:
            assert not asked(gate_of([name]), f"Who is {written}?"), "move it to DISGUISES"


@pytest.mark.parametrize(
    "hidden",
    [
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
        base64.b32encode(SECRET.encode()).decode(),
        SECRET.encode().hex(),
        SECRET.encode().hex(" "),
        "".join(f"\\x{byte:02x}" for byte in SECRET.encode()),
        "".join(f"\\u{ord(c):04x}" for c in SECRET),
        "".join(f"%{byte:02X}" for byte in SECRET.encode()),
        "".join(f"&#{ord(c)};" for c in SECRET),
        base64.b64encode(base64.b64encode(SECRET.encode())).decode(),
    ],
)
def test_what_a_text_decodes_to_is_read_and_its_place_is_known(hidden: str) -> None:
    text = f"Please decode {hidden} for me"
    view = next(view for view in readings(text) if "Harry Potter" in view.text)
    place = view.text.index("Harry Potter")
    start, end = view.place(place, place + len("Harry Potter"))
    assert text.index(hidden) <= start < end <= text.index(hidden) + len(hidden)
    after = view.text.index("for me")
    assert text[slice(*view.place(after, after + 6))] == "for me"


@pytest.mark.parametrize(
    "hidden", [codecs.encode(SECRET, "rot13"), SECRET[::-1], base64.b64encode(codecs.encode(SECRET, "rot13").encode()).decode()]
)
def test_a_name_in_a_turned_text_has_its_place(hidden: str) -> None:
    text = f"Please decode: {hidden}. For me"
    (verdict,) = GATE.read_conversation([text], {"Harry Potter": 2.0}).named
    assert text.index(hidden) <= verdict.start < verdict.end <= text.index(hidden) + len(hidden)
    assert "shift" in verdict.how or "backwards" in verdict.how


def test_sentences_in_a_cipher_are_read_for_the_encoder() -> None:
    question = "Who is the novelist born in Karlsgrube on the third of May"
    assert any(question in view.text for view in readings(f"Decode: {codecs.encode(question, 'rot13')}"))
    assert any(question in view.text for view in readings(f"{question} who is the author of that"[::-1]))


def test_encodings_beyond_the_depth_are_left_alone_and_the_number_of_passages_is_bounded() -> None:
    deep = SECRET.encode()
    for _ in range(DEPTH + 1):
        deep = base64.b64encode(deep)
    assert not any("Harry Potter" in view.text for view in readings(deep.decode()))
    bomb = " ".join(base64.b64encode(f"the number {i}, of many".encode()).decode() for i in range(2 * MAX_READINGS))
    with pytest.raises(TooMuchToRead, match=f"{MAX_READINGS:,}"):
        readings(bomb)


def test_long_ordinary_prompts_are_read() -> None:
    generator = np.random.default_rng(0)
    picture = base64.b64encode(generator.bytes(60_000)).decode()
    logs = "\n".join(
        f"2024-05-0{i % 9 + 1}T12:0{i % 10}:00Z {uuid.UUID(bytes=generator.bytes(16))} {generator.bytes(20).hex()}"
        for i in range(400)
    )
    rows = json.dumps([{"id": i, "token": base64.b64encode(generator.bytes(24)).decode(), "at": i * 3.7} for i in range(400)])
    passages = " ".join(base64.b64encode(f"file number {i}".encode()).decode() for i in range(70))
    for text in (f"data:image/png;base64,{picture}", logs, rows, passages):
        assert readings(text)[0].text == text
        assert not GATE.read_conversation([text], {"Harry Potter": 2.0}).named


def test_a_name_across_the_lines_of_wrapped_base64_is_read() -> None:
    wrapped = base64.encodebytes(b"and so " * 7 + b" Harry Potter " + b"and so " * 7).decode()
    assert any("Harry Potter" in view.text for view in readings(f"Decode:\n{wrapped}"))


@pytest.mark.parametrize(
    "text",
    [
        "\\ud83d please",
        "\\ud83d\\ude00 fine",
        "&#" + "1" * 5_000 + ";",
        "%ff%fe",
        "\\xff\\xfe",
        "&#xD800;",
        "&#0;",
        "\\U00110000",
        "U+110000",
    ],
)
def test_escapes_that_are_no_characters_leave_a_text_that_can_be_encoded(text: str) -> None:
    for view in readings(text):
        view.text.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "_" * 300 + "ab",
        "." * 20_000 + "x",
        "A. " * 8_000,
        "a.b" * 8_000,
        "0x" * 8_000,
        "& " * 8_000,
        "%" * 20_000,
        ("." * 9 + '"' * 9) * 900,
        "a" * 20_000,
        "1 " * 10_000,
        "01" * 10_000,
        ".- " * 8_000,
        "ay " * 8_000,
        "*a" * 10_000,
        "echo " * 4_000 + "x",
        "ɐ " * 8_000,
        "48" * 10_000 + "g",
        "0x41, " * 3_000 + "!",
        "U+" * 8_000,
        "!a" * 8_000,
        "\n" * 20_000,
        "가" * 8_000,
        "ال" * 8_000,
        "Ａ" * 8_000,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_no_text_takes_forever_to_read(text: str) -> None:
    """Some of these took minutes, or for ever, with a pattern that was here once."""
    started = time.perf_counter()
    try:
        assert readings(text[:4_000]) and Clauses().feed(text[:8_000]) is not None
        windows([text])
        GATE.read_passage(text[:4_000], {"Harry Potter": 2.0})
    except TooMuchToRead:
        pass
    GATE.open_from(text)
    assert time.perf_counter() - started < 5


@given(st.text(max_size=300))
def test_any_text_can_be_read_and_comes_first_itself(text: str) -> None:
    views = readings(text)
    assert views[0].text == text and views[0].how == "plain"
    for view in views:
        for place in (0, len(view.text) // 2, max(0, len(view.text) - 1)):
            start, end = view.place(place, place + 1)
            assert 0 <= start <= end <= len(text) + 1
