"""The first form."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None


def upgrade() -> None:
    op.create_table("schema", sa.Column("version", sa.Integer, nullable=False))
    op.create_table(
        "forget_sets",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("header", sa.JSON, nullable=False),
        sa.Column("content", sa.String, nullable=False),
        sa.Column("enabled_at", sa.String),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("updated_at", sa.String, nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("set_name", sa.String, sa.ForeignKey("forget_sets.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("updated_at", sa.String, nullable=False),
    )
    for name in ("policies", "experiments"):
        op.create_table(name, sa.Column("name", sa.String, primary_key=True), sa.Column("content", sa.String, nullable=False))
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("digest", sa.String, nullable=False, unique=True),
        sa.Column("scope", sa.String, nullable=False),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("at", sa.String, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.Column("previous", sa.String, nullable=False),
        sa.Column("hash", sa.String, nullable=False),
    )
