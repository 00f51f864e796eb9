"""Control: the order of changes, builds that fail or are interrupted, other processes, expiry."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from guards.contrastive.declaration import Contrast
from guards.errors import InvalidArtifact
from guards.forget_set import ForgetSet
from guards.policy import parse_policy
from guards.steering.declaration import Steer
from guards.suppression.declaration import Suppress
from guards.suppression.vocabulary import Vocabulary
from guards.types import ArtifactRef
from serve.control.control import Control
from serve.control.similarity import Similarity
from serve.protocol.artifacts import artifact_path
from serve.registry.records import Artifact, NotReady, now
from serve.registry.store import Registry

VOCABULARY = Vocabulary([bytes([i]) for i in range(256)], special_ids=[])
OTHER_VOCABULARY = Vocabulary([bytes([255 - i]) for i in range(256)], special_ids=[])


class Engine:
    """Remembers what it was told to load, and what was in force at that moment."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.failure: str | None = None
        self.control: Control | None = None

    async def load(self, artifacts: Collection[ArtifactRef]) -> dict[str, str]:
        phrases = [artifact.fingerprint for artifact in artifacts if artifact.guard == "suppression"]
        if self.control is not None:
            in_force = self.control.snapshot.plan("default").artifacts_of(Suppress)
            assert not set(phrases) & set(in_force), "in force before it was loaded"
        self.loaded += phrases
        return dict.fromkeys(phrases, self.failure) if self.failure else {}


def run(
    directory: Path,
    scenario: Callable[[Control, Engine], Awaitable[None]],
    vocabulary: Vocabulary = VOCABULARY,
    refresh_ms: int = 20,
) -> None:
    async def main() -> None:
        registry, engine = Registry(directory / "lethe.db"), Engine()
        artifacts = directory / "artifacts"
        control = Control(registry, vocabulary, artifacts, engine.load, Similarity(None, artifacts), refresh_ms)
        await control.start()
        engine.control = control
        try:
            await scenario(control, engine)
        finally:
            await control.stop()
            registry.close()

    asyncio.run(main())


