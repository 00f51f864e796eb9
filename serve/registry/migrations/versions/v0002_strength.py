"""The strength of a calibration was called alpha."""

from __future__ import annotations

from serve.registry.migrations.details import rename_in_details

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    rename_in_details("calibration", {"alpha": "strength"})
