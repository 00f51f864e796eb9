"""What the server knows of a request while it is answered. A leaf: every room may import it.

The middleware decides most of it and puts it into a context variable, in which it reaches the choke point through vLLM's handlers.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from guards.policy import Policy
from guards.text_plan import TextPlan
from guards.types import Plan
from serve.experiment import Experiment, ExperimentArm
from serve.hits import Hit
from serve.registry.snapshot import Caller


@dataclass(frozen=True)
class Entry:
    """A request's place in an experiment."""

    experiment: Experiment
    unit: str
    arm: ExperimentArm
    forced: bool = False
    uncounted: str = ""  # why it says nothing about its arm


@dataclass
class Observation:
    """How a request is answered, as the choke point sees it."""

    started: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None  # of a stream, from `started`
    total_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""  # of all choices
    readable: bool = True  # whether ``text`` is what was said: beam search makes no text here
    failed: bool = False  # an error ended it, perhaps after its status was sent


@dataclass
class RequestContext:
    """What admission decided. Constant, but for what the choke point notes: blocked, guard_events, hits, observation."""

    caller: Caller
    policy: Policy
    plan: Plan
    text: TextPlan | None = None
    has_tools: bool = False
    blocked: bool = False  # an output was ended by a guard, so the response must say so
    guard_events: list[str] = field(default_factory=list)  # what guards did, as "guard action", in order
    hits: list[Hit] = field(default_factory=list)  # what they found, and where
    observation: Observation = field(default_factory=Observation)
    entry: Entry | None = None  # its place in an experiment
    in_shadow: bool = False  # nobody is shown the answer
    announced: bool = False  # its stream begins with a chunk that says who speaks, which need not wait for the first word
    probe: str | None = None  # what its sender learns if a guard ends the answer (see `serve.http.probes`)


admitted: ContextVar[RequestContext | None] = ContextVar("admitted", default=None)
"""The request that the running task serves; None outside of one."""