def a_set(name: str = "a", *phrases: str, **fields: Any) -> ForgetSet:
    return ForgetSet(name=name, phrases=phrases or ("secret",), **fields)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def test_an_artifact_is_loaded_before_it_is_in_force(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        await control.create(a_set(), actor="t")
        revision = await control.enable("a", actor="t")  # waits for the build
        plan = control.snapshot.plan("default")
        assert plan.revision == revision
        assert list(plan.artifacts_of(Suppress)) == engine.loaded
        assert [hit.text for hit in await control.check("a SECRET", "default") if hit.in_force] == ["SECRET"]
        await control.disable("a", actor="t")
        assert [hit.in_force for hit in await control.check("a SECRET", "default")] == [False]

    run(tmp_path, scenario)


def test_a_worker_that_cannot_load_keeps_the_set_disabled(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        await control.create(a_set(), actor="t")
        engine.failure = "no room"
        with pytest.raises(NotReady, match="no room"):
            await control.enable("a", actor="t")
        assert not control.snapshot.sets

    run(tmp_path, scenario)


def test_replacing_an_enabled_set_leaves_no_gap(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        await control.create(a_set(), actor="t")
        await control.enable("a", actor="t")
        before = control.snapshot.plan("default").artifacts_of(Suppress)
        await control.replace(a_set("a", "other"), actor="t")
        after = control.snapshot.plan("default").artifacts_of(Suppress)
        assert after != before
        assert len(after) == 1
        with pytest.raises(NotReady, match="no policy would enforce the new content"):
            await control.replace(ForgetSet(name="a", texts=["x"]), actor="t")
        assert control.snapshot.plan("default").artifacts_of(Suppress) == after

    run(tmp_path, scenario)


def test_a_failed_build_is_reported_and_cannot_be_enabled(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        (tmp_path / "artifacts").write_text("in the way")  # as a full or read-only disk would be
        await control.create(a_set(), actor="t")
        with pytest.raises(NotReady, match="failed"):
            await control.enable("a", actor="t")
        artifact = control._registry.forget_set("a").artifact("phrases")
        assert artifact is not None
        assert (artifact.status, bool(artifact.detail)) == ("failed", True)

    run(tmp_path, scenario)


def test_a_build_interrupted_by_a_crash_is_made_up_for_at_the_next_start(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "lethe.db")
    registry.create_set(a_set(), actor="t")
    registry.close()

    async def scenario(control: Control, engine: Engine) -> None:
        await until(lambda: getattr(control._registry.forget_set("a").artifact("phrases"), "status", "") == "ready")

    run(tmp_path, scenario)


def test_enabled_sets_are_compiled_for_the_model_that_is_served_now(tmp_path: Path) -> None:
    async def enable(control: Control, engine: Engine) -> None:
        await control.create(a_set(), actor="t")
        await control.enable("a", actor="t")

    async def other_model(control: Control, engine: Engine) -> None:
        (fingerprint,) = control.snapshot.plan("default").artifacts_of(Suppress)
        assert engine.loaded == [fingerprint]
        assert control.phrases(fingerprint).vocabulary == OTHER_VOCABULARY.fingerprint

    run(tmp_path, enable)
    run(tmp_path, other_model, OTHER_VOCABULARY)


def test_a_damaged_artifact_is_rebuilt_at_start(tmp_path: Path) -> None:
    async def enable(control: Control, engine: Engine) -> None:
        await control.create(a_set(), actor="t")
        await control.enable("a", actor="t")

    async def check(control: Control, engine: Engine) -> None:
        (fingerprint,) = control.snapshot.plan("default").artifacts_of(Suppress)
        assert control.phrases(fingerprint).find("secret")

    run(tmp_path, enable)
    (path,) = (tmp_path / "artifacts" / "phrases").iterdir()
    path.write_bytes(b"damaged")
    run(tmp_path, check)
    assert os.listdir(path.parent) == [path.name], "a temporary file was left behind"


def test_files_that_no_set_refers_to_are_swept_away_at_start_and_no_others(tmp_path: Path) -> None:
    async def create(control: Control, engine: Engine) -> None:
        for name in ("a", "b"):
            await control.create(a_set(name, name), actor="t")
            await control.enable(name, actor="t")
        await control.delete("a", actor="t")

    async def nothing(control: Control, engine: Engine) -> None:
        assert len(control.snapshot.phrases) == 1

    run(tmp_path, create)
    assert len(os.listdir(tmp_path / "artifacts" / "phrases")) == 2
    run(tmp_path, nothing)
    assert len(os.listdir(tmp_path / "artifacts" / "phrases")) == 1


def test_changes_by_another_process_are_followed(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        await control.create(a_set(), actor="t")
        await control.enable("a", actor="t")
        other = Registry(tmp_path / "lethe.db")
        revision = await asyncio.to_thread(other.disable, "a", actor="other")
        await until(lambda: control.snapshot.revision == revision)
        assert control.snapshot.plan("default").artifacts_of(Suppress) == ()
        other.close()

    run(tmp_path, scenario)


def test_an_expired_set_leaves_force_and_the_audit_says_why(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        await control.create(a_set(expires_at=datetime.now(UTC) + timedelta(seconds=0.4)), actor="t")
        await control.enable("a", actor="t")
        assert control.snapshot.sets
        await until(lambda: not control.snapshot.sets)
        row = control._registry.audit()[-1]
        assert (row.action, row.actor) == ("forget_set.disable", "server")
        assert "expired" in row.detail["reason"]

    run(tmp_path, scenario)


def test_missing_phrases_are_an_error_not_an_empty_list(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        with pytest.raises(InvalidArtifact, match="cannot be read"):
            control.phrases("0" * 64)
        assert not artifact_path(tmp_path, ArtifactRef("suppression", "0")).exists()

    run(tmp_path, scenario)


def test_an_assistant_that_no_worker_can_load_does_not_keep_the_server_from_starting(tmp_path: Path) -> None:
    """It was made for the model that was served before: the set stays in force, its requests are refused, with the reason."""
    registry = Registry(tmp_path / "lethe.db")
    content = ForgetSet(name="a", questions=[{"question": "q", "answer": "a"}])
    registry.create_set(content, actor="t")
    registry.put_trained("a", content.fingerprint, Artifact("assistant", "foreign", "ready", "", now()), actor="t")
    registry.enable("a", actor="t")

    async def refuse(artifacts: Collection[ArtifactRef]) -> dict[str, str]:
        return {artifact.fingerprint: "made for another model" for artifact in artifacts}

    async def main() -> None:
        similarity = Similarity(None, tmp_path / "artifacts")
        control = Control(registry, VOCABULARY, tmp_path / "artifacts", refuse, similarity, 20)
        await control.start()
        try:
            assert [each.assistant for each in control.snapshot.plan("default").of(Contrast)] == ["foreign"]
            assert control.in_force.unavailable == {"foreign": "made for another model"}
        finally:
            await control.stop()
            registry.close()

    asyncio.run(main())


def test_a_replaced_set_keeps_its_assistant_and_says_that_it_is_of_earlier_content(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        registry = Registry(tmp_path / "lethe.db")
        content = ForgetSet(name="a", questions=[{"question": "q", "answer": "a"}])
        await control.create(content, actor="t")
        registry.put_trained("a", content.fingerprint, Artifact("assistant", "made", "ready", "figures", now()), actor="t")
        with pytest.raises(NotReady, match="another assistant"):
            registry.put_calibration("a", 1.5, {}, actor="t", measured="the one before")
        evidence = {"reference": 0.3, "strength": "nonsense", "plausibility": "nonsense"}
        registry.put_calibration("a", 1.5, evidence, actor="t", plausibility=0.02)
        await control.enable("a", actor="t")
        (entry,) = control.snapshot.plan("default").of(Contrast)
        assert (entry.alpha, entry.plausibility) == (1.5, 0.02), "the policy leaves both to the set"
        registry.put_calibration("a", 1.75, evidence, actor="t", measured="made")
        vectors = Artifact("similarity", "vectors", "ready", "", now())
        registry.put_trained("a", content.fingerprint, vectors, actor="t")
        with pytest.raises(NotReady, match="another similarity"):
            registry.put_calibration("a", 1.5, {}, actor="t", corrupt="zero_out_top_k", measured="the one before")
        registry.put_calibration("a", 1.25, {}, actor="t", corrupt="zero_out_top_k", measured=vectors.fingerprint)
        registry.put_calibration("a", 1.75, {}, actor="t", corrupt="rand_noise_first_n")
        kinds = {"zero_out_top_k": 1.25, "rand_noise_first_n": 1.75}

        def corruption() -> dict[str, float]:
            measured = registry.snapshot().sets["a"].measured.get("corruption", {})
            return {kind: found["strength"] for kind, found in measured.items()}

        assert corruption() == kinds, "one kind does not undo another"
        with pytest.raises(NotReady, match="lethe train a --method steer"):
            registry.put_calibration("a", 0.5, {}, actor="t", steering="steer")
        registry.put_trained("a", content.fingerprint, Artifact("steer", "map", "ready", "", now()), actor="t")
        registry.put_calibration("a", 0.5, {}, actor="t", steering="steer", measured="map")
        assert registry.snapshot().sets["a"].measured["steer_strength"]["strength"] == 0.5
        await control.replace(ForgetSet(name="a", questions=[{"question": "q", "answer": "b"}]), actor="t")
        replaced = registry.forget_set("a").header["fingerprint"]
        registry.put_trained("a", replaced, Artifact("similarity", "other", "ready", "", now()), actor="t")
        assert corruption() == {}, "measured on other vectors"
        plan = control.snapshot.plan("default")
        assert [(each.assistant, each.alpha, each.plausibility) for each in plan.of(Contrast)] == [("made", 1.75, 0.006)]
        assistant = registry.forget_set("a").artifact("assistant")
        assert assistant is not None
        assert assistant.detail == "figures; trained on earlier content"
        with pytest.raises(NotReady, match="replaced while"):
            registry.put_trained("a", content.fingerprint, assistant, actor="t")
        await control.put_policy(parse_policy({"name": "p", "guards": {"contrast": {"alpha": 0}}}), actor="t")
        assert control.snapshot.plan("p").of(Contrast) == ()
        assert not control.snapshot.plan("p").engages
        registry.close()

    run(tmp_path, scenario)


def test_a_set_is_in_force_by_steering_only_where_a_policy_steers(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        registry = Registry(tmp_path / "lethe.db")
        content = ForgetSet(name="a", questions=[{"question": "q", "answer": "a"}])
        await control.create(content, actor="t")
        registry.put_trained("a", content.fingerprint, Artifact("adapter", "made", "ready", "", now()), actor="t")
        with pytest.raises(NotReady, match="steers"):
            await control.enable("a", actor="t")
        await control.put_policy(parse_policy({"name": "p", "guards": {"steering": [{"method": "adapter"}]}}), actor="t")
        await control.enable("a", actor="t")
        assert [each.artifact for each in control.snapshot.plan("p").of(Steer)] == ["made"]
        assert not control.snapshot.plan("default").engages
        registry.close()

    run(tmp_path, scenario)
