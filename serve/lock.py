"""One server to a state directory: artifacts in it are compiled for one model, and swept by the server that owns them.

Not the package filelock: it opens its file for writing, and a disk with such a file cannot be made read-only while a server runs.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "server.lock"


class InUseElsewhere(Exception):
    """Another server has the state directory."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(f"another lethe server uses {state_dir}; set LETHE_STATE_DIR to another directory")


def private_directory(path: Path) -> None:
    """Make a directory that nobody else may look into, as removal requests demand. One that exists stays as it is."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


@contextmanager
def sole_server(state_dir: Path) -> Iterator[None]:
    """Hold a state directory, which is made if absent. Raises InUseElsewhere."""
    private_directory(state_dir)
    lock = os.open(state_dir / FILE, os.O_RDONLY | os.O_CREAT, 0o600)  # nothing is written to it
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, also when it is killed
        except OSError:
            raise InUseElsewhere(state_dir) from None
        yield
    finally:
        os.close(lock)


def server_runs(state_dir: Path) -> bool:
    """Whether a server holds the state directory."""
    try:
        lock = os.open(state_dir / FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
