"""Where the registry's history stands, kept outside of it as well, so that an older copy put in its place is noticed.

An older copy lacks the removals that were put in force since; taken up in silence, it would show again what was removed. Covered: a
copy that is older than, or differs from, what this state directory last held. Not covered: a whole state directory put back, mark
and all, while no server runs.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from guards.whole_file import write_whole

FILE = "last-revision.json"


@dataclass(frozen=True, slots=True)
class Position:
    """The end of an audit chain."""

    revision: int
    head: str  # hash of the audit row that made the revision


class Mark:
    """A small file beside the database. What cannot be read counts as absent, and what cannot be written is left out: it is a
    second line of defence, and must not stop the first."""

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(FILE)

    def read(self) -> Position | None:
        try:
            fields = json.loads(self.path.read_text("utf-8"))
            return Position(int(fields["revision"]), str(fields["head"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, position: Position) -> None:
        with contextlib.suppress(OSError):
            write_whole(self.path, lambda path: path.write_text(json.dumps(asdict(position)), "utf-8"))
