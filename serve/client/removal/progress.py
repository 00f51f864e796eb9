"""How far a removal is, in a file beside what it writes: for whoever does not see its terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Lock

from guards.whole_file import write_whole

EVERY_S = 0.5


class ProgressFile:
    """Writes ``progress.json``: what is being done, what was told, how many answers were asked for."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "progress.json"
        self._lock = Lock()
        self._doing, self._told, self._answers = "", list[str](), 0
        self._written = 0.0

    def say(self, doing: str) -> None:
        self._doing = doing
        self._write()

    def tell(self, line: str) -> None:
        self._told.append(line)
        self._write()

    def answered(self) -> None:
        self._answers += 1
        if time.monotonic() - self._written > EVERY_S:
            self._write()

    def _write(self) -> None:
        with self._lock:
            self._written = time.monotonic()
            text = json.dumps({"doing": self._doing, "told": self._told, "answers": self._answers}, ensure_ascii=False)
            write_whole(self._path, lambda path: path.write_text(text, "utf-8"), durable=False)
