"""Writing a file whole or not at all: a crash or a full disk leaves what was there before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Have a file written beside its place, put it on the disk, and rename it. Its directory is made.

    Args:
        write: writes to the path that it is given.
        durable: wait for the disk; not worth it for what is written twice a second.

    Raises:
        OSError: the disk is full, or the like; nothing has changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
