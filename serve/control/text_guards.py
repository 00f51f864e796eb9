"""Guards of other packages that judge text: made once, asked in threads, and closed when they fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import cast

from guards.catalogue import GUARDS
from guards.errors import GuardUnavailable
from guards.kinds import Found, TextGuard, resolve
from guards.similarity.gate import Verdict
from guards.text_plan import TextCheck

logger = logging.getLogger(__name__)


class TextGuards:
    """One per API process."""

    def __init__(self) -> None:
        self._made: dict[str, TextGuard] = {}
        for kind in GUARDS.values():
            try:
                if kind.text:
                    self._made[kind.name] = resolve(kind.text)()
            except Exception as error:
                raise GuardUnavailable(f"guard {kind.name!r} cannot be made: {error}; mend or uninstall it") from error

    async def judge(self, check: TextCheck, text: str, *, only_counts: bool = False) -> list[Verdict]:
        """What of a text a guard hits.

        Args:
            only_counts: a hit does nothing, so that a text which cannot be judged passes.

        Raises:
            GuardUnavailable: the guard failed, in whatever way.
        """
        judge = self._made[check.guard].judge
        try:
            found = cast("Sequence[Found]", await asyncio.to_thread(judge, text, check.config, check.sets))
            return [
                Verdict(
                    each.forget_set or check.guard,
                    "guard",
                    each.score,
                    each.threshold,
                    text[each.start : each.end],
                    "plain",
                    each.start,
                    each.end,
                )
                for each in found
            ]
        except Exception as error:
            logger.exception("lethe: guard %s failed", check.guard)
            if only_counts:
                return []
            raise GuardUnavailable(f"{check.guard} failed: {type(error).__name__}") from error
