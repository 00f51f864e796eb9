"""The registry's schema, change by change, for Alembic. The newest form is `serve.registry.tables`.

A change: write ``versions/vNNNN_what.py``, raise `HEAD` here, change ``tables``; a test compares the two. There is no way back: a
release that is older than a database refuses it, and a backup is what brings an older form back.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

HEAD = "0004"
_BEFORE_ALEMBIC = {1: "0001", 2: "0002", 3: "0003"}
"""Releases up to 0.1.0 kept a number in the table ``schema``."""


class NewerDatabase(Exception):
    """A database was written by a newer release."""


def upgrade(connection: sa.Connection) -> None:
    """Bring a database to `HEAD`, a new one included. Runs in the connection's transaction.

    Raises:
        NewerDatabase: nothing was changed.
    """
    found = _revision(connection)
    if found == HEAD:
        return
    # Only now: loading Alembic takes longer than opening a database.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        if found is None and sa.inspect(connection).has_table("schema"):
            version = connection.scalar(sa.text("SELECT version FROM schema"))
            if version not in _BEFORE_ALEMBIC:
                raise NewerDatabase(f"schema {version}")
            command.stamp(config, _BEFORE_ALEMBIC[version])
        command.upgrade(config, HEAD)
    except CommandError as error:  # it names a revision that is not here
        raise NewerDatabase(f"revision {found}") from error


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return found
