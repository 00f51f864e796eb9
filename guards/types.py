"""The nouns that guards, the API process and the engine process share. Importable by any process: torch is typing only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

BOUNDARY = -1
"""Stands in ``Rows.suffix`` for "nothing before this can be part of a match": before the first token, or a chat-template
token of the prompt."""

UNKNOWN = -2
"""Stands in ``Rows.suffix`` for a token that nobody knows. A row that would need it may produce no text."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """What one guard is to do for one request. Every guard of the engine declares a subclass; its fields cross the wire."""

    guard: ClassVar[str]  # the guard's name in policies, see `guards.kinds.GuardKind`

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Fingerprints of what must be loaded for it."""
        return ()

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """Entries with the same key are merged: a plan holds the strongest of them."""
        return self.guard, self.artifacts

    @property
    def changes_cache(self) -> bool:
        """Whether keys and values depend on it."""
        return False

    def under_constraints(self) -> Self:
        """What it does where the client's own constraints (a grammar, allowed tokens) leave few tokens to choose from."""
        return self


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Plan:
    """What the guards are to do for one request. Decided once, at admission; travels with the request.

    Toggling a forget set never changes a plan that is under way: a request keeps the revision it was admitted under.
    """

    revision: int  # the registry revision in force at admission
    policy: str  # the policy's name, for reports; the engine does not interpret it
    entries: tuple[Entry, ...] = ()
    output_start: int | None = None  # index of the first output token; None = the prompt's length
    forced: tuple[int, ...] = ()  # what is sampled, whatever the logits say: to read off how likely it was
    changes_cache: bool = field(init=False, repr=False)  # whether keys and values depend on it, so that no other may share them
    _entries_of: Mapping[type[Entry], tuple[Any, ...]] = field(init=False, repr=False, compare=False)
    _artifacts_of: Mapping[type[Entry], tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Asked for at every step and row, with hundreds of entries perhaps: sorted out once.
        by_kind: dict[type[Entry], list[Entry]] = {}
        for entry in self.entries:
            by_kind.setdefault(type(entry), []).append(entry)
        named = {kind: tuple(name for entry in found for name in entry.artifacts) for kind, found in by_kind.items()}
        object.__setattr__(self, "changes_cache", any(entry.changes_cache for entry in self.entries))
        object.__setattr__(self, "_entries_of", {kind: tuple(found) for kind, found in by_kind.items()})
        object.__setattr__(self, "_artifacts_of", named)

    def of(self, kind: type[E]) -> tuple[E, ...]:
        """Its entries of one guard."""
        return self._entries_of.get(kind, ())

    def artifacts_of(self, kind: type[Entry]) -> tuple[str, ...]:
        """Fingerprints of the artifacts that its entries of one guard name."""
        return self._artifacts_of.get(kind, ())

    @property
    def artifacts(self) -> list[ArtifactRef]:
        """Every artifact that it names: the one list of what must be loaded for it."""
        return [ArtifactRef(entry.guard, name) for entry in self.entries for name in entry.artifacts]

    @property
    def guards(self) -> list[str]:
        """Names of the guards that act, in the order in which they do."""
        return list(dict.fromkeys(entry.guard for entry in self.entries))

    @property
    def engages(self) -> bool:
        """Whether the engine has anything to do for this request."""
        return bool(self.entries)

    @property
    def cache_salt(self) -> str | None:
        """What keeps the cached keys and values of this plan apart: requests of the same salt compute the same. None = plain."""
        if not self.changes_cache:
            return None
        return hashlib.sha256(repr([entry for entry in self.entries if entry.changes_cache]).encode()).hexdigest()


class ArtifactRef(NamedTuple):
    """An artifact: the guard that it is for, and its fingerprint."""

    guard: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class AssistantLines:
    """What assistants say about a step's rows, P lines: one for each row and assistant of its plan."""

    row: Tensor  # [P] int64, which row
    entries: tuple[Entry, ...]  # [P] the entry of the row's plan for which the assistant speaks
    logits: Tensor  # [P, V] float; a line that is not finite was not said


@dataclass(frozen=True, slots=True)
class Rows:
    """One step's layout, R rows of logits. A row is not a request: prompt positions have rows too, and rows reorder."""

    plan: Tensor  # [R] int64, index into the step's list of plans; -1 = unguarded
    suffix: Tensor  # [R, W] int64, the last W token ids before the token to predict, oldest first; BOUNDARY pads on the left
    lines: AssistantLines | None = None


class LogitsGuard(Protocol):
    """A guard that edits logits. Holds no per-request state: everything it needs is in ``rows``.

    One that acts by artifacts has two methods more, `guards.kinds.ArtifactGuard`.

    Laws, checked for every implementation by tests/guards/test_conformance.py: unguarded rows stay bit-identical, ``-inf``
    stays ``-inf``, no row turns all ``-inf``, permuting rows permutes the result, a batch equals its rows one by one.
    """

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Return [R, V] logits. May write into ``logits``. ``rows.plan`` points into ``plans``."""
        ...
