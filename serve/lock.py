"""One server to a state directory: artifacts in it are compiled for one model, and swept by the server that owns them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

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
    """Hold a state directory, which is made if absent. Raises InUseElsewhere, OSError."""
    private_directory(state_dir)
    lock = FileLock(state_dir / FILE, blocking=False, mode=0o600)  # goes with the process, also when it is killed
    try:
        lock.acquire()
    except Timeout:
        raise InUseElsewhere(state_dir) from None
    try:
        yield
    finally:
        lock.release()


def server_runs(state_dir: Path) -> bool:
    """Whether a server holds the state directory. Raises OSError where that cannot be found out."""
    if not (state_dir / FILE).exists():
        return False
    try:
        with FileLock(state_dir / FILE, blocking=False):
            return False
    except Timeout:
        return True
