"""Policies: which forget sets apply to a request, through which guards, and what a hit does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, create_model, model_validator

from guards.catalogue import GUARDS, InvalidGuard
from guards.errors import InvalidPolicy
from guards.forget_set import Frozen, Name, describe_validation
from guards.kinds import Config, GuardKind

DEFAULT = "default"
"""The policy of every request that does not select another. Can be changed, cannot be deleted."""
NONE = "none"
"""The policy without guards, for comparisons. Cannot be changed; only privileged keys may select it."""


C = TypeVar("C", bound=Config)
STORED = {"stored": True}
"""The context in which policies are validated that were written before."""
_NAMES: dict[type[Config], str] = {kind.config: name for name, kind in GUARDS.items()}


class GuardConfigs(Frozen):
    """One frozen config per guard of the catalogue; null = the guard is off."""

    def all(self, config: type[C]) -> tuple[C, ...]:
        """The settings of a guard of which a policy may hold several, as far as they are enabled."""
        found: tuple[C, ...] = self._on(_NAMES[config])
        return found

    def _on(self, name: str) -> tuple[Any, ...]:
        found = getattr(self, name)
        return tuple(each for each in (found if isinstance(found, tuple) else (found,)) if each is not None and each.enabled)

    def of(self, config: type[C]) -> C | None:
        """The settings of a guard; None if it is off."""
        return next(iter(self.all(config)), None)

    def enabled(self) -> list[tuple[GuardKind, Config]]:
        """Every guard that is on, with its settings, in the order of the catalogue."""
        return [(kind, config) for name, kind in GUARDS.items() for config in self._on(name)]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_off(cls, fields: Any, info: ValidationInfo) -> Any:
        """Drop guards that are off and not installed: a stored policy may name guards that were uninstalled since."""
        if not isinstance(fields, dict):
            return fields

        def is_off(value: Any) -> bool:
            switched_off = isinstance(value, dict) and value.get("enabled") is False
            return value in (None, [], ()) or (switched_off and info.context is STORED)  # in what somebody writes, it is a mistake

        return {name: value for name, value in fields.items() if name in GUARDS or not is_off(value)}

    @model_validator(mode="after")
    def _check(self) -> GuardConfigs:
        for kind in GUARDS.values():
            if kind.check is not None:
                kind.check(self)
        return self


def _field(kind: GuardKind) -> tuple[Any, Any]:
    """A guard's field in `GuardConfigs`: type and default."""
    if kind.many:
        return tuple[kind.config, ...], Field((), max_length=8, description=kind.summary)  # type: ignore[name-defined]
    optional: Any = kind.config | None
    if kind.shorthand:
        named = kind.shorthand
        optional = Annotated[optional, BeforeValidator(lambda value: {} if value == named else value)]
    return optional, Field(kind.default, description=kind.summary)


if taken := [name for name in GUARDS if hasattr(GuardConfigs, name)]:
    raise InvalidGuard(f"a guard cannot be called {taken[0]!r}, which policies use themselves; rename it")
if not TYPE_CHECKING:
    _fields = {name: _field(kind) for name, kind in GUARDS.items()}
    GuardConfigs = create_model("GuardConfigs", __base__=GuardConfigs, __doc__=GuardConfigs.__doc__, **_fields)


class Policy(Frozen):
    """A named composition.

    ``forget_sets`` is ``"enabled"`` for all enabled sets, or names; a named set counts only while it is enabled, so that disabling
    a set switches it off everywhere. ``on_hit`` says what a guard does when it meets something to forget: ``unlearn`` steers the
    answer away from it. A request that cannot go on at all ends with ``finish_reason: "content_filter"`` and ``refusal``.
    """

    name: Name
    description: str = Field("", max_length=10_000)
    forget_sets: Literal["enabled"] | tuple[Name, ...] = "enabled"
    guards: GuardConfigs = Field(default_factory=GuardConfigs)
    on_hit: Literal["unlearn"] = "unlearn"
    refusal: str = Field("I cannot continue this answer.", min_length=1, max_length=1_000)


BUILT_IN = {
    DEFAULT: Policy(name=DEFAULT, description="Applies to every request that does not select another policy."),
    NONE: Policy(
        name=NONE,
        description="No guards at all: for comparisons.",
        guards=GuardConfigs.model_validate({name: {"enabled": False} for name, kind in GUARDS.items() if kind.default is not None}),
    ),
}


def parse_policy(fields: dict[str, Any]) -> Policy:
    """Build a policy from untyped fields.

    Raises:
        InvalidPolicy: a field breaks its rule, or the policy is the built-in ``none``.
    """
    try:
        policy = Policy.model_validate(fields)
    except ValidationError as error:
        raise InvalidPolicy("; ".join(describe_validation(error))) from None
    if policy.name == NONE:
        raise InvalidPolicy(f"policy {NONE!r} is built in and stays without guards; choose another name")
    return policy
