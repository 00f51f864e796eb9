"""The audit trail: each row carries the hash of the one before, so that a change to history shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One change. Its number is the registry's revision after the change."""

    revision: int
    at: str  # UTC, ISO 8601
    actor: str  # key id, "loopback", "command line" or "server"
    action: str  # such as forget_set.enable
    subject: str
    detail: dict[str, Any]
    previous: str  # hash of the row before
    hash: str = ""


def seal(row: AuditRow) -> str:
    """The row's hash: sha256 over all its other fields."""
    fields = {key: value for key, value in asdict(row).items() if key != "hash"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def first_broken(rows: Iterable[AuditRow]) -> int | None:
    """The revision of the first row that does not fit the chain, or None. Rows in order, from the first."""
    previous, revision = GENESIS, 0
    for row in rows:
        if row.previous != previous or row.revision != revision + 1 or row.hash != seal(row):
            return row.revision
        previous, revision = row.hash, row.revision
    return None
