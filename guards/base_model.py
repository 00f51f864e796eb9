"""The served model, as artifacts that were made for it know it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from guards.errors import InvalidArtifact
from guards.forget_set import Frozen


class BaseModel(Frozen):
    """The model that an artifact belongs to."""

    fingerprint: str
    layers: int
    hidden_size: int
    vocabulary: int


def check_base(mine: BaseModel, served: BaseModel, what: str) -> None:
    """Raise InvalidArtifact, naming both, if something was made for another base model than is served.

    Args:
        what: names it, such as "assistant 0123456789ab".
    """
    for name, unit in (("layers", "decoder layers"), ("hidden_size", "hidden units"), ("vocabulary", "tokens")):
        if getattr(mine, name) != getattr(served, name):
            raise InvalidArtifact(
                f"{what} was made for a model with {getattr(mine, name)} {unit}, "
                f"the served one has {getattr(served, name)}; train it again on this server"
            )
    if mine.fingerprint != served.fingerprint:
        raise InvalidArtifact(
            f"{what} was made for base model {mine.fingerprint[:12]}, "
            f"the served one is {served.fingerprint[:12]}; train it again on this server"
        )


_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_FINGERPRINTED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def describe_base(directory: Path) -> BaseModel:
    """Fingerprint a model directory: configuration, tokenizer, and samples of all weight files with their sizes.

    Only samples are hashed, so that a model of hundreds of gigabytes does not delay every start by minutes. They tell fine-tunes
    apart: this protects against mistakes, not against forgery.

    Raises:
        InvalidArtifact: there is no config.json or no safetensors file, or the configuration is of a kind that takes no assistants.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not (directory / "config.json").exists() or not weights:
        raise InvalidArtifact(f"{directory} has no config.json beside *.safetensors, so assistants cannot be trained for it")
    digest = hashlib.sha256()
    for name in _FINGERPRINTED:
        if (directory / name).exists():
            digest.update(name.encode() + (directory / name).read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}{size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    try:
        config = json.loads((directory / "config.json").read_bytes())
        config = {**config, **config.get("text_config", {})}
        return BaseModel(
            fingerprint=digest.hexdigest(),
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            vocabulary=config["vocab_size"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArtifact(f"{directory}/config.json does not say what assistants need to know: {error!r}") from None
