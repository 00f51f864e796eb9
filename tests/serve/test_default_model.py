"""The conversion of the bundled model, interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve import default_model
from serve.default_model import NAME, MissingModel

CONVERT = "import sys; from pathlib import Path; from serve.default_model import default_model; default_model(Path(sys.argv[1]))"


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers converts the model")
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    models = tmp_path / "models"
    deadline = time.monotonic() + 60
    while not list(models.glob(f".{NAME}-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(models.glob(f".{NAME}-*")), "the conversion did not begin"
    process.kill()
    process.wait()
    assert not (models / NAME).exists()


def test_what_a_killed_conversion_left_is_swept_away_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    abandoned = tmp_path / "models" / f".{NAME}-abandoned"
    abandoned.mkdir(parents=True)
    long_ago = time.time() - 2 * default_model.ABANDONED_AFTER_S
    os.utime(abandoned, (long_ago, long_ago))
    with pytest.raises((OSError, ValueError)):  # there is no model in this directory
        default_model._convert(tmp_path / "no wheel here", tmp_path / "models" / NAME)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_missing_wheel_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_WHEEL", "no_such_wheel")
    with pytest.raises(MissingModel, match="--model"):
        default_model.default_model(tmp_path)


def test_a_model_that_is_there_is_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / NAME).mkdir(parents=True)
    (tmp_path / "models" / NAME / "config.json").write_text("{}")
    monkeypatch.setattr(default_model, "_convert", lambda *_: pytest.fail("converted again"))
    assert default_model.default_model(tmp_path) == tmp_path / "models" / NAME
