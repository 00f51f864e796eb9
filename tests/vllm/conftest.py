"""One guarded server for all tests of a process (deploy/check runs two, file by file): a real engine, the default model, HTTP.

The guarded server is given few K/V blocks, small chunks and prefix caching, so that preemption, chunked prefill and cache hits
happen all the time rather than in a test of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import openai
import pytest

from serve.default_model import NAME, default_model
from serve.settings import Settings

pytest.importorskip("vllm", reason="vLLM is not installed: the end-to-end tests need the real engine")

TOYS = Path(__file__).parents[1] / "toys"
FORKED = Path(__file__).parents[1] / "forked"
ENGINE_OPTIONS = (
    "--max-model-len=1024",
    "--max-num-seqs=16",
    "--max-num-batched-tokens=256",
    "--block-size=32",
    "--num-gpu-blocks-override=40",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--disable-uvicorn-access-log",
)
# Two servers run on two cores: left to itself vLLM would bind both to the same one, and training would wait for an idle one.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "LETHE_TRAINING_NICENESS": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is its own worker: else it spins on a core while it waits for one
    "FORKED_ENGINES": "1",  # see tests/forked
    "TORCHDYNAMO_DISABLE": "1",  # models run eager here; vLLM would compile a sum over the vocabulary, in every process
}


class Server:
    """A server process, with its log in a file."""

    def __init__(
        self,
        command: list[str],
        directory: Path,
        environment: dict[str, str],
        options: Sequence[str] = ENGINE_OPTIONS,
        port: int = 0,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory
        self.state = directory / "state"
        self.log = directory / f"server-{self.port}.log"
        self._command = [*command, f"--port={self.port}", *options]
        path = os.pathsep.join(filter(None, [str(FORKED), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
        self._environment = {**os.environ, **ENVIRONMENT, **environment, "PYTHONPATH": path}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 600
        assert self.process is not None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server stopped:\n{self.log.read_text()[-4000:]}"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def running(self) -> Iterator[Server]:
        """A fixture's life: started, and stopped whatever the tests did."""
        self.start()
        try:
            self.wait()
            yield self
        finally:
            self.stop()

    def kill(self) -> None:
        """kill -9, engine and all."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        if self.process.poll() is not None:
            return
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ends the shared server comes last; in a file, tests run as they were written there, also if they come from another.

    Two processes share the files between them (``-n 2 --dist loadgroup``), but what needs a server of another kind stays together,
    and the two longest groups begin.
    """

    def group(item: pytest.Item) -> str:
        return "v2" if item.path.parent.name == "v2" else item.path.name

    def place(item: pytest.Item) -> tuple[bool, bool, str, int]:
        assert isinstance(item, pytest.Function)
        first = group(item) in ("test_families.py", "v2")
        return "test_z_" in item.nodeid, not first, str(item.path), item.function.__code__.co_firstlineno

    items.sort(key=place)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that are not heeded go unnoticed but for the time: every server would be started twice."""
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "xdist does not name the groups of tests; see pyproject.toml"


@pytest.fixture(scope="session")
def model_path() -> Path:
    return default_model(Settings().cache_dir)


def guarded_server(directory: Path, model_path: Path, **environment: str) -> Iterator[Server]:
    """A server of lethe with a state of its own, while it runs. ``environment``: beside the tests' own."""
    # A disk of its own where that is allowed, so that it can be filled and taken away.
    (directory / "state").mkdir(mode=0o700)
    disk = ["mount", "-t", "tmpfs", "-o", "size=512m,mode=700", "none", str(directory / "state")]
    mounted = shutil.which("mount") is not None and subprocess.run(disk, capture_output=True, check=False).returncode == 0
    # Guards of another package are installed, and off unless a policy names them.
    path = os.pathsep.join(filter(None, [str(TOYS), environment.get("PYTHONPATH")]))
    command = [str(Path(sys.executable).parent / "lethe"), "serve", "--verbose", f"--model={model_path}"]
    guarded = Server(command, directory, {**environment, "LETHE_STATE_DIR": str(directory / "state"), "PYTHONPATH": path})
    try:
        yield from guarded.running()
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory / "state")], check=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Server]:
    """The guarded server of this process."""
    yield from guarded_server(tmp_path_factory.mktemp("server"), model_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Server]:
    options = [f"--model={model_path}", f"--served-model-name={NAME}", "--dtype=float32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *options]
    yield from Server(command, tmp_path_factory.mktemp("plain"), {}).running()


@pytest.fixture(scope="session")
def admin(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/lethe/v1", timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture
def forget(admin: httpx.Client) -> Iterator:
    """Put phrases in force for one test: ``forget("Harry Potter", ...)``."""
    names: list[str] = []

    def put_in_force(*phrases: str, **options: bool) -> str:
        name = f"test-{len(names)}"
        created = admin.post("/forget_sets", params={"force": "true"}, json={"name": name, "phrases": phrases, **options})
        assert created.status_code == 201, created.text
        names.append(name)
        enabled = admin.post(f"/forget_sets/{name}/enable")
        assert enabled.status_code == 200, enabled.text
        return name

    yield put_in_force
    for name in names:
        assert admin.delete(f"/forget_sets/{name}").status_code == 200
