"""Long work beside the server, which goes on serving: one job for a forget set, one job at a time, each in a process of its own.

A job is a directory: what is to be done, how far it is, or why it failed. So a job outlives the server: one that was interrupted
goes on when the server starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from guards.forget_set import is_name
from serve.registry.records import UnknownName

logger = logging.getLogger(__name__)

JOB, ERROR, PROGRESS = "job.json", "error.txt", "progress.json"


class JobFailed(Exception):
    """Why, for people."""


class Jobs(ABC):
    """Runs jobs of one kind, one at a time: two would only share the same processors.

    Args:
        directory: where jobs live.
        niceness: of their processes, 0 to 19: how far they stand behind answers where processors are busy.
    """

    what = "job"
    paused = "stopped on request; the same order again goes on"

    def __init__(self, directory: Path, niceness: int) -> None:
        self._directory = directory
        self._niceness = niceness
        self._turn = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, and their processes perhaps not gone yet

    @abstractmethod
    async def carry_out(self, name: str, work: Path) -> None:
        """Do what ``work / JOB`` says, and take that file away.

        Raises:
            JobFailed: it cannot be done.
        """

    def place(self, name: str) -> Path:
        """Where a set's job is. Raises UnknownName for what no set can be called, and what might lead elsewhere."""
        if not is_name(name):
            raise UnknownName(f"there is no forget set {name[:80]!r}; names are 1 to 63 of a-z, 0-9, _ and -")
        return self._directory / name

    def resume(self, existing: Collection[str]) -> None:
        """Go on with every job that neither succeeded nor failed, and delete those of sets that are gone."""
        for work in sorted(self._directory.glob("*")):
            if work.name not in existing:
                shutil.rmtree(work, ignore_errors=True)
            elif (work / JOB).exists() and not (work / ERROR).exists():
                self.run(work.name)

    def busy(self, name: str) -> bool:
        """Whether a set's job waits or runs."""
        return name in self._tasks

    def failure(self, name: str) -> str | None:
        """Why a set's job failed or was stopped; None if it was not."""
        with contextlib.suppress(OSError):
            return (self.place(name) / ERROR).read_text("utf-8")
        return None

    async def halt(self, name: str) -> None:
        """Stop a set's job and wait until its process is gone. `run` goes on with it."""
        if task := self._tasks.pop(name, None):
            task.cancel()
            await asyncio.wait([task])

    def pause(self, name: str) -> None:
        """Stop a set's job for now."""
        place = self.place(name)
        if task := self._tasks.pop(name, None):
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            (place / ERROR).write_text(self.paused, "utf-8")

    async def cancel(self, name: str) -> None:
        """Stop a set's job and forget all about it."""
        await self.halt(name)
        await asyncio.to_thread(shutil.rmtree, self.place(name), ignore_errors=True)

    async def stop(self) -> None:
        """Stop all processes; `resume` goes on with their jobs."""
        tasks = [*self._tasks.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run(self, name: str) -> None:
        """Start a job that was written down, in place of the same set's earlier one."""
        if earlier := self._tasks.pop(name, None):
            earlier.cancel()
        task = self._tasks[name] = asyncio.create_task(self._work(name, earlier))
        task.add_done_callback(lambda done: self._tasks.pop(name, None) if self._tasks.get(name) is done else None)

    async def _work(self, name: str, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])  # its process must be gone before ours writes the same files
        work = self.place(name)
        async with self._turn:
            try:
                await self.carry_out(name, work)
                return
            except asyncio.CancelledError:
                raise
            except JobFailed as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it was, the job must say so rather than stay "running" for ever
                reason = f"{type(error).__name__}: {error}"
            logger.error("lethe: %s for forget set %r failed: %s", self.what, name, reason)
            with contextlib.suppress(OSError):
                (work / ERROR).write_text(reason, "utf-8")

    async def run_process(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a process to its end, with its niceness; killed if we are cancelled. ``environment``: beside the server's.

        Raises:
            JobFailed: it was killed or ended with another status than 0; the last line that it wrote to standard error says why.
        """
        spawning = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *("nice", "-n", str(self._niceness), *command),
                # Where processors are shared, a thread that spins while it waits for a slower one takes that one's time.
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
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
        if process.returncode:
            raise JobFailed(_why(process.returncode, said.decode("utf-8", "replace")))


def _why(status: int, said: str) -> str:
    if status < 0:
        return f"the process was killed by signal {-status} (9: out of memory, perhaps); the same order again goes on where it was"
    return said.strip().splitlines()[-1] if said.strip() else f"the process ended with status {status}"


async def _end(spawning: asyncio.Future[asyncio.subprocess.Process]) -> None:
    """Kill a process and wait until it is gone."""
    process = await spawning
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()
