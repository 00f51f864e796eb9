"""The store of artifact files, which both processes read: one file each, named by its content.

A file is never changed, only added and removed. Where it lies and who reads it, its guard declares (`guards.kinds.ArtifactFiles`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guards.catalogue import GUARDS
from guards.errors import InvalidArtifact
from guards.kinds import ArtifactFiles, resolve
from guards.types import ArtifactRef


def artifact_path(artifacts: Path, artifact: ArtifactRef) -> Path:
    """Where an artifact lies. ``artifacts``: the directory of all of them."""
    return artifacts / _files(artifact.guard).folder / f"{artifact.fingerprint}.safetensors"


def load_artifact(artifacts: Path, artifact: ArtifactRef) -> Any:
    """Read and check an artifact. Raises InvalidArtifact, also if the file holds something else than its name says."""
    files, path = _files(artifact.guard), artifact_path(artifacts, artifact)
    found = resolve(files.reader).load(path)
    if found.fingerprint != artifact.fingerprint:
        raise InvalidArtifact(f"{path} holds {found.fingerprint[:12]}; {files.remedy}")
    return found


def stored_files(artifacts: Path) -> list[Path]:
    """Every artifact file there is."""
    folders = {kind.files.folder for kind in GUARDS.values() if kind.files}
    return [path for folder in sorted(folders) for path in (artifacts / folder).glob("*.safetensors")]


def _files(guard: str) -> ArtifactFiles:
    files = GUARDS[guard].files
    assert files is not None, f"guard {guard!r} has no artifacts"
    return files
