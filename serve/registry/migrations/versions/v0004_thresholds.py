"""The stream filter's threshold was called what is said, and the release before Alembic must not take this database for its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from serve.registry.migrations.details import rename_in_details

revision, down_revision = "0004", "0003"


def upgrade() -> None:
    rename_in_details(
        "gate", {"said_threshold": "stream_threshold", "said_delta": "stream_delta", "said_negatives": "stream_negatives"}
    )
    op.execute(sa.text("DELETE FROM schema"))
    op.execute(sa.text("INSERT INTO schema (version) VALUES (4)"))
