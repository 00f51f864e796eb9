"""One guarded server on Model Runner V2, in the place of the one that the tests were written for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Fixtures named here are made anew for the tests of this directory, and so ask this server.
from tests.vllm.conftest import Server, admin, client, guarded_server  # noqa: F401

V2 = {"PYTHONPATH": str(Path(__file__).parents[2] / "rig"), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
"""What makes vLLM run Model Runner V2 on a CPU."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("v2")
    for server in guarded_server(directory, model_path, VLLM_CACHE_ROOT=str(directory / "cache"), **V2):
        assert "Using V2 Model Runner" in server.log.read_text(), "nothing here would show what it says"
        yield server
