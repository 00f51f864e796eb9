"""The registry's tables, in their newest form. A change here needs a migration: see `serve.registry.migrations`."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
schema = sa.Table("schema", metadata, sa.Column("version", sa.Integer, nullable=False))
"""Read by releases up to 0.1.0 only: it holds a number that they refuse."""
forget_sets = sa.Table(
    "forget_sets",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("header", sa.JSON, nullable=False),
    sa.Column("content", sa.String, nullable=False),
    sa.Column("enabled_at", sa.String),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("updated_at", sa.String, nullable=False),
)
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("set_name", sa.ForeignKey("forget_sets.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("detail", sa.String, nullable=False),
    sa.Column("updated_at", sa.String, nullable=False),
)
policies = sa.Table(
    "policies",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("content", sa.String, nullable=False),
)
experiments = sa.Table(
    "experiments",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("content", sa.String, nullable=False),
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, unique=True),
    sa.Column("scope", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("limits", sa.JSON),  # those of `serve.registry.snapshot.Limits` that are not its defaults
)
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("revision", sa.Integer, primary_key=True),
    sa.Column("at", sa.String, nullable=False),
    sa.Column("actor", sa.String, nullable=False),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Column("previous", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False),
)
