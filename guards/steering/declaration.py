"""Steering and corruption, declared: their settings, what a plan holds of them, their artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from guards.kinds import ArtifactFiles, Config, GuardKind, SetArtifacts, Training
from guards.types import Entry

Method = Literal["project", "steer", "adapter"]
"""How a set is steered: see `guards.steering`."""
METHODS: tuple[Method, ...] = get_args(Method)
Corruption = Literal["rand_noise_first_n", "zero_out_top_k", "flip_sign_first_n"]
"""How embeddings are corrupted: see `guards.steering.operators.corrupt`."""
DEFAULT_CORRUPTION: dict[Corruption, float] = {"rand_noise_first_n": 2.0, "zero_out_top_k": 1.0, "flip_sign_first_n": 1.0}
"""Strength of corruption for sets that were not calibrated: little of the name is left."""


class SteeringConfig(Config):
    """Change what the network computes for a request: by what `lethe train --method` made of the policy's sets.

    ``project`` and ``steer`` move hidden states off the set; ``adapter`` runs projections with an unlearning adapter. Sets without
    such an artifact are left to the other guards.
    """

    method: Method
    strength: Annotated[float, Field(gt=0, le=100)] | Literal["calibrated"] = Field(
        1.0, description='1 = as fitted or trained; "calibrated" = each set\'s own; a set without one is left alone'
    )


class CorruptConfig(Config):
    """Where the gate finds a set's names in a prompt, corrupt their embeddings, so that the network does not know of whom it is
    asked. Needs the gate. A conversation that touches a set without plainly naming it is refused, unless something else of the
    policy acts on it. Names that the answer itself brings up are left to the other guards.
    """

    kind: Corruption = "rand_noise_first_n"
    strength: Annotated[float, Field(gt=0, le=1_000)] | Literal["calibrated"] | None = Field(
        None,
        description="noise: in standard deviations of a token's embedding; other kinds: a share. "
        "null = each set's calibrated strength, or 2 for noise and 1 for other kinds; "
        '"calibrated" = each set\'s own; a set without one is left to the other guards, or if none acts on it, as null',
    )
    first_n: int = Field(1_000_000, ge=1, le=1_000_000, description="dimensions that change; more than there are = all")
    seed: int = Field(0, ge=0, lt=2**31)


@dataclass(frozen=True, slots=True, order=True)
class Steer(Entry):
    """One steering artifact and how strongly it acts."""

    guard: ClassVar[str] = "steering"
    artifact: str  # its fingerprint
    strength: float  # > 0, dimensionless; 1 = as fitted or trained

    @property
    def artifacts(self) -> tuple[str, ...]:
        return (self.artifact,)

    @property
    def changes_cache(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, order=True)
class Corrupt(Entry):
    """How embeddings of a prompt are corrupted, and which. Made by the gate, which finds the names."""

    guard: ClassVar[str] = "corrupt"
    kind: str  # a Corruption
    strength: float
    first_n: int
    seed: int
    spans: tuple[tuple[int, int], ...]  # first token and the one after the last, by position in the request

    @property
    def changes_cache(self) -> bool:
        return bool(self.spans)


def _entries(config: SteeringConfig, made: SetArtifacts) -> Sequence[Steer]:
    if config.method not in made.artifacts:
        return []
    strength = config.strength
    if strength == "calibrated":
        strength = float(made.measured.get(calibration_of(config.method), {}).get("strength", 0.0))
    return [Steer(made.artifacts[config.method], strength)] if strength > 0 else []


def calibration_of(method: Method) -> str:
    """The kind of calibration that holds a method's strength for a set."""
    return f"{method}_strength"


def _every_method_once(guards: Any) -> None:
    methods = [each.method for each in guards.steering]
    if len(set(methods)) < len(methods):
        raise ValueError(f"steering names {', '.join(methods)}: every method once")


def _has_a_gate(guards: Any) -> None:
    gate = guards.gate
    gated = gate is not None and gate.enabled and gate.on_hit == "engage"
    if guards.of(CorruptConfig) is not None and not gated:
        raise ValueError('corrupt needs a gate with on_hit "engage", which finds the names; add one')


STEERING = GuardKind(
    name="steering",
    acts_on="hidden states and projections, inside the network",
    config=SteeringConfig,
    many=True,
    check=_every_method_once,
    entry=Steer,
    entries=_entries,
    gated=True,
    files=ArtifactFiles(METHODS, "steering", "guards.steering.artifact:Steering", "make it again"),
    training=Training(
        program="guards.steering.train",
        route="steering",
        order="guards.steering.artifact:SteeringOrder",
        methods={method: method for method in METHODS},
        check="guards.steering.artifact:check_order",
    ),
    calibrations=tuple(map(calibration_of, METHODS)),
)
CORRUPTION = GuardKind(
    name="corrupt",
    acts_on="embeddings of names in the prompt",
    config=CorruptConfig,
    check=_has_a_gate,
    entry=Corrupt,
    calibrations=("corruption",),
)
