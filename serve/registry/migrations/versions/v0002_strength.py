"""The strength of a calibration was called alpha."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from serve.registry.migrations.details import rename_in_details

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    if not sa.inspect(op.get_bind()).has_table("experiments"):  # the first releases of this schema had none
        columns = sa.Column("name", sa.String, primary_key=True), sa.Column("content", sa.String, nullable=False)
        op.create_table("experiments", *columns)
    rename_in_details("calibration", {"alpha": "strength"})
