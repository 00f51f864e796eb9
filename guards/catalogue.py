"""The catalogue of guards: one line for each. What a guard is, it says itself (`guards.kinds.GuardKind`).

Guards of other packages are found by the entry point group ``lethe.guards``; each entry point names a `GuardKind`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from guards.contrastive.declaration import CONTRAST
from guards.errors import GuardError
from guards.kinds import GuardKind, TextConfig
from guards.similarity.declaration import GATE, STREAM
from guards.steering.declaration import CORRUPTION, STEERING
from guards.suppression.declaration import SUPPRESSION

GROUP = "lethe.guards"
OWN = (GATE, STREAM, CORRUPTION, STEERING, CONTRAST, SUPPRESSION)
"""In the order in which a request meets those that act in the engine. Suppression has the last word."""


class InvalidGuard(GuardError):
    """A guard of another package cannot be used. Nothing starts: a policy may rely on it."""


def _installed() -> Iterable[GuardKind]:
    known = list(OWN)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            kind = point.load()
        except Exception as error:
            raise InvalidGuard(f"guard {point.name!r} ({point.value}) cannot be loaded: {error}; mend or uninstall it") from error
        if not isinstance(kind, GuardKind) or kind.name != point.name:
            raise InvalidGuard(f"entry point {point.name!r} must name a GuardKind of that name, {point.value} is {kind!r}")
        taken = {each for other in known for each in _own_names(other)}
        if shared := next((each for each in _own_names(kind) if each in taken), None):
            raise InvalidGuard(f"there is {shared} already ({point.value}); every guard has its own")
        if kind.default is not None:
            raise InvalidGuard(f"guard {kind.name!r} has a default; a guard of another package is off unless a policy names it")
        if kind.text and not issubclass(kind.config, TextConfig):
            raise InvalidGuard(f"guard {kind.name!r} judges text, so its config must be a guards.kinds.TextConfig")
        if not kind.text and (kind.entry is None or kind.entry.guard != kind.name or kind.entries is None or not kind.logits):
            raise InvalidGuard(f"guard {kind.name!r} needs entry (with guard = {kind.name!r}), entries and logits, or text")
        known.append(kind)
        yield kind


def _own_names(kind: GuardKind) -> Iterable[str]:
    """What no two guards may share."""
    yield f"a guard {kind.name!r}"
    yield f"a guard with the settings {kind.config.__module__}.{kind.config.__qualname__}"
    yield from (f"a kind of calibration {name!r}" for name in kind.calibrations)
    if kind.files:
        yield from (f"a kind of artifacts {artifact!r}" for artifact in kind.files.kinds)
        yield f"a folder of artifacts {kind.files.folder!r}"
    if kind.training:
        yield f"a training route {kind.training.route!r}"


GUARDS: dict[str, GuardKind] = {kind.name: kind for kind in (*OWN[:-1], *_installed(), OWN[-1])}
TRAINED: tuple[str, ...] = tuple(name for kind in GUARDS.values() if kind.trained and kind.files for name in kind.files.kinds)
"""Kinds of artifacts that are trained or fitted by order, and kept until the next order."""
BUILT: tuple[str, ...] = tuple(name for kind in GUARDS.values() if kind.build and kind.files for name in kind.files.kinds)
"""Kinds of artifacts that are made of a set's content alone, whenever it changes."""
CALIBRATIONS: tuple[str, ...] = tuple(name for kind in GUARDS.values() for name in kind.calibrations)
"""Kinds that are no file: they have the fingerprint of the artifact for which they were measured."""
TRAINING_METHODS: dict[str, tuple[GuardKind, str]] = {
    method: (kind, artifact) for kind in GUARDS.values() if kind.training for method, artifact in kind.training.methods.items()
}
"""What `lethe train` makes: method -> the guard that acts by it, and the kind of artifact."""
_GUARD_OF = {name: kind for kind in GUARDS.values() if kind.files for name in kind.files.kinds}


def guard_of(artifact: str) -> GuardKind | None:
    """The guard whose artifacts are of a kind; None for what is no file, or of a guard that is not installed any more."""
    return _GUARD_OF.get(artifact)
