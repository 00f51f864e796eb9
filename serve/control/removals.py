"""Removals that the server carries out (`POST /lethe/v1/removals`): `lethe unlearn`, run by the server itself.

A removal is a client of this server in a process of its own, with a key of its own while there are keys. Its directory holds the
request, everything that was asked, how far it is and, in the end, the certificate; the same order again goes on where it was. When
the set's texts are dropped, so is what is here, all but certificate and report, which hold none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from guards.forget_set import ForgetSet, Frozen, write_jsonl
from guards.whole_file import write_whole
from serve.control.jobs import ERROR, JOB, PROGRESS, Jobs
from serve.registry.records import NotReady, UnknownName
from serve.registry.snapshot import Limits
from serve.registry.store import Registry

_REQUEST, _DONE, _ANSWERS = "request.jsonl", "done.json", "answers.jsonl"
CERTIFICATE, REPORT, PROBES, PHRASES = "certificate.json", "report.html", "probes.json", "phrases.jsonl"
FILES = {REPORT: "text/html", PROBES: "application/json", PHRASES: "application/jsonl", CERTIFICATE: "application/json"}
"""What may be read of a removal, and as what."""
_LABEL = "lethe: removal of "
"""Of the keys that removals use. Those that a crash has left are revoked at the next start."""


class RemovalOrder(Frozen):
    """How a removal is carried out."""

    neighbours: str = Field("", description="another set, whose answers are to stay as they are")
    goal: Literal["forget", "refuse"] = Field("forget", description="answers as of a model that never knew, or no answers")
    within: str = Field("45m", pattern=r"^\d{1,6}(\.\d{1,3})?[smh]$", description="how long to look for better guards")
    against: str = Field(
        "", max_length=2_000, pattern=r"^(https?://\S+)?$", description="URL of a server that never knew, in place of the estimate"
    )
    reference: float | None = Field(None, ge=0, le=1, description="recall of a model that never knew; estimated if not given")
    force: bool = Field(False, description="add also what nobody is likely to mean")

    @model_validator(mode="after")
    def _check_aim(self) -> RemovalOrder:
        if sum((bool(self.against), self.reference is not None, self.goal == "refuse")) > 1:
            raise ValueError("against, reference and goal=refuse each say what to aim at; name one of them")
        return self


class Removals(Jobs):
    """Runs removals.

    Args:
        directory, niceness: see `Jobs`.
        url: where this server can be reached from this machine; None if it cannot.
    """

    what = "removal"

    def __init__(self, directory: Path, registry: Registry, url: str | None, niceness: int = 19) -> None:
        super().__init__(directory, niceness)
        self._registry = registry
        self._url = url
        self._ordering = asyncio.Lock()

    def resume(self, existing: Collection[str]) -> None:
        """Go on with what was interrupted, and drop what belongs to sets that are gone. A removal may have not yet made its set."""
        for key in self._registry.stored_keys():
            if key.label.startswith(_LABEL):
                self._registry.revoke_key(key.id, actor="removal")
        begun = {work.name for work in self._directory.glob("*") if (work / JOB).exists()}
        super().resume({*existing, *begun})

    async def order(self, content: ForgetSet, order: RemovalOrder) -> None:
        """Begin a removal, or let it go on. Raises what `submit` does."""
        async with self._ordering:  # two orders of one name must not both find that nothing is carried out
            await asyncio.to_thread(self.submit, content, order)
            if not self.busy(content.name):
                self.run(content.name)

    def submit(self, content: ForgetSet, order: RemovalOrder) -> None:
        """Write a removal down, for `run`. Blocking. One that is carried out already goes on undisturbed if it is the same.

        Raises:
            NotReady: the server cannot be reached from itself, or another removal of the set is carried out; UnknownName: there
                are no such neighbours.
        """
        if self._url is None:
            raise NotReady("this server listens where it cannot reach itself (a Unix socket, or TLS); run `lethe unlearn` instead")
        if order.neighbours:
            self._registry.forget_set(order.neighbours)
        work, job = self.place(content.name), {"fingerprint": content.fingerprint, **order.model_dump(mode="json")}
        if self.busy(content.name):
            if json.loads((work / JOB).read_text("utf-8")) != job:
                raise NotReady(f"another removal of {content.name!r} is being carried out; wait, or stop that first")
            return
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in (ERROR, PROGRESS, _DONE):
            (work / stale).unlink(missing_ok=True)
        write_whole(work / _REQUEST, lambda path: path.write_text(write_jsonl(content), "utf-8"))
        write_whole(work / JOB, lambda path: path.write_text(json.dumps(job), "utf-8"))

    def names(self) -> list[str]:
        return sorted(work.name for work in self._directory.glob("*") if (work / JOB).exists() or (work / _DONE).exists())

    def describe(self, name: str) -> dict[str, Any]:
        """Where a removal stands: ``status`` is ``waiting``, ``running``, ``failed`` or ``done``. Raises UnknownName."""
        work = self.place(name)
        try:
            done = (work / _DONE).exists()
            job = json.loads((work / (_DONE if done else JOB)).read_text("utf-8"))
            progress = json.loads((work / PROGRESS).read_text("utf-8")) if (work / PROGRESS).exists() else {}
            certificate = json.loads((work / CERTIFICATE).read_text("utf-8")) if done else None
        except (OSError, ValueError):
            raise UnknownName(f"there is no removal of {name!r}; `GET /lethe/v1/removals` lists them") from None
        reason = self.failure(name)
        status = "done" if done else "failed" if reason is not None else "running" if progress else "waiting"
        shown = {"doing": "", "told": [], "answers": 0, **progress}
        return {"name": name, "status": status, "reason": reason, "order": job, **shown, "certificate": certificate}

    def file(self, name: str, file: str) -> Path:
        """Where one of FILES lies. Raises UnknownName."""
        path = self.place(name) / file
        if file not in FILES or not path.exists():
            raise UnknownName(f"the removal of {name!r} has no {file[:40]!r}; there may be {', '.join(FILES)}")
        return path

    async def strip(self, name: str) -> None:
        """Drop what holds texts. Raises NotReady."""
        if self.busy(name):
            raise NotReady(f"the removal of {name!r} is being carried out; wait until it is done, or stop it first")
        work = self.place(name)
        for file in (_REQUEST, PROBES, PHRASES, PROGRESS, _ANSWERS):
            (work / file).unlink(missing_ok=True)

    async def carry_out(self, name: str, work: Path) -> None:
        assert self._url is not None, "nothing was submitted otherwise"
        job = json.loads((work / JOB).read_text("utf-8"))
        address = urlsplit(self._url)
        await _listening(str(address.hostname), int(address.port or 80))  # what was interrupted goes on while the server starts
        command = [sys.executable, "-m", "serve.cli", "unlearn", name, str(work / _REQUEST), f"--directory={work}", "--yes"]
        command += [f"--goal={job['goal']}", f"--within={job['within']}", *(["--force"] if job["force"] else [])]
        command += [f"--neighbours={job['neighbours']}"] if job["neighbours"] else []
        command += [f"--against={job['against']}"] if job["against"] else []
        command += [] if job["reference"] is None else [f"--reference={job['reference']}"]
        key, secret = "", ""
        try:
            if await asyncio.to_thread(self._registry.stored_keys):
                limits = Limits(in_experiments=False)
                key, secret = await asyncio.to_thread(
                    self._registry.create_key, "admin", _LABEL + name, actor="removal", limits=limits
                )
            await self.run_process(command, {"LETHE_URL": self._url, "LETHE_KEY": secret})
        finally:
            if key:
                with contextlib.suppress(UnknownName):  # somebody was faster
                    await asyncio.shield(asyncio.to_thread(self._registry.revoke_key, key, actor="removal"))
        (work / JOB).rename(work / _DONE)


async def _listening(host: str, port: int) -> None:
    """Wait until somebody listens there."""
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.5)
        else:
            writer.close()
            return
