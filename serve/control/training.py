"""Training jobs: an assistant or a steering artifact for each, made beside the server.

A job also holds its checkpoints: one that was interrupted goes on from the last. When it has succeeded, nothing is left of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from guards.forget_set import ForgetSet, Question
from guards.kinds import TrainingOrder
from serve.control.jobs import ERROR, JOB, PROGRESS, Jobs

_RESULT = "result.safetensors"
Adopt = Callable[[str, str, Path, str], Awaitable[None]]


class Trainer(Jobs):
    """Runs training jobs.

    Args:
        directory, niceness: see `Jobs`.
        model: the served model's directory.
        adopt: called with a set's name, the fingerprint of the content that was trained on, the file, and what made it.
    """

    what = "training"
    paused = "stopped on request; the same order again goes on from the last checkpoint"

    def __init__(self, directory: Path, model: Path, adopt: Adopt, niceness: int = 19) -> None:
        super().__init__(directory, niceness)
        self._model = model
        self._adopt = adopt

    def submit_files(self, program: str, method: str, content: ForgetSet, retain: Sequence[Question], order: TrainingOrder) -> None:
        """Write a job down, for `run`. Blocking. The same job again goes on from its checkpoint; another starts anew."""
        job = {
            "program": program,
            "method": method,
            "model": str(self._model),
            "fingerprint": content.fingerprint,
            "forget_set": content.model_dump(mode="json"),
            "retain": [entry.model_dump(mode="json") for entry in retain],
            **order.model_dump(mode="json", exclude={"retain"}),
        }
        work = self.place(content.name)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in (ERROR, _RESULT, PROGRESS):
            (work / stale).unlink(missing_ok=True)
        temporary = work / f".{JOB}"
        temporary.write_text(json.dumps(job), "utf-8")
        os.replace(temporary, work / JOB)

    def busy_with(self, name: str) -> tuple[str, str] | None:
        """Program and method of a set's job that waits or runs; None if there is none."""
        if not self.busy(name):
            return None
        try:
            job = json.loads((self.place(name) / JOB).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return job["program"], job.get("method") or job["recipe"].get("method", "contrast")

    def describe(self, name: str) -> dict[str, Any] | None:
        """Where a set's training stands: status ``waiting``, ``running`` or ``failed``; None if there is none."""
        work = self.place(name)
        if not (work / JOB).exists():
            return None
        if (reason := self.failure(name)) is not None:
            return {"status": "failed", "reason": reason}
        try:
            return {"status": "running", **json.loads((work / PROGRESS).read_text("utf-8"))}
        except (OSError, ValueError):
            return {"status": "waiting"}

    async def carry_out(self, name: str, work: Path) -> None:
        job = json.loads((work / JOB).read_text("utf-8"))
        threads = os.cpu_count() or 1  # all processors, and answers come first
        await self.run_process([sys.executable, "-m", job["program"], str(work), f"--threads={threads}"], {})
        await self._adopt(name, job["fingerprint"], work / _RESULT, job["program"])
        shutil.rmtree(work, ignore_errors=True)
