"""What migrations share."""

from __future__ import annotations

import json
from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op


def rename_in_details(kind: str, names: Mapping[str, str]) -> None:
    """Rename fields in the JSON that artifacts of a kind have as their detail: old name -> new name."""
    rows = op.get_bind().execute(sa.text("SELECT set_name, detail FROM artifacts WHERE kind = :kind"), {"kind": kind}).all()
    for set_name, detail in rows:
        renamed = {names.get(field, field): value for field, value in json.loads(detail).items()}
        statement = sa.text("UPDATE artifacts SET detail = :detail WHERE kind = :kind AND set_name = :set_name")
        op.get_bind().execute(statement, {"detail": json.dumps(renamed), "kind": kind, "set_name": set_name})
