"""Keys had no limits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    if "limits" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("keys")}:
        op.add_column("keys", sa.Column("limits", sa.JSON))
