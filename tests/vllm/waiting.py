"""Processes that have imported vLLM and wait for orders: each order runs in a fork of one.

An engine for a tiny model takes seconds, what it imports takes longer. One process waits for each environment, since some variables
are read while vLLM is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from guards.suppression.folding import folding
from tests.vllm.families import Environment, Order
from tests.vllm.families import main as run_order

IMPORTS = (
    "transformers",
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
    "torch._inductor.compile_fx",
    "serve.engine.processor",
    "serve.engine.worker",
)


class Waiting:
    """One process, and the environment in which it imported everything."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._log = directory / "waiting.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm.waiting"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            )

    def run(self, order: Order) -> dict[str, Any]:
        """What `tests.vllm.families.main` returns."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], 600)
        line = self._process.stdout.readline() if ready else ""
        assert line, f"it has died, or takes too long:\n{self._log.read_text()[-3000:]}"
        found = json.loads(line)
        assert "failed" not in found, found["failed"][-3000:] + self._log.read_text()[-3000:]
        answer: dict[str, Any] = found["found"]
        return answer

    def stop(self) -> None:
        try:
            self._process.communicate(timeout=60)  # nothing more: it ends where its orders end
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


@contextlib.contextmanager
def waiting(directory: Path) -> Iterator[Callable[[Order, Environment], dict[str, Any]]]:
    """A function that runs an order in a fork of the process that waits in its environment."""
    found: dict[str, Waiting] = {}

    def run(order: Order, environment: Environment) -> dict[str, Any]:
        key = json.dumps(environment, sort_keys=True)
        if key not in found:
            found[key] = Waiting({**os.environ, **environment}, directory)
        return found[key].run(order)

    try:
        yield run
    finally:
        for each in found.values():
            each.stop()


def main() -> None:
    """Read orders from standard input, one a line, and write what was found to standard output, one a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints is for the log
    for name in IMPORTS:
        importlib.import_module(name)
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda function: function()  # only this fork sees what looking at a model imports
    # Workers are forked, too: on a CPU, vLLM would start each anew, to import everything once more.
    executor: Any = importlib.import_module("vllm.v1.executor.multiproc_executor")
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    folding("number", True)  # which every engine needs, as it needs the one that this is made of
    gc.collect()
    gc.freeze()  # vLLM collects garbage again and again: not through all of this
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            try:
                said = {"found": run_order(json.loads(line))}
            except BaseException:  # noqa: BLE001 - whoever asked is told
                said = {"failed": traceback.format_exc()}
            with os.fdopen(writer, "w") as pipe:
                json.dump(said, pipe)
            atexit._run_exitfuncs()
            os._exit(0)  # what was imported is not taken apart again
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        print(said or json.dumps({"failed": "the fork ended without a word"}), file=answers, flush=True)


if __name__ == "__main__":
    main()
