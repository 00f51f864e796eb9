"""Vectors and indexes: faiss answers as its exact twin does, whatever comes and goes; artifacts are checked before use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guards.errors import InvalidArtifact
from guards.forget_set import ForgetSet, Question
from guards.similarity.index import ANSWER, QUESTION, Entries, ExactIndex, FaissIndex, SetVectors, fingerprint_of

pytest.importorskip("faiss", reason="faiss-cpu is not installed")


def unit(generator: np.random.Generator, n: int, d: int = 16) -> np.ndarray:
    vectors = generator.normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 6), st.booleans()), max_size=12),
    st.floats(-1, 1, width=32),
    st.integers(0, 2**31),
)
def test_faiss_finds_what_the_exact_index_finds_after_any_changes(
    changes: list[tuple[str, int, bool]], floor: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    exact, faiss = ExactIndex(), FaissIndex(16)
    for owner, n, add in changes:
        vectors = unit(generator, n)
        for index in (exact, faiss):
            if add:
                index.add(owner, vectors)
            else:
                index.remove(owner)
    queries = unit(generator, 3)
    one, other = exact.near(queries, floor), faiss.near(queries, floor)
    close = {owner for owner, (score, _) in {**one, **other}.items() if abs(score - floor) < 1e-5}
    assert one.keys() - close == other.keys() - close
    for owner in one.keys() & other.keys():
        assert one[owner][0] == pytest.approx(other[owner][0], abs=1e-5)


def test_beyond_the_stated_size_the_inverted_file_still_finds_what_is_there() -> None:
    generator = np.random.default_rng(1)
    index, exact = FaissIndex(32, exact_up_to=2_000), ExactIndex()
    for i in range(30):
        vectors = unit(generator, 200, 32)
        index.add(f"set-{i}", vectors)
        exact.add(f"set-{i}", vectors)
    assert index._trained_on > 2_000, "it never left the exact index"
    index.remove("set-3")
    exact.remove("set-3")
    queries = np.concatenate([exact._vectors[f"set-{i}"][:5] for i in range(30) if i != 3])
    queries = queries + generator.normal(0, 0.02, queries.shape).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    missed = sum(exact.near(query[None], 0.9).keys() != index.near(query[None], 0.9).keys() for query in queries)
    assert missed <= len(queries) * 0.02
    assert "set-3" not in index.near(queries, -1.0)


def test_an_index_without_vectors_and_a_question_without_windows_find_nothing() -> None:
    index = FaissIndex(8)
    assert index.near(np.ones((1, 8), np.float32), -1.0) == {}
    index.add("a", np.zeros((0, 8), np.float32))
    index.add("b", unit(np.random.default_rng(0), 1, 8))
    assert index.near(np.zeros((0, 8), np.float32), -1.0) == {}
    assert index.near(unit(np.random.default_rng(0), 1, 8), 0.99).keys() == {"b"}


CONTENT = ForgetSet(
    name="a",
    aliases=("Red Lantern",),
    phrases=("Blue Door",),
    questions=(Question(question="What is it?", answer="A shop. It sells lamps.", paraphrases=("And what is it?", "Held out?")),),
    texts=("A long text about lamps.",),
)


def test_the_last_paraphrase_is_held_out_and_a_short_answer_is_there_whole_and_in_sentences() -> None:
    entries = Entries.of(CONTENT)
    assert entries.questions == ("What is it?", "And what is it?")
    assert set(entries.statements) == {"It sells lamps.", "A shop. It sells lamps.", "A long text about lamps."}


def test_a_one_word_answer_is_not_there_by_itself() -> None:
    entries = Entries.of(ForgetSet(name="a", questions=(Question(question="Is it red?", answer="Yes."),)))
    assert "Yes." not in entries.statements and "Is it red? Yes." in entries.statements


def test_answers_are_there_clause_by_clause_and_without_the_subjects_name() -> None:
    answer = "Born in the far north as a child of fishers, Red Lantern has always loved the sea, the ice and the dark."
    entries = Entries.of(ForgetSet(name="a", aliases=("Red Lantern",), questions=(Question(question="Who?", answer=answer),)))
    assert "Red Lantern has always loved the sea, the ice and the dark." in entries.statements
    assert "this person has always loved the sea, the ice and the dark." in entries.statements


def an_artifact() -> SetVectors:
    entries = Entries.of(CONTENT)
    return entries.embedded(unit(np.random.default_rng(2), len(entries.questions) + len(entries.statements)), "encoder-a")


def test_an_artifact_comes_back_as_it_was(tmp_path: Path) -> None:
    artifact = an_artifact()
    artifact.save(tmp_path / "a.safetensors")
    back = SetVectors.load(tmp_path / "a.safetensors", encoder="encoder-a")
    assert np.array_equal(back.vectors, artifact.vectors) and back.fingerprint == artifact.fingerprint
    assert back.aliases == artifact.aliases and back.phrases == artifact.phrases
    assert back.kinds.tolist().count(QUESTION) == 2 and back.kinds.tolist().count(ANSWER) == 3


def test_another_encoder_or_another_content_is_another_artifact(tmp_path: Path) -> None:
    an_artifact().save(tmp_path / "a.safetensors")
    with pytest.raises(InvalidArtifact, match=r"encoder-a.*encoder-b"):
        SetVectors.load(tmp_path / "a.safetensors", encoder="encoder-b")
    assert len({fingerprint_of(c, e) for c in ("x", "y") for e in ("p", "q")}) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_artifact_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    an_artifact().save(path)
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[-70] ^= 64
        path.write_bytes(raw)
    elif damage == "truncate":
        path.write_bytes(raw[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(InvalidArtifact):
        SetVectors.load(path, encoder="encoder-a")
