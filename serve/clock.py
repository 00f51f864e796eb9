"""The time of day, as far as something ends with it: it never goes back while the server runs.

A clock that is set back must not make a key valid that has expired. A set whose ``expires_at`` has passed needs none of this: it is
disabled, which a clock does not undo.
"""

from __future__ import annotations

from datetime import UTC, datetime

_latest = datetime.min.replace(tzinfo=UTC)


def never_back() -> datetime:
    """UTC now, or what this returned before if that is later."""
    global _latest
    _latest = max(_latest, datetime.now(UTC))
    return _latest
