"""A file is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from guards.whole_file import write_whole


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "made" / "file"
    write_whole(place, lambda path: path.write_text("before"))

    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(place, half)
    assert place.read_text() == "before" and [each.name for each in place.parent.iterdir()] == ["file"]
    write_whole(place, lambda path: path.write_text("after"), durable=False)
    assert place.read_text() == "after"
