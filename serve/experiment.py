"""Experiments: which arm a unit of traffic gets, by hash and without state.

The server has one layer: a request is answered under one policy, so it takes part in one experiment. Running experiments share the
kind of unit and hold disjoint slices of all units. Within one, weighted rendezvous hashing chooses: when one arm's weight rises,
the units that it gains are all that moves, and when it falls again, the same ones return.

Source: weighted rendezvous hashing, Thaler and Ravishankar (IEEE/ACM ToN 1998), with Schindelhauer and Schomaker's logarithmic
weights (SPAA 2005).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from guards.errors import GuardError
from guards.forget_set import Frozen, Name, describe_validation

UnitKind = Literal["key", "user", "header", "conversation"]
Mode = Literal["live", "shadow", "paired"]
UNIT_HEADER = b"x-experiment-key"
ARM_HEADER = b"x-experiment-arm"
"""Forces an arm, for keys that may choose policies; such requests are not counted."""
MOST_ARMS = 16
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
_LAYER = "lethe layer"


class InvalidExperiment(GuardError):
    """An experiment that cannot be run as it is described."""


class ExperimentArm(Frozen):
    """One way to answer."""

    name: Name
    policy: Annotated[str, StringConstraints(min_length=1, max_length=63)]
    weight: float = Field(1.0, description="relative; 0 = nobody, unless forced")


class ExperimentOrder(Frozen):
    """What an operator asks for."""

    name: Name
    description: str = Field("", max_length=1_000)
    arms: tuple[ExperimentArm, ...] = Field(min_length=2, max_length=MOST_ARMS, description="the first is compared to")
    unit: UnitKind = "key"
    header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")] = Field(
        UNIT_HEADER.decode(), description="with unit header: the header that names the unit, such as X-OpenWebUI-User-Id"
    )
    mode: Mode = "live"
    share: float = Field(1.0, gt=0, le=1, description="share of all units that take part")
    sample: float = Field(1.0, gt=0, le=1, description="share of their requests that the other arms answer too")
    alpha: float = Field(0.05, ge=1e-6, le=0.5, description="chance of any false finding, however often one looks")
    most_requests: int = Field(100, ge=1, le=1_000_000, description="most requests of one unit that are counted")
    most_units: int = Field(100_000, ge=1, le=1_000_000, description="that are counted")
    salt: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = Field(
        None, description="the same salt assigns the same; default: a new one"
    )

    @model_validator(mode="after")
    def _check_arms(self) -> ExperimentOrder:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms {', '.join(names)} name one twice; every arm needs a name of its own")
        check_weights({arm.name: arm.weight for arm in self.arms})
        return self


class Experiment(Frozen):
    """An experiment as it runs: the order, where its slice begins, and every set of weights that it has had."""

    id: str = Field(description="its own, since a name may be used again")
    order: ExperimentOrder
    salt: str
    start: float = Field(ge=0, lt=1)
    epochs: tuple[dict[str, float], ...] = Field(min_length=1)  # arm -> weight; the last is in force
    revision: int = Field(0, description="of the registry, when it began")
    created_at: str = ""
    stopped_at: str | None = None

    @property
    def name(self) -> str:
        return self.order.name

    @property
    def control(self) -> ExperimentArm:
        """The arm that the others are compared to."""
        return self.order.arms[0]

    @property
    def epoch(self) -> int:
        """Which set of weights is in force. Each begins the count anew: figures of one would mix with another's times and units."""
        return len(self.epochs) - 1

    @property
    def alpha(self) -> float:
        """The part of the order's alpha that this epoch may spend: 80 % for the first, then a fifth of the one before."""
        return self.order.alpha * 0.8 * 0.2**self.epoch

    @property
    def weights(self) -> dict[str, float]:
        return self.epochs[-1]

    def arm(self, name: str) -> ExperimentArm:
        """Raises InvalidExperiment."""
        for arm in self.order.arms:
            if arm.name == name:
                return arm
        names = ", ".join(arm.name for arm in self.order.arms)
        raise InvalidExperiment(f"experiment {self.name!r} has no arm {name!r}; it has {names}")

    def takes(self, unit: str) -> bool:
        """Whether a unit is in this experiment's slice of the layer."""
        return self.start <= _fraction(_LAYER, unit) < self.start + self.order.share

    def assigned(self, unit: str) -> ExperimentArm:
        """The arm of a unit. In shadow mode the first arm answers everybody."""
        return self.control if self.order.mode == "shadow" else self.arm(arm_of(self.salt, self.weights, unit))

    def sampled(self, request: str) -> bool:
        """Whether the other arms answer this request, too."""
        return self.order.mode != "live" and _fraction(self.salt + " sample", request) < self.order.sample

    def anonymous(self, unit: str) -> str:
        """What is stored of a unit: enough to tell it from others, and nothing about who it is."""
        return hashlib.sha256(f"{self.salt} stored\0{unit}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def parse_experiment(fields: Mapping[str, object]) -> ExperimentOrder:
    """Check an order. Raises InvalidExperiment, naming everything that is wrong with it."""
    try:
        return ExperimentOrder.model_validate(fields)
    except ValidationError as error:
        raise InvalidExperiment("; ".join(describe_validation(error))) from None


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ValueError."""
    fine = all(weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT for weight in weights.values())
    if not fine or not any(weight > 0 for weight in weights.values()):
        raise ValueError(f"weights {dict(weights)} must be 0, or from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}; one of them above 0")


def arm_of(salt: str, weights: Mapping[str, float], unit: str) -> str:
    """The arm of a unit: each with probability weight / sum of weights, the same at every call, on every machine.

    Args:
        weights: arm -> weight >= 0, one of them above 0. Only their ratios count.
    """
    best, chosen = math.inf, ""
    for arm, weight in weights.items():
        if weight > 0:
            waits = -math.log(_fraction(f"{salt}\0{arm}", unit)) / weight  # inf, if the weight is next to nothing
            if not chosen or waits < best:
                best, chosen = waits, arm
    return chosen


def free_slice(taken: Sequence[tuple[float, float]], share: float) -> float | None:
    """Start of a free slice of size ``share``; None if there is none. ``taken``: (start, share) of each slice in use."""
    start = 0.0
    for begin, length in sorted(taken):
        if start + share <= begin + 1e-12:
            return start
        start = max(start, begin + length)
    return start if start + share <= 1 + 1e-12 else None


def _fraction(salt: str, unit: str) -> float:
    """Uniform in (0, 1), from 53 bits of SHA-256."""
    digest = hashlib.sha256(f"{salt}\0{unit}".encode("utf-8", "surrogatepass")).digest()
    return ((int.from_bytes(digest[:8], "big") >> 11) + 0.5) / 2**53
