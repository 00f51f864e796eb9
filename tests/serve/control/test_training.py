"""Training jobs: what is refused, and what a stopped one leaves behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from guards.base_model import BaseModel
from guards.catalogue import GUARDS
from guards.contrastive.assistant import AssistantOrder
from guards.errors import Untrainable
from guards.forget_set import ForgetSet
from guards.steering.artifact import DistillationTarget, SteeringOrder, SteeringRecipe
from serve.control.control import Control
from serve.control.similarity import Similarity
from serve.control.training import Trainer
from serve.registry.records import NotReady, UnknownName
from serve.registry.store import Registry
from tests.serve.control.test_control import VOCABULARY, Engine, run, until


def test_training_is_refused_where_it_cannot_work(tmp_path: Path) -> None:
    async def scenario(control: Control, engine: Engine) -> None:
        await control.create(ForgetSet(name="a", questions=[{"question": "q", "answer": "a"}]), actor="t")
        with pytest.raises(Untrainable, match="no assistant can be trained"):
            await control.train(GUARDS["contrast"], "a", AssistantOrder())
        assert control.training("a") is None

    run(tmp_path, scenario)


def test_steering_is_refused_where_it_cannot_be_made(tmp_path: Path) -> None:
    target = DistillationTarget(question="q", tokens=(1, 2), top=(((1, -0.1),),))

    async def main() -> None:
        registry, artifacts = Registry(tmp_path / "lethe.db"), tmp_path / "artifacts"
        base = BaseModel(fingerprint="f", layers=6, hidden_size=4, vocabulary=9)
        control = Control(
            registry, VOCABULARY, artifacts, Engine().load, Similarity(None, artifacts), 20, model=tmp_path / "none", base=base
        )
        await control.start()

        async def steer(**order: Any) -> None:
            await control.train(GUARDS["steering"], "a", SteeringOrder(**order))

        try:
            await control.create(ForgetSet(name="a", questions=[{"question": "q", "answer": "a"}]), actor="t")
            adapter, project = (SteeringRecipe(method=method, layers=2) for method in ("adapter", "project"))
            with pytest.raises(Untrainable, match="6; adapt fewer"):
                await steer(recipe=SteeringRecipe(method="adapter", layers=6))
            with pytest.raises(Untrainable, match="nothing to distil"):
                await steer(recipe=adapter, distil=True)
            with pytest.raises(Untrainable, match="into an adapter"):
                await steer(recipe=project, targets=(target,), distil=True)
            with pytest.raises(Untrainable, match="2 tokens and 1 distributions"):
                await steer(recipe=adapter, targets=(target,), distil=True)
            await steer(recipe=project)
            with pytest.raises(NotReady, match="by method project"):
                await control.train(GUARDS["contrast"], "a", AssistantOrder())
            await control.pause_training("a")
        finally:
            await control.stop()
            registry.close()

    asyncio.run(main())


def test_a_job_that_is_stopped_twice_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First by whoever pauses it, then by the server that ends: both at once."""
    started: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def spawn_sleeper(*_: str, **options: Any) -> asyncio.subprocess.Process:
        started.append(await spawn(sys.executable, "-c", "import time; time.sleep(600)", **options))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn_sleeper)

    async def main() -> None:
        async def adopt(*_: Any) -> None:
            raise AssertionError("nothing was made")

        trainer = Trainer(tmp_path / "training", tmp_path / "model", adopt)
        content = ForgetSet(name="a", questions=[{"question": "q", "answer": "a"}])
        trainer.submit_files("guards.contrastive.train", "contrast", content, [], AssistantOrder())
        trainer.run("a")
        await until(lambda: bool(started))
        [task] = trainer._tasks.values()
        trainer.pause("a")
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        await trainer.stop()
        assert started[0].returncode is not None

    asyncio.run(main())


@pytest.mark.parametrize("name", ["..", ".", "a/../..", "a" * 500, "", "\0"])
def test_a_name_that_leads_elsewhere_throws_nothing_away(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept"
    kept.write_text("state")
    (tmp_path / "training").mkdir()
    trainer = Trainer(tmp_path / "training", tmp_path, _nobody)
    for use in (trainer.describe, trainer.pause):
        with pytest.raises(UnknownName):
            use(name)
    with pytest.raises(UnknownName):
        asyncio.run(trainer.cancel(name))
    assert kept.exists()

    async def scenario(control: Control, engine: Engine) -> None:
        for change in (control.strip, control.delete, control.enable, control.disable):
            with pytest.raises(UnknownName):
                await change(name, actor="t")

    run(tmp_path, scenario)
    assert kept.exists()


async def _nobody(*_: object) -> None:
    raise AssertionError("nothing was trained")
