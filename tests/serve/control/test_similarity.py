"""Similarity as a service: batches whose texts do not fail each other, sets that come and go, a closed door when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from guards.forget_set import ForgetSet, Question
from guards.similarity.disguise import TooMuchToRead
from guards.similarity.encoder import EncoderUnavailable, bundled_encoder
from guards.suppression.vocabulary import Vocabulary
from guards.types import ArtifactRef
from serve.control import similarity as service
from serve.control.similarity import Similarity
from serve.generation.gate import turns_of
from serve.protocol.artifacts import artifact_path

DIRECTORY = bundled_encoder()
pytestmark = pytest.mark.skipif(DIRECTORY is None, reason="the bundled encoder is not installed")


def a_set(i: int) -> ForgetSet:
    question = Question(question=f"Where is lamp number {i} of Orsolya Vendt?", answer=f"Lamp number {i} hangs in the organ loft.")
    return ForgetSet(name=f"s{i}", aliases=(f"Orsolya Vendt {i}",), questions=(question,))


def run(directory: Path, scenario: Callable[[Similarity], Awaitable[None]]) -> None:
    async def main() -> None:
        similarity = Similarity(DIRECTORY, directory)
        await similarity.start()
        try:
            await scenario(similarity)
        finally:
            await similarity.stop()

    asyncio.run(main())


async def store(similarity: Similarity, directory: Path, i: int) -> str:
    vectors = await similarity.build(a_set(i))
    path = artifact_path(directory, ArtifactRef("gate", vectors.fingerprint))
    path.parent.mkdir(exist_ok=True)
    vectors.save(path)
    return vectors.fingerprint


def test_a_long_text_does_not_keep_a_short_one_waiting(tmp_path: Path) -> None:
    async def scenario(similarity: Similarity) -> None:
        owner = await store(similarity, tmp_path, 1)
        await similarity.load([owner])
        order: list[str] = []

        async def look(name: str, text: str) -> None:
            await similarity.judge_conversation([text], {owner: 0.7})
            order.append(name)

        long_text = "\n".join(f"This is line number {i} of a long and dull report about weather." for i in range(400))
        await asyncio.gather(look("long", long_text), asyncio.sleep(0.2, None), _later(0.2, lambda: look("short", "Hello there.")))
        assert order == ["short", "long"]

    run(tmp_path, scenario)


async def _later(seconds: float, start: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(seconds)
    await start()


def test_a_text_that_cannot_be_embedded_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(similarity: Similarity) -> None:
        owner = await store(similarity, tmp_path, 1)
        await similarity.load([owner])
        assert similarity._encoder is not None
        embed = similarity._encoder.embed

        def fail_on_poison(texts: list[str]) -> object:
            if any("poison" in text for text in texts):
                raise RuntimeError("cannot embed this")
            return embed(texts)

        monkeypatch.setattr(similarity._encoder, "embed", fail_on_poison)
        texts = ["Where is lamp number 1 of Orsolya Vendt?", "poison", "What is the capital of France?"]
        results = await asyncio.gather(
            *(similarity.judge_conversation([text], {owner: 0.7}) for text in texts), return_exceptions=True
        )
        assert isinstance(results[1], EncoderUnavailable)
        assert len(results[0]) == 1 and results[2] == []  # type: ignore[arg-type]

    run(tmp_path, scenario)


def test_sets_in_force_stay_whatever_else_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "KEPT", 2)

    async def scenario(similarity: Similarity) -> None:
        owners = [await store(similarity, tmp_path, i) for i in range(5)]
        await similarity.load(owners[:4])
        await similarity.load(also=[owners[4]])
        for i, owner in enumerate(owners[:4]):
            assert await similarity.judge_conversation([f"Where is lamp number {i} of Orsolya Vendt?"], {owner: 0.7})
        await similarity.load(owners[:1])
        assert await similarity.judge_conversation(["Where is lamp number 0 of Orsolya Vendt?"], {owners[0]: 0.7})

    run(tmp_path, scenario)


def test_a_damaged_file_closes_its_own_set_only(tmp_path: Path) -> None:
    async def scenario(similarity: Similarity) -> None:
        good, bad = await store(similarity, tmp_path, 1), await store(similarity, tmp_path, 2)
        path = artifact_path(tmp_path, ArtifactRef("gate", bad))
        path.write_bytes(path.read_bytes()[:-20])
        await similarity.load([good, bad])
        assert await similarity.judge_conversation(["Where is lamp number 1 of Orsolya Vendt?"], {good: 0.7})
        with pytest.raises(EncoderUnavailable, match="not loaded"):
            await similarity.judge_conversation(["anything"], {bad: 0.7})

    run(tmp_path, scenario)


def test_without_an_encoder_everything_is_refused_with_what_to_install(tmp_path: Path) -> None:
    async def main() -> None:
        for directory, said in ((None, "LETHE_ENCODER"), (tmp_path, str(tmp_path))):
            similarity = Similarity(directory, tmp_path)
            await similarity.start()
            with pytest.raises(EncoderUnavailable, match=said):
                await similarity.judge_conversation(["anything"], {})
            assert similarity.fingerprint(a_set(1)) is None
            await similarity.stop()

    asyncio.run(main())


def test_text_that_would_take_too_long_to_read_is_an_error_and_not_a_miss(tmp_path: Path) -> None:
    async def scenario(similarity: Similarity) -> None:
        owner = await store(similarity, tmp_path, 1)
        await similarity.load([owner])
        with pytest.raises(TooMuchToRead, match="sentences"):
            await similarity.judge_conversation(["\n".join(f"Line {i} is short." for i in range(6_000))], {owner: 0.7})

    run(tmp_path, scenario)


def test_turns_are_what_lies_between_special_tokens_without_the_names_of_roles() -> None:
    tokens = [b"<s>", b"user\n", b"Hello ", b"there", b"</s>", b"\n", b"assistant\n", b"Hi", b"user"]
    vocabulary = Vocabulary(tokens, special_ids=[0, 4])
    assert turns_of([0, 1, 2, 3, 4, 5, 0, 6, 7, 4, 0, 8, 4, 0, 6], vocabulary) == ["Hello there", "Hi"]
    assert turns_of([], vocabulary) == []
