"""What crosses from the API process to the engine: a `Plan` inside ``SamplingParams.extra_args``, and artifact files.

Clients cannot write here: admission refuses every field that reaches ``extra_args`` before vLLM sees the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from guards.contrastive.assistant import Assistant
from guards.errors import InvalidArtifact
from guards.steering.artifact import Steering
from guards.suppression.automaton import CompiledPhrases
from guards.types import Contrast, Corrupt, Plan, Steer

PLAN_KEY = "lethe"
"""The entry of ``extra_args`` that holds the plan, and of vLLM's ``additional_config`` that holds the engine's settings."""
GUARDED_PREFIX = "Lethe"
"""Put before a base architecture's name to ask vLLM for its guarded form: ``LetheLlamaForCausalLM``."""
ARTIFACTS_KEY = "artifacts"
"""In the engine's settings: the directory of artifact files."""
BASE_KEY = "base"
"""In the engine's settings: the `guards.contrastive.assistant.BaseModel` that is served; None if it takes no assistants."""


def encode_plan(plan: Plan) -> dict[str, Any]:
    """The plan as the value of ``extra_args[PLAN_KEY]``: plain types only, so that msgpack carries it."""
    return {
        "revision": plan.revision,
        "policy": plan.policy,
        "suppression": list(plan.suppression),
        "contrast": [astuple(each) for each in plan.contrast],
        "steering": [astuple(each) for each in plan.steering],
        "corrupt": None if plan.corrupt is None else list(astuple(plan.corrupt)),
        "output_start": plan.output_start,
        "forced": list(plan.forced),
    }


def decode_plan(extra_args: Mapping[str, Any] | None) -> Plan | None:
    """The plan that `encode_plan` wrote, or None for a request that was not stamped.

    Raises:
        KeyError, TypeError: the entry is there but not a plan; only a bug of ours can cause that.
    """
    if not extra_args or PLAN_KEY not in extra_args:
        return None
    fields = extra_args[PLAN_KEY]
    contrast = tuple(Contrast(*each) for each in fields["contrast"])
    steering = tuple(Steer(*each) for each in fields["steering"])
    corrupt = None if fields["corrupt"] is None else Corrupt(*fields["corrupt"])
    if corrupt is not None:
        corrupt = replace(corrupt, spans=tuple((start, end) for start, end in corrupt.spans))
    suppression, forced = tuple(fields["suppression"]), tuple(fields["forced"])
    return Plan(fields["revision"], fields["policy"], suppression, contrast, steering, corrupt, fields["output_start"], forced)


def load_phrases(artifacts: Path, fingerprint: str) -> CompiledPhrases:
    """Read compiled phrases by fingerprint. Raises InvalidArtifact, also if the file holds something else than its name says."""
    compiled = CompiledPhrases.load(phrases_path(artifacts, fingerprint))
    if compiled.fingerprint != fingerprint:
        raise InvalidArtifact(f"{phrases_path(artifacts, fingerprint)} holds {compiled.fingerprint[:12]}; delete it and restart")
    return compiled


def phrases_path(artifacts: Path, fingerprint: str) -> Path:
    """Where compiled phrases live: content-addressed, so a file is never changed, only added and removed."""
    return artifacts / "phrases" / f"{fingerprint}.safetensors"


def load_assistant(artifacts: Path, fingerprint: str) -> Assistant:
    """Read an assistant by fingerprint. Raises InvalidArtifact, also if the file holds something else than its name says."""
    path = assistant_path(artifacts, fingerprint)
    assistant = Assistant.load(path)
    if assistant.fingerprint != fingerprint:
        raise InvalidArtifact(f"{path} holds assistant {assistant.fingerprint[:12]}; train it again")
    return assistant


def load_steering(artifacts: Path, fingerprint: str) -> Steering:
    """Read a steering artifact by fingerprint. Raises InvalidArtifact, also if the file holds something else than its name says."""
    path = steering_path(artifacts, fingerprint)
    steering = Steering.load(path)
    if steering.fingerprint != fingerprint:
        raise InvalidArtifact(f"{path} holds {steering.fingerprint[:12]}; make it again")
    return steering


def steering_path(artifacts: Path, fingerprint: str) -> Path:
    """Where steering artifacts live, content-addressed as well."""
    return artifacts / "steering" / f"{fingerprint}.safetensors"


def assistant_path(artifacts: Path, fingerprint: str) -> Path:
    """Where assistants live, content-addressed as well."""
    return artifacts / "assistants" / f"{fingerprint}.safetensors"
