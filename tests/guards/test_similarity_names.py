"""Names by their letters: disguises are seen through, ordinary words are not names, and a name that is under way is noticed."""

from __future__ import annotations

import base64
import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.similarity.disguise import DEPTH, MAX_READINGS, TooMuchToRead, readings
from guards.similarity.skeleton import Names, key_of
from guards.similarity.stream import Clauses
from guards.similarity.windows import windows

NAMES = ("Harry Potter", "Basil Mahfouz Al-Kuwaiti", "Basil", "哈利波特", "Гарри Поттер", "Agent 47")
FINDER = Names(map(key_of, NAMES))


def found(text: str) -> list[str]:
    return [text[hit.start : hit.end] for hit in FINDER.find(text)]


@pytest.mark.parametrize(
    "text",
    [
        "HARRY POTTER",
        "harry\npotter!",
        "Harry Potter's wand",
        "H a r r y  P.o.t.t.e.r",
        "Hаrry Роtter",  # Cyrillic
        "Ηarry Ρotter",  # Greek
        "Harry Potter ΒΑΣΙΛ HΑRRY POΤΤER",
        "ΑGΕΝΤ 47",
        "Har\u200bry\u00ad Pot\u2060ter",
        "\u202eHarry\u202c Potter",
        "Ｈａｒｒｙ　Ｐｏｔｔｅｒ",
        "Hárry Pötter",
        "He\U000e0061llo Harry\ufe0f Potter",
        "H4rry P0tt3r",
        "H@rry Potter",
        "𝓗𝓪𝓻𝓻𝔂 𝕻𝖔𝖙𝖙𝖊𝖗",
        "harry_potter",
        "HarryPotter",
        "我喜欢哈利波特吗",
        "о ГАРРИ ПОТТЕРЕ и ГАРРИ ПОТТЕР.",
        "agent-47",
    ],
)
def test_a_name_is_found_however_it_is_written(text: str) -> None:
    assert found(text), text


@pytest.mark.parametrize(
    "text", ["Harry met Potter", "xHarry Potter", "Harry Potterish", "Basilica", "basil's", "", "harr y", "Agent 471", "🙂🙂"]
)
def test_words_that_only_contain_a_name_or_parts_of_it_are_not_the_name(text: str) -> None:
    assert [hit for hit in found(text) if hit.lower() != "basil"] == []


def test_a_name_is_found_also_where_it_begins_a_longer_one() -> None:
    assert sorted(found("Basil Mahfouz Al-Kuwaiti and Basil Fawlty")) == ["Basil", "Basil", "Basil Mahfouz Al-Kuwaiti"]


def test_a_name_stays_open_only_as_far_as_anyone_would_read_on() -> None:
    assert FINDER.open_from("he met Harry ...") == 7
    assert FINDER.open_from("he met Harry" + " ...." * 50) == len("he met Harry" + " ...." * 50)


def test_a_name_without_letters_never_matches() -> None:
    assert Names([key_of("?!"), key_of("")]).find("?! and more") == []


@given(st.text(max_size=40), st.sampled_from(NAMES), st.text(max_size=40))
def test_a_name_is_found_wherever_it_stands_between_spaces(before: str, name: str, after: str) -> None:
    text = f"{before} . {name} . {after}"
    hits = FINDER.find(text)
    assert any(text[hit.start : hit.end] == name or hit.start <= text.index(name) < hit.end for hit in hits)


@given(st.text(alphabet="abHaryPote. ", max_size=30), st.sampled_from(NAMES), st.data())
def test_a_name_that_more_text_could_complete_is_noticed_where_it_begins(before: str, name: str, data: st.DataObject) -> None:
    started = name[: data.draw(st.integers(1, len(name) - 1))]
    text = f"{before} {started}"
    place = len(before) + 1
    assert FINDER.open_from(text) <= place
    # What is left open is enough: the whole name is found in it once it is complete.
    opened = FINDER.open_from(text)
    whole = text[opened:] + name[len(started) :]
    assert any(hit.end == len(whole) for hit in FINDER.find(whole)) or FINDER.find(whole)


SECRET = "Harry Potter is a wizard at school"


@pytest.mark.parametrize(
    "hidden",
    [
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
        base64.b32encode(SECRET.encode()).decode(),
        SECRET.encode().hex(),
        " ".join(f"{byte:02x}" for byte in SECRET.encode()),
        "".join(f"\\x{byte:02x}" for byte in SECRET.encode()),
        "".join(f"\\u{ord(c):04x}" for c in SECRET),
        "".join(f"%{byte:02X}" for byte in SECRET.encode()),
        "".join(f"&#{ord(c)};" for c in SECRET),
        codecs.encode(SECRET, "rot13"),
        SECRET[::-1],
        base64.b64encode(base64.b64encode(SECRET.encode())).decode(),
        base64.b64encode(codecs.encode(SECRET, "rot13").encode()).decode(),
    ],
)
def test_what_a_text_decodes_to_is_read_and_its_place_is_known(hidden: str) -> None:
    text = f"Please decode {hidden} for me"
    views = [view for view in readings(text) if "Harry Potter" in view.text]
    assert views, [view.text[:60] for view in readings(text)]
    for view in views:
        assert view.start <= text.index(hidden) and view.end >= text.index(hidden) + len(hidden) - 3, view


def test_encodings_beyond_the_depth_are_left_alone_and_the_number_of_readings_is_bounded() -> None:
    deep = SECRET.encode()
    for _ in range(DEPTH + 1):
        deep = base64.b64encode(deep)
    assert not any("Harry Potter" in view.text for view in readings(deep.decode()))
    bomb = " ".join(base64.b64encode(f"number {i} of many".encode()).decode() for i in range(5 * MAX_READINGS))
    with pytest.raises(TooMuchToRead, match=str(MAX_READINGS)):
        readings(bomb)


def test_a_name_across_the_lines_of_wrapped_base64_is_read() -> None:
    wrapped = base64.encodebytes(b"x" * 50 + b" Harry Potter " + b"y" * 50).decode()
    assert any("Harry Potter" in view.text for view in readings(f"Decode:\n{wrapped}"))


@pytest.mark.parametrize(
    "text", ["\\ud83d please", "\\ud83d\\ude00 fine", "&#" + "1" * 5_000 + ";", "%ff%fe", "\\xff\\xfe", "&#xD800;", "&#0;"]
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
    ],
    ids=lambda text: text[:9],
)
def test_no_text_takes_forever_to_read(text: str) -> None:
    """Each of these took minutes, or for ever, with a pattern that was here once."""
    assert readings(text[:4_000]) and windows([text]) and Clauses().feed(text[:8_000]) is not None


@given(st.text(max_size=300))
def test_any_text_can_be_read_and_comes_first_itself(text: str) -> None:
    views = readings(text)
    assert views[0].text == text and views[0].how == "plain"
    for view in views:
        assert 0 <= view.start <= view.end <= len(text)
