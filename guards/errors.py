"""What can be wrong with a guard's input. Every message names the value, the rule and the fix."""

from __future__ import annotations

from collections.abc import Sequence


class GuardError(Exception):
    """Root of all errors of this package."""

    status = 400
    """Of an HTTP answer that says so: 400 where the caller can mend it, 503 where the server must."""


class GuardUnavailable(GuardError):
    """A guard that a request needs cannot be asked. Guarded requests are refused until it works."""

    status = 503


class InvalidJson(GuardError):
    """Bytes from outside are not one JSON object."""


class InvalidForgetSet(GuardError):
    """A forget set breaks a rule. ``problems`` lists every breach, not only the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class InvalidPolicy(GuardError):
    """A policy names something that does not exist or cannot be."""


class InvalidArtifact(GuardError):
    """An artifact file is missing, truncated, of another kind or version, or does not match its fingerprint."""

    status = 500


class VocabularyMismatch(GuardError):
    """Two things that must share one vocabulary do not: logits, artifact or tokenizer."""

    status = 500


class Untrainable(GuardError):
    """A forget set, or a model, from which no assistant can be made."""
