"""The registry's schema: databases of earlier releases are taken up whole, and the migrations make what the tables say."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from guards.contrastive.declaration import Contrast
from guards.suppression.declaration import Suppress
from serve.registry.migrations import HEAD
from serve.registry.records import RegistryError
from serve.registry.store import Registry
from serve.registry.tables import metadata

RELEASE_0_1_0 = Path(__file__).with_name("registry_0_1_0.sql")
"""Written by that release: an enabled set with an assistant, both calibrated, a policy and a key with a limit."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "lethe.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(RELEASE_0_1_0.read_text())
    return path


def test_a_database_of_release_0_1_0_keeps_all_that_is_in_force(old: Path) -> None:
    for _ in range(2):  # once is enough
        registry = Registry(old)
        snapshot = registry.snapshot()
        assert snapshot.revision == 7 and registry.first_broken_audit_row() is None
        plan, text = snapshot.plan("default"), snapshot.text_plans["strict"]
        assert plan.artifacts_of(Suppress) == ("p" * 64,)
        assert [(each.assistant, each.alpha) for each in plan.of(Contrast)] == [("a" * 64, 1.75)]
        assert text is not None and text.gate_thresholds == {"v" * 64: 0.71}
        assert snapshot.sets["potter"].measured["gate"]["stream_threshold"] == 0.83
        [key] = registry.stored_keys()
        assert key.label == "ops" and key.limits.requests_per_minute == 5
        registry.close()


def test_the_oldest_schema_is_brought_up_step_by_step(old: Path) -> None:
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("UPDATE schema SET version = 1")
        connection.execute("UPDATE artifacts SET detail = replace(detail, 'strength', 'alpha') WHERE kind = 'calibration'")
        connection.execute("ALTER TABLE keys DROP COLUMN limits")
        connection.execute("DROP TABLE experiments")
        connection.commit()
    registry = Registry(old)
    assert registry.snapshot().sets["potter"].measured["calibration"]["strength"] == 1.75
    assert registry.stored_keys()[0].limits.requests_per_minute is None
    registry.close()


def test_releases_before_alembic_refuse_what_this_one_writes(old: Path) -> None:
    Registry(old).close()
    with closing(sqlite3.connect(old)) as connection:
        assert connection.execute("SELECT version FROM schema").fetchall() == [(4,)], "they read up to 3"


def test_the_migrations_make_the_tables_as_they_are_declared(tmp_path: Path, old: Path) -> None:
    for path in (tmp_path / "new" / "lethe.db", old):
        registry = Registry(path)
        with registry.reading() as connection:
            context = MigrationContext.configure(connection)
            assert context.get_current_revision() == HEAD
            assert compare_metadata(context, metadata) == []
        registry.close()


@pytest.mark.parametrize("newer", ["UPDATE alembic_version SET version_num = '9999'", "DROP TABLE alembic_version"])
def test_a_database_of_a_newer_release_is_refused_and_not_touched(tmp_path: Path, newer: str) -> None:
    path = tmp_path / "lethe.db"
    Registry(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(newer)
        connection.commit()
        before = list(connection.iterdump())
    with pytest.raises(RegistryError, match="upgrade lethe"):
        Registry(path)
    with closing(sqlite3.connect(path)) as connection:
        assert list(connection.iterdump()) == before


def test_a_migration_that_fails_half_way_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the power went")

    monkeypatch.setattr("serve.registry.migrations.details.rename_in_details", fails)
    with closing(sqlite3.connect(old)) as connection:
        before = list(connection.iterdump())
    with pytest.raises(OSError, match="power"):
        Registry(old)
    with closing(sqlite3.connect(old)) as connection:
        assert list(connection.iterdump()) == before
