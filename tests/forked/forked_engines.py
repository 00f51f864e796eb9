"""A plugin of vLLM for the tests: its engine is forked from the server, which has imported everything, rather than started anew.

That is what vLLM does on its own elsewhere; for a CPU it starts a new process, which imports for ten to twenty seconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from typing import Any


def register() -> None:
    if os.environ.get("FORKED_ENGINES"):
        engine: Any = importlib.import_module("vllm.v1.engine.utils")
        engine.get_mp_context = lambda: multiprocessing.get_context("fork")
