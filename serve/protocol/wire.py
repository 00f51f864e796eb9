"""What crosses from the API process to the engine: a `Plan` inside ``SamplingParams.extra_args``, and names.

Clients cannot write here: admission refuses every field that reaches ``extra_args`` before vLLM sees the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from guards.catalogue import GUARDS
from guards.types import Entry, Plan

PLAN_KEY = "lethe"
"""The entry of ``extra_args`` that holds the plan, and of vLLM's ``additional_config`` that holds the engine's settings."""
GUARDED_PREFIX = "Lethe"
"""Put before a base architecture's name to ask vLLM for its guarded form: ``LetheLlamaForCausalLM``."""
ARTIFACTS_KEY = "artifacts"
"""In the engine's settings: the directory of artifact files."""
BASE_KEY = "base"
"""In the engine's settings: the `guards.base_model.BaseModel` that is served; None if it takes no assistants."""


class _Message(msgspec.Struct, frozen=True):
    """A plan on the wire."""

    revision: int
    policy: str
    entries: tuple[tuple[str, dict[str, Any]], ...]  # guard, fields of its entry
    output_start: int | None
    forced: tuple[int, ...]


def encode_plan(plan: Plan) -> dict[str, Any]:
    """The plan as the value of ``extra_args[PLAN_KEY]``: plain types only, so that msgpack carries it."""
    entries = tuple((entry.guard, msgspec.to_builtins(entry)) for entry in plan.entries)
    encoded: dict[str, Any] = msgspec.to_builtins(_Message(plan.revision, plan.policy, entries, plan.output_start, plan.forced))
    return encoded


def decode_plan(extra_args: Mapping[str, Any] | None) -> Plan | None:
    """The plan that `encode_plan` wrote, or None for a request that was not stamped.

    Raises:
        msgspec.ValidationError, KeyError: the entry is there but not a plan; only a bug of ours can cause that.
    """
    if not extra_args or PLAN_KEY not in extra_args:
        return None
    message = msgspec.convert(extra_args[PLAN_KEY], _Message)
    entries = tuple(_entry(guard, fields) for guard, fields in message.entries)
    return Plan(message.revision, message.policy, entries, message.output_start, message.forced)


def _entry(guard: str, fields: dict[str, Any]) -> Entry:
    kind = GUARDS[guard].entry
    assert kind is not None, f"guard {guard!r} has nothing in plans"
    return msgspec.convert(fields, kind)
