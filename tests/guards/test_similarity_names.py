"""Names by their letters: other spellings are found, ordinary words are not names, and a name that is under way is noticed."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guards.similarity.keys import MOST_KEYS, keys_of
from guards.similarity.names import Names
from tests.bench.disguises import COMMON, false_alarms, ordinary

NAMES = (
    "Harry Potter",
    "Basil Mahfouz Al-Kuwaiti",
    "Basil",
    "哈利波特",
    "Гарри Поттер",
    "Agent 47",
    "Jürgen Müller",
    "Johanna van der Berg",
    "김민수",
)
FINDER = Names(key for name in NAMES for key in keys_of(name))


def found(text: str, *names: str) -> list[str]:
    finder = Names(key for name in names for key in keys_of(name)) if names else FINDER
    return [text[hit.start : hit.end] for hit in finder.find(text)]


def hows(name: str, text: str) -> set[str]:
    return {hit.how for hit in Names(keys_of(name)).find(text)}


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
    "text", ["Harry met Potter", "xxHarry Potter", "Harry Potterish", "Basilica", "basil's", "", "harr y", "Agent 471", "🙂🙂"]
)
def test_words_that_only_contain_a_name_or_parts_of_it_are_not_the_name(text: str) -> None:
    assert [hit for hit in found(text) if hit.lower() != "basil"] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Ali", "That is all I know."),
        ("Ali", "a list, a li"),
        ("Al", "What is AI? A1 paper. A. L. Smith"),
        ("Li", "World War II began in 1939, at 11"),
        ("Ian", "How do I set up a LAN?"),
        ("Neil", "Nell"),
        ("Sol", "Is a 501(c) tax-exempt? 50l"),
        ("Sam", "at 5am"),
        ("Mia", "the m14 rifle"),
        ("Andor", "and/or"),
        ("will.i.am", "William Shakespeare wrote it. Where there is a will, I am."),
        ("Jo-Ann", "Joann Fabrics"),
        ("Al Ro", "alro"),
        ("Theresa May", "There's a may festival"),
        ("Justin Case", "just in case, Just in case, Just In Case"),
        ("Will Smith", "Mr. Smith will come. Smith, will you?"),
        ("Jan", "J. A. N. Smith"),
        ("Baer", "a bar"),
        ("Michael", "Michal"),
        ("Christian", "Christina"),
        ("Daniel Maier", "Daniela Maier"),
        ("Robin Williams", "Robin William"),
        ("Richard Martin", "George R.R. Martin, George R. Martin"),
        ("Dr. Evil", "an evil plan"),
        ("علي", "بشكل فعلي"),
        ("アリ", "アリゾナ"),
        ("李明", "桃李。明天"),
        ("राम", "रमा"),
        ("김민", "김민수는"),
    ],
)
def test_an_ordinary_word_is_no_name(name: str, text: str) -> None:
    assert found(text, name) == []


@pytest.mark.parametrize(
    ("name", "text", "how"),
    [
        ("Ali", "who is ALI?", "plain"),
        ("Ali", "A l i", "spaced out"),
        ("Paul", "PauI", "leet"),
        ("Bob", "B0b", "leet"),
        ("William", "WlLLIAM", "leet"),
        ("Agent 007", "Agent OO7", "leet"),
        ("will.i.am", "WillIAm", "glued"),
        ("will.i.am", "Will I Am", "plain"),
        ("Harry Potter", "H|a|r|r|y P/o/t/t/e/r", "spaced out"),
        ("Harry Potter", "Har-ry Pot-ter", "in pieces"),
        ("Harry Potter", "ʜᴀʀʀʏ 🅿🅾🆃🆃🅴🆁", "look-alikes"),
        ("Harry Potter", "Harry Poter", "one edit"),
        ("Harry Potter", "Hrary Potter", "one edit"),
        ("Harry Potter", "Potter, Harry", "surname first"),
        ("Dr. Johanna van der Berg", "van der Berg, Johanna", "surname first"),
        ("Dr. Johanna van der Berg", "VAN<DER<BERG<<JOHANNA", "surname first"),
        ("Dr. Johanna van der Berg", "J. v. d. Berg", "initials"),
        ("Dr. Johanna van der Berg", "Johanna van der Berg", "plain"),
        ("김민수", "김민수는 누구입니까?", "particle"),
        ("김민수", "김민수가 사는 곳", "particle"),
        ("김민수", "김민수에게서는", "particle"),
        ("Harry Potter", "Harry Potter는", "plain"),
        ("أحمد القاسم", "وأحمد القاسم", "particle"),
        ("أحمد", "لأحمد", "particle"),
        ("أحمد", "احـمد", "plain"),
        ("דוד כהן", "ודוד כהן", "particle"),
        ("Путин", "Путина", "particle"),
        ("Işık", "IŞIK'ın", "plain"),
        ("Łukasz Wójcik", "Who is Lukasz Wojcik?", "plain"),
        ("Lukasz Wojcik", "Łukasz Wójcik", "plain"),
        ("Müller", "Mueller", "plain"),
        ("Mueller", "Müller", "plain"),
        ("Jørgensen", "Joergensen", "plain"),
        ("Joergensen", "Jørgensen", "plain"),
        ("Großmann", "Grossmann", "plain"),
        ("+49 30 9018 2000", "+493090182000", "plain"),
        ("+49 30 9018 2000", "(030) 9018-2000", "plain"),
        ("DE89 3704 0044 0532 0130 00", "DE89370400440532013000", "plain"),
        ("j.vanderberg@example.org", "j.vanderberg@example.org", "plain"),
        ("O'Brien", "obrien", "plain"),
    ],
)
def test_a_name_in_another_spelling_is_found_and_it_is_said_how(name: str, text: str, how: str) -> None:
    assert any(how in each for each in hows(name, text)), hows(name, text)


def test_the_place_of_a_name_is_that_of_its_letters() -> None:
    text = "¿ Potter, Harry ? H\u200barry P0tter! Hary Potter"
    assert found(text, "Harry Potter") == ["Potter, Harry", "H\u200barry P0tter", "Hary Potter"]


def test_common_names_are_not_found_in_ordinary_texts() -> None:
    assert false_alarms(COMMON, ordinary(None)) == []


def test_a_name_is_found_also_where_it_begins_a_longer_one() -> None:
    assert sorted(found("Basil Mahfouz Al-Kuwaiti and Basil Fawlty")) == ["Basil", "Basil", "Basil Mahfouz Al-Kuwaiti"]


def test_a_name_stays_open_only_as_far_as_anyone_would_read_on() -> None:
    assert FINDER.open_from("he met Harry ...") == 7
    assert FINDER.open_from("he met Harry" + " ...." * 50) == len("he met Harry" + " ...." * 50)


def test_a_name_without_letters_never_matches() -> None:
    assert keys_of("?!") == keys_of("") == ()
    assert Names(()).find("?! and more") == [] and Names(()).open_from("?!") == 2


def test_keys_hold_no_name_as_it_was_written_and_are_few() -> None:
    for name in (*NAMES, "Jürgen Aaron Goethe-Mueller Søe Åsen", "A b c d e", "x" * 500):
        assert len(keys_of(name)) <= MOST_KEYS and not any(
            name in key for key in keys_of(name) if " " in name and name != name.lower()
        )


def test_many_names_do_not_make_a_text_slower_to_read() -> None:
    many = [f"{a}{b}mann {c}{d}ström" for a in "BDFG" for b in ("a", "e", "ol") for c in "KLMNP" for d in ("i", "o", "und")] * 1
    finder = Names(key for name in (f"{each} {i:x}" for each in many for i in range(50)) for key in keys_of(name))
    text = "The committee met on Tuesday to discuss the budget for the coming year. " * 50
    started = time.perf_counter()
    assert finder.find(text) == [] and finder.find_turned(text) == []
    assert time.perf_counter() - started < 2


@given(st.text(max_size=40), st.sampled_from(NAMES), st.text(max_size=40))
def test_a_name_is_found_wherever_it_stands_between_spaces(before: str, name: str, after: str) -> None:
    text = f"{before} . {name} . {after}"
    hits = FINDER.find(text)
    assert any(text[hit.start : hit.end] == name or hit.start <= text.index(name) < hit.end for hit in hits)


WAYS = (
    "Harry Potter",
    "Potter, Harry",
    "Hary Potter",
    "Harry Pottre",
    "Harrx Potter",
    "H. Potter",
    "H a r r y P o t t e r",
    "H@rry P0tter",
    "Mueller, Juergen",
    "J. Müller",
    "J. v. d. Berg",
    "van der Berg, Johanna",
    "김민수에게",
    "Гарри Поттера",
    "Agent 47",
)


@settings(max_examples=400)
@given(st.text(alphabet="abHaryPote. ", max_size=30), st.sampled_from((*NAMES, *WAYS)), st.data())
def test_a_name_that_more_text_could_complete_is_noticed_where_it_begins(before: str, name: str, data: st.DataObject) -> None:
    before = re.sub(r"\w\. ?$", "", before)
    started = name[: data.draw(st.integers(1, len(name) - 1))]
    text = f"{before}; {started}"
    opened = FINDER.open_from(text)
    # What is left open is enough: the whole name is found in it once it is complete, or it was found before that.
    whole = text[opened:] + name[len(started) :]
    assert FINDER.find(whole) or FINDER.find(text), (text, opened)


@settings(max_examples=300)
@given(st.sampled_from(("Harry Potter", "Johanna van der Berg", "Nikolai Abilov")), st.data())
def test_one_edit_in_a_long_word_of_a_name_is_seen_through(name: str, data: st.DataObject) -> None:
    words = name.split()
    which = data.draw(st.sampled_from([i for i, word in enumerate(words) if len(word) >= 5]))
    word, place = words[which], data.draw(st.integers(0, 2))
    kind = data.draw(st.sampled_from(("drop", "put", "change", "swap")))
    changed = {
        "drop": word[:place] + word[place + 1 :],
        "put": word[:place] + "k" + word[place:],
        "change": word[:place] + "k" + word[place + 1 :],
        "swap": word[:place] + word[place + 1] + word[place] + word[place + 2 :],
    }[kind]
    text = " ".join((*words[:which], changed, *words[which + 1 :]))
    assert found(f"who is {text}?", name) == [text]
