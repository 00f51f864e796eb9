"""Run by Alembic: migrations go over the connection that `upgrade` was given, in its transaction."""

from __future__ import annotations

from alembic import context

from serve.registry.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
