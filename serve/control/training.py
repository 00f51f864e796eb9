"""Training jobs: one process per assistant or steering artifact, beside the server, which goes on serving.

A job is a directory: what to train, how far it is, its checkpoints, or why it failed. So a job outlives the server: one that was
interrupted goes on from its last checkpoint when the server starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from guards.forget_set import ForgetSet, Question, is_name
from guards.kinds import TrainingOrder
from serve.registry.records import UnknownName

logger = logging.getLogger(__name__)

_JOB, _PROGRESS, _ERROR, _RESULT = "job.json", "progress.json", "error.txt", "result.safetensors"
_PAUSED = "stopped on request; the same order again goes on from the last checkpoint"
Adopt = Callable[[str, str, Path, str], Awaitable[None]]


class Trainer:
    """Runs jobs, one at a time: two would only share the same processors.

    Args:
        directory: where jobs live.
        model: the served model's directory.
        adopt: called with a set's name, the fingerprint of the content that was trained on, the file, and what made it.
        niceness: of the processes that train, 0 to 19: how far they stand behind answers where processors are busy.
    """

    def __init__(self, directory: Path, model: Path, adopt: Adopt, niceness: int = 19) -> None:
        self._directory = directory
        self._model = model
        self._adopt = adopt
        self._niceness = niceness
        self._turn = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, and their processes perhaps not gone yet

    def _place(self, name: str) -> Path:
        """Where a set's job is. Raises UnknownName for what no set can be called, and what might lead elsewhere."""
        if not is_name(name):
            raise UnknownName(f"there is no forget set {name[:80]!r}; names are 1 to 63 of a-z, 0-9, _ and -")
        return self._directory / name

    def resume(self, existing: Collection[str]) -> None:
        """Go on with every job that neither succeeded nor failed, and delete those of sets that are gone."""
        for work in sorted(self._directory.glob("*")):
            if work.name not in existing:
                shutil.rmtree(work, ignore_errors=True)
            elif (work / _JOB).exists() and not (work / _ERROR).exists():
                self.run(work.name)

    async def halt(self, name: str) -> None:
        """Stop a set's training and wait until its process is gone. `run` goes on with it."""
        if task := self._tasks.pop(name, None):
            task.cancel()
            await asyncio.wait([task])

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
        work = self._place(content.name)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in (_ERROR, _RESULT, _PROGRESS):
            (work / stale).unlink(missing_ok=True)
        temporary = work / f".{_JOB}"
        temporary.write_text(json.dumps(job), "utf-8")
        os.replace(temporary, work / _JOB)

    def busy_with(self, name: str) -> tuple[str, str] | None:
        """Program and method of a set's job that waits or runs; None if there is none."""
        if name not in self._tasks:
            return None
        try:
            job = json.loads((self._place(name) / _JOB).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return job["program"], job.get("method") or job["recipe"].get("method", "contrast")

    def pause(self, name: str) -> None:
        """Stop a set's training for now."""
        place = self._place(name)
        if task := self._tasks.pop(name, None):
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            (place / _ERROR).write_text(_PAUSED, "utf-8")

    async def cancel(self, name: str) -> None:
        """Stop a set's training and forget all about it."""
        await self.halt(name)
        await asyncio.to_thread(shutil.rmtree, self._place(name), ignore_errors=True)

    async def stop(self) -> None:
        """Stop all processes; `resume` goes on with their jobs."""
        tasks = [*self._tasks.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def describe(self, name: str) -> dict[str, Any] | None:
        """Where a set's training stands: status ``waiting``, ``running`` or ``failed``; None if there is none."""
        work = self._place(name)
        if not (work / _JOB).exists():
            return None
        with contextlib.suppress(OSError):
            return {"status": "failed", "reason": (work / _ERROR).read_text("utf-8")}
        try:
            return {"status": "running", **json.loads((work / _PROGRESS).read_text("utf-8"))}
        except (OSError, ValueError):
            return {"status": "waiting"}

    def run(self, name: str) -> None:
        """Start a job that was written down, in place of the same set's earlier one."""
        if earlier := self._tasks.pop(name, None):
            earlier.cancel()
        task = self._tasks[name] = asyncio.create_task(self._work(name, earlier))
        task.add_done_callback(lambda done: self._tasks.pop(name, None) if self._tasks.get(name) is done else None)

    async def _work(self, name: str, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])  # its process must be gone before ours writes the same files
        work = self._place(name)
        async with self._turn:
            try:
                job = json.loads((work / _JOB).read_text("utf-8"))
                status, said = await self._train(work, job["program"])
                if status == 0:
                    await self._adopt(name, job["fingerprint"], work / _RESULT, job["program"])
                    shutil.rmtree(work, ignore_errors=True)
                    return
                if status < 0:
                    reason = (
                        f"the training process was killed by signal {-status} (9: out of memory, perhaps); "
                        "the same order again goes on from the last checkpoint"
                    )
                else:
                    reason = said.strip().splitlines()[-1] if said.strip() else f"the training process ended with status {status}"
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the job must say so rather than stay "running" for ever
                reason = f"{type(error).__name__}: {error}"
            logger.error("lethe: training for forget set %r failed: %s", name, reason)
            with contextlib.suppress(OSError):
                (work / _ERROR).write_text(reason, "utf-8")

    async def _train(self, work: Path, program: str) -> tuple[int, str]:
        # All processors, and answers come first.
        threads = os.cpu_count() or 1
        spawning = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                "nice",
                "-n",
                str(self._niceness),
                sys.executable,
                "-m",
                program,
                str(work),
                f"--threads={threads}",
                # Where processors are shared, a thread that spins while it waits for a slower one takes that one's time.
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        )
        try:
            process = await asyncio.shield(spawning)  # else a process that is just being started would be left behind
            _, said = await process.communicate()
        except asyncio.CancelledError:
            ending = asyncio.ensure_future(_end(spawning))
            while not ending.done():  # whoever cancels us again meanwhile must not leave the process behind
                with contextlib.suppress(asyncio.CancelledError, OSError):  # one that could not be started has ended, too
                    await asyncio.shield(ending)
            raise
        assert process.returncode is not None
        return process.returncode, said.decode("utf-8", "replace")


async def _end(spawning: asyncio.Future[asyncio.subprocess.Process]) -> None:
    """Kill a process and wait until it is gone."""
    process = await spawning
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()
