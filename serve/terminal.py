"""What a person sees of a server: a few lines of ours, with progress while it starts; the engine's log goes to a file.

File descriptors are redirected, not loggers: libraries, the engine's process and what is compiled write to them directly. Warnings
and errors of our own modules appear on the terminal as well.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.status import Status

from serve.lock import private_directory

LOG = "serve.log"
_SHOWN_LINES = 12
_OURS = ("serve", "guards")


class Terminal:
    """Says how far the start is. With ``log`` None nothing is redirected (``--verbose``)."""

    def __init__(self, console: Console, log: Path | None) -> None:
        self._console, self.log = console, log
        self._status: Status | None = None
        self._step, self._since = "", 0.0

    def step(self, what: str) -> None:
        """A step of the start begins; the one before is done."""
        self._done()
        self._step, self._since = what, time.monotonic()
        if self._console.is_terminal and self.log is not None:
            self._status = self._console.status(what)
            self._status.start()
        else:
            self.say(f"{what} ...")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(f"lethe: {line}", soft_wrap=True)

    def _done(self) -> None:
        if self._status is not None:
            self._status.stop()
            self.say(f"{self._step}: {time.monotonic() - self._since:.1f} s")
        self._status = None

    def ready(self, lines: list[str]) -> None:
        """The start is over."""
        self._done()
        for line in lines:
            self.say(line)

    def end(self) -> None:
        """Leave no spinner behind."""
        if self._status is not None:
            self._status.stop()
        self._status = None

    def fail(self, why: str) -> NoReturn:
        """End the process with a reason."""
        self.end()
        self.say(why)
        raise SystemExit(1)

    def last_words(self) -> str:
        """The last errors in the log, for whoever would have to look there."""
        if self.log is None:
            return ""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        telling = [line for line in lines if _TELLING.search(line)]
        return "\n".join(line[:500] for line in (telling or lines)[-_SHOWN_LINES:])


_TELLING = re.compile(r"\b\w*(?:Error|Exception)\b: |\bERROR\b|^lethe: |^usage: |error: ")


class _Warnings(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.say(record.getMessage().removeprefix("lethe: "))


def plain_terminal() -> Terminal:
    """Nothing is redirected."""
    return Terminal(Console(stderr=True, markup=False, highlight=False), None)


def quiet_terminal(log: Path) -> Terminal:
    """Redirect what this process and its children write into STATE/logs/FILE, until they end; the file before is kept as ``.1``.

    Raises:
        OSError: the file cannot be written.
    """
    private_directory(log.parent.parent)  # the state directory, if this is the first to be put there
    private_directory(log.parent)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
    terminal = Terminal(Console(file=stream, markup=False, highlight=False), log)
    sys.stdout.flush()
    sys.stderr.flush()
    for place in (1, 2):  # for good: interpreters have something to say at their very end, too
        os.dup2(file, place)
    os.close(file)
    for name in _OURS:
        logging.getLogger(name).addHandler(_Warnings(terminal))
    return terminal
