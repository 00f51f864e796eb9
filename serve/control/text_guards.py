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
        self._made: dict[str, TextGuard] = {kind.name: resolve(kind.text)() for kind in GUARDS.values() if kind.text}

    async def judge(self, check: TextCheck, text: str) -> list[Verdict]:
        """What of a text a guard hits. Raises GuardUnavailable, whatever went wrong in it."""
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
            raise GuardUnavailable(f"{check.guard} failed: {type(error).__name__}") from error
