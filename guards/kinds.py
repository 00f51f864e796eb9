"""What a guard declares of itself: `GuardKind`. Everything else that has to know of a guard reads it from there.

From the declarations (`guards.catalogue` lists them) are made: the schema of policies, the plan that crosses to the engine, the
artifact files, building and training, what the engine loads and applies, the command line's help and the tables of the documents.
A declaration names code by ``"module:name"``, so that reading it loads neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from guards.forget_set import Frozen, Name
from guards.types import Entry, LogitsGuard

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SetArtifacts:
    """What was made from one forget set and is ready: from this a guard decides what it can do for the set."""

    name: str
    artifacts: Mapping[str, str] = field(default_factory=dict)  # kind of artifact -> fingerprint
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # kind of calibration -> what was found


class Config(Frozen):
    """The settings of one guard in a policy."""

    enabled: bool = True


class TextConfig(Config):
    """The settings of a guard that judges text: what a hit does."""

    prompt: Literal["refuse", "monitor", "ignore"] = Field("refuse", description="what a hit in the conversation does")
    answer: Literal["refuse", "redact", "monitor", "ignore"] = Field("refuse", description="what a hit in the answer does")


class TrainingOrder(Frozen):
    """The body of a call that trains something. Guards give ``recipe`` its type, and add what else they take."""

    retain: tuple[Name, ...] = Field((), description="other sets, whose questions and answers are to stay")
    lora: str = Field(
        "", max_length=4_096, description="directory of a LoRA adapter (PEFT) on the server's machine, to be imported"
    )
    recipe: Frozen = Frozen()


@dataclass(frozen=True, slots=True)
class ArtifactFiles:
    """The files of a guard's artifacts, each named by its fingerprint."""

    kinds: tuple[str, ...]  # as the registry names them
    folder: str  # in the directory of artifacts
    reader: str  # "module:class" with load(path), save(path), fingerprint and summary, trained ones also kind and check(base)
    remedy: str  # what to do about a file that holds something else than its name says


@dataclass(frozen=True, slots=True)
class Build:
    """How an artifact is made from a set's content and the served model's vocabulary alone."""

    fingerprint: str  # "module:function" (ForgetSet, Vocabulary) -> fingerprint, None if there is nothing to build
    make: str  # "module:function" (ForgetSet, Vocabulary) -> artifact; blocking


@dataclass(frozen=True, slots=True)
class Training:
    """How an artifact is made by order, in a process of its own."""

    program: str  # the module that runs a job, see `guards.training`
    route: str  # the last part of its path in the HTTP API
    order: str  # "module:class" of its TrainingOrder
    methods: Mapping[str, str]  # as the command line names it -> kind of artifact that it makes
    check: str  # "module:function" (order, BaseModel): raises Untrainable


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardKind:
    """One guard, declared."""

    name: str  # its field in a policy's ``guards``
    acts_on: str  # for documents: "the prompt", "tokens as they are chosen", ...
    config: type[Config]
    default: Config | None = None  # in policies that do not mention it; None = off
    shorthand: str = ""  # stands for the guard with its defaults
    many: bool = False  # a policy may hold several of it
    check: Callable[[Any], None] | None = None  # (GuardConfigs): raises ValueError for a combination that cannot be
    entry: type[Entry] | None = None  # what a plan holds of it; None for guards that judge text
    entries: Callable[[Any, SetArtifacts], Sequence[Entry]] | None = None  # (config, set) -> what it does for that set
    gated: bool = False  # a gate decides for which sets it acts
    files: ArtifactFiles | None = None
    build: Build | None = None
    training: Training | None = None
    calibrations: tuple[str, ...] = ()  # kinds of what is measured for it and holds for one artifact
    logits: str = ""  # "module:function" (EngineContext) -> LogitsGuard of the engine; "" for guards that are part of it
    text: str = ""  # "module:class" of its TextGuard, made without arguments

    @property
    def summary(self) -> str:
        """One sentence on what it does."""
        first, end, _ = " ".join((self.config.__doc__ or "").split()).partition(". ")
        return first + end.strip()

    @property
    def trained(self) -> bool:
        """Whether its artifacts are made by order, and kept until the next order."""
        return self.training is not None


class EngineContext(Protocol):
    """What a guard of the engine may know when it is made."""

    vocabulary: Any  # the served model's `guards.suppression.vocabulary.Vocabulary`
    closer: Any  # the engine's `guards.closing.RowCloser`: closes rows that it cannot guard, and knows which tokens are text
    device: torch.device


class ArtifactGuard(LogitsGuard, Protocol):
    """A guard of the engine that acts by artifacts."""

    def check(self, artifact: Any) -> None:
        """Raise GuardError if an artifact cannot be used with this model."""

    def load(self, artifacts: Mapping[str, Any]) -> None:
        """Make exactly these artifacts, by fingerprint, the ones that plans may name. A row whose plan names another is closed."""


@dataclass(frozen=True, slots=True)
class Found:
    """A place in a text that a text guard hits."""

    start: int  # characters
    end: int
    forget_set: str = ""
    score: float = 1.0
    threshold: float = 1.0


class TextGuard(Protocol):
    """A guard that judges text, in the API process.

    `judge` is called in any thread, once for a whole prompt and once for every clause of an answer. An error of it refuses the
    request, unless a hit would only be counted: what was not judged is not shown.
    """

    def judge(self, text: str, config: Any, sets: Sequence[SetArtifacts]) -> Sequence[Found]:
        """What of a text it hits, for the enabled sets of the policy."""
        ...


def resolve(place: str) -> Any:
    """What stands at ``"module:name"``. Raises ImportError, AttributeError."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
