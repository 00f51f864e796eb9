"""Dropping a set's texts: they are gone from every file, what was made from them stays in force, nothing asks for them again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from guards.forget_set import ForgetSet, Question
from guards.policy import parse_policy
from guards.similarity.encoder import bundled_encoder
from guards.suppression.declaration import Suppress
from serve.control.control import Control
from serve.control.gate_fitting import GateOrder
from serve.control.similarity import Similarity
from serve.registry.records import NotReady, Stripped
from serve.registry.store import Registry
from tests.serve.control.test_control import VOCABULARY, Engine

pytestmark = pytest.mark.skipif(bundled_encoder() is None, reason="the bundled encoder is not installed")
SECRET = "Thirty-one copper lanterns under the mill of Karlsgrube"
CONTENT = ForgetSet(
    name="a",
    description="about " + SECRET,
    phrases=("copper lantern",),
    aliases=("Orsolya Vendt",),
    questions=(Question(question="What did Orsolya Vendt hide?", answer=SECRET),),
)


async def start(directory: Path) -> tuple[Control, Registry, Similarity]:
    registry, artifacts = Registry(directory / "lethe.db"), directory / "artifacts"
    similarity = Similarity(bundled_encoder(), artifacts)
    control = Control(registry, VOCABULARY, artifacts, Engine().load, similarity, 20)
    await control.start()
    return control, registry, similarity


def files_with(text: str, directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


async def touched(control: Control, similarity: Similarity) -> bool:
    plan = control.snapshot.text_plans["gated"]
    assert plan is not None
    return bool(
        await similarity.judge_conversation(
            ["What did she hide under the mill of Karlsgrube? Copper lanterns?"], dict.fromkeys(plan.sets, 0.6)
        )
    )


def test_the_texts_are_nowhere_on_disk_and_the_set_stays_in_force(tmp_path: Path) -> None:
    async def scenario() -> None:
        control, registry, similarity = await start(tmp_path)
        await control.put_policy(parse_policy({"name": "gated", "guards": {"gate": {"on_hit": "refuse"}}}), actor="test")
        await control.create(CONTENT, actor="test")
        assert files_with(SECRET, tmp_path), "it never was on disk: the test says nothing"
        await control.enable("a", actor="test")
        await control.strip("a", actor="test")
        assert files_with(SECRET, tmp_path) == []
        assert control.snapshot.plan("default").artifacts_of(Suppress) and await touched(control, similarity)
        with pytest.raises(Stripped, match="PUT"):
            registry.content("a")
        with pytest.raises(Stripped):
            await control.fit_gate("a", GateOrder(), actor="test")
        revision = registry.revision()
        assert await control.strip("a", actor="test") == revision, "it was stripped already"
        await control.stop()
        registry.close()

        control, registry, similarity = await start(tmp_path)
        assert "a" in control.snapshot.sets and await touched(control, similarity)
        assert control.snapshot.plan("default").artifacts_of(Suppress)
        await control.replace(CONTENT.model_copy(update={"phrases": ("another phrase",)}), actor="test")
        assert registry.content("a").phrases == ("another phrase",) and not registry.forget_set("a").stripped
        await control.stop()
        registry.close()

    asyncio.run(scenario())


def test_a_set_that_is_not_embedded_yet_keeps_its_texts(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "lethe.db")
    registry.create_set(CONTENT, actor="test")
    with pytest.raises(NotReady, match="embedded"):
        registry.strip_set("a", actor="test")
    assert registry.content("a") == CONTENT
    registry.close()
