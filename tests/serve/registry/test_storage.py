"""Faults of storage at the registry: real errors of SQLite, an older copy put in place, backups, clocks."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from guards.forget_set import ForgetSet
from guards.policy import parse_policy
from serve.lock import InUseElsewhere, sole_server
from serve.registry.backup import Backup, BrokenBackup, write_backup
from serve.registry.position import Mark, Position
from serve.registry.records import Artifact, RegistryError, RolledBack, now
from serve.registry.store import Registry
from serve.registry.usage import Usage, Used
from serve.sqlite import StorageFault


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def registry(state: Path) -> Iterator[Registry]:
    registry = Registry(state / "lethe.db")
    yield registry
    registry.close()


def add(registry: Registry, name: str, *, enabled: bool = True, phrase: str = "secret") -> None:
    registry.create_set(ForgetSet(name=name, phrases=(phrase,)), [Artifact("phrases", name, "ready", "", now())], actor="t")
    registry.record_artifact(
        name, registry.forget_set(name).header["fingerprint"], Artifact("similarity", name, "ready", "", now())
    )
    if enabled:
        registry.enable(name, actor="t")


def on_connect(registry: Registry, pragma: str) -> None:
    sa.event.listen(registry._engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {pragma}"))


@pytest.mark.parametrize(
    ("pragma", "said"),
    [("max_page_count=20", "the disk is full; free some space"), ("query_only=ON", "make the directory writable")],
)
def test_a_file_that_cannot_be_written_changes_nothing_and_says_what_to_do(
    registry: Registry, state: Path, pragma: str, said: str
) -> None:
    add(registry, "kept")
    on_connect(registry, pragma)
    with pytest.raises(StorageFault, match=said):
        registry.create_set(ForgetSet(name="big", phrases=tuple(f"phrase {i}" for i in range(20_000))), actor="t")
    assert list(registry.snapshot().sets) == ["kept"]
    with registry_at(state) as after:
        assert [each.name for each in after.forget_sets()] == ["kept"]
        assert after.first_broken_audit_row() is None


def registry_at(state: Path) -> closing[Registry]:
    """A second registry over the same file, as another process has it."""
    return closing(Registry(state / "lethe.db"))


def test_a_damaged_page_is_found_and_named(registry: Registry, state: Path) -> None:
    add(registry, "kept")
    file = state / "lethe.db"
    content = bytearray(file.read_bytes())
    registry.check_file()
    content[4_096:] = b"\xa5" * (len(content) - 4_096)
    file.write_bytes(content)
    with pytest.raises(StorageFault, match="lethe restore FILE"):
        registry.check_file()
    with pytest.raises(StorageFault, match="lethe restore FILE"):
        registry.snapshot()
    file.write_bytes(b"no database at all" * 1_000)
    with pytest.raises(StorageFault, match="no SQLite database"):
        Registry(file)


def test_an_older_copy_is_noticed_by_whoever_knew_better(registry: Registry, state: Path) -> None:
    add(registry, "old")
    shutil.copy(state / "lethe.db", state / "copy")
    add(registry, "new")
    (state / "copy").replace(state / "lethe.db")
    for use in (registry.snapshot, registry.check_history, lambda: registry.disable("old", actor="t")):
        with pytest.raises(RolledBack, match="an older copy was put in its place"):
            use()
    with registry_at(state) as later:  # after a restart
        with pytest.raises(RolledBack):
            later.snapshot()
        with pytest.raises(RolledBack):
            later.enable("old", actor="t")
    Mark(state / "lethe.db").path.unlink()  # what the message says
    with registry_at(state) as accepted:
        assert list(accepted.snapshot().sets) == ["old"]


def test_another_history_of_the_same_length_is_noticed(registry: Registry, state: Path) -> None:
    add(registry, "one")
    shutil.copy(state / "lethe.db", state / "copy")
    registry.disable("one", actor="t")
    (state / "copy").replace(state / "lethe.db")
    Mark(state / "lethe.db").path.unlink()
    with registry_at(state) as another:
        another.create_key("chat", "", actor="t")
    with pytest.raises(RolledBack):
        registry.snapshot()


def test_a_mark_that_cannot_be_read_counts_as_absent(state: Path) -> None:
    mark = Mark(state / "lethe.db")
    assert mark.read() is None
    mark.write(Position(3, "abc"))
    assert mark.read() == Position(3, "abc")
    mark.path.write_text("{")
    assert mark.read() is None


# Backups


def test_a_backup_brings_sets_and_policies_back_as_a_change_like_every_other(
    registry: Registry, state: Path, tmp_path: Path
) -> None:
    add(registry, "deleted")
    add(registry, "changed")
    registry.put_policy(parse_policy({"name": "strict"}), actor="t")
    (state / "artifacts" / "phrases").mkdir(parents=True)
    (state / "artifacts" / "phrases" / "deleted.safetensors").write_bytes(b"compiled")
    revision, files, missing = write_backup(state, tmp_path / "backup.tar")
    assert (revision, files) == (registry.revision(), 1)
    assert sorted(path.stem for path in missing) == ["changed", "changed", "deleted"]
    assert (tmp_path / "backup.tar").stat().st_mode & 0o077 == 0, "nobody else may read what is to be forgotten"
    (state / "artifacts" / "phrases" / "deleted.safetensors").unlink()
    registry.delete_set("deleted", actor="t")
    registry.disable("changed", actor="t")
    registry.delete_policy("strict", actor="t")
    key, _ = registry.create_key("admin", "made since", actor="t")
    add(registry, "since")
    before = registry.revision()
    backup = Backup(tmp_path / "backup.tar")
    plan = backup.compare(state)
    assert (plan.added, plan.changed, plan.removed, plan.released) == (("deleted",), ("changed",), ("since",), ("since",))
    assert backup.restore(state, actor="t") == before + 1
    backup.close()
    snapshot = registry.snapshot()  # of a server that ran all the while
    assert sorted(snapshot.sets) == ["changed", "deleted"]
    assert "strict" in snapshot.policies
    assert [each.id for each in snapshot.keys] == [key], "keys stay: one that was revoked must not come back"
    assert registry.content("deleted").phrases == ("secret",)
    assert (state / "artifacts" / "phrases" / "deleted.safetensors").read_bytes() == b"compiled"
    assert registry.first_broken_audit_row() is None
    assert registry.audit(after=before)[0].action == "state.restore"


def test_texts_that_were_dropped_stay_dropped(registry: Registry, state: Path, tmp_path: Path) -> None:
    add(registry, "dropped")
    write_backup(state, tmp_path / "backup.tar")
    registry.strip_set("dropped", actor="t")
    backup = Backup(tmp_path / "backup.tar")
    assert backup.compare(state).kept == ("dropped",)
    backup.restore(state, actor="t")
    backup.close()
    assert registry.forget_set("dropped").stripped and registry.forget_set("dropped").enabled


@pytest.mark.parametrize("damage", ["gone", "damaged", "older"])
def test_where_no_registry_can_be_kept_all_of_the_backup_takes_its_place_and_no_server_may_run(
    registry: Registry, state: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copy(state / "lethe.db", tmp_path / "older")
    add(registry, "kept")
    registry.create_key("admin", "", actor="t")
    write_backup(state, tmp_path / "backup.tar")
    if damage == "older":
        (tmp_path / "older").replace(state / "lethe.db")
    elif damage == "gone":
        shutil.rmtree(state)
    else:
        (state / "lethe.db").write_bytes(b"no database at all" * 1_000)
    backup = Backup(tmp_path / "backup.tar")
    plan = backup.compare(state)
    assert plan.replaces and plan.why
    with sole_server(state), pytest.raises(InUseElsewhere):
        backup.restore(state, actor="t")
    backup.restore(state, actor="t")
    backup.close()
    with registry_at(state) as after:
        assert list(after.snapshot().sets) == ["kept"]
        assert len(after.stored_keys()) == 1
        assert after.audit(limit=100)[-1].action == "state.restore"
        assert after.first_broken_audit_row() is None
    assert damage == "gone" or list(state.glob("lethe.db.before-*")), "what was there is not thrown away"


def test_a_restore_that_is_interrupted_leaves_no_empty_registry_that_a_server_would_start_with(
    registry: Registry, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "kept")
    write_backup(state, tmp_path / "backup.tar")
    (state / "lethe.db").write_bytes(b"no database at all" * 1_000)
    backup = Backup(tmp_path / "backup.tar")

    def full(source: Path, target: Path) -> None:
        raise StorageFault("the disk is full")

    monkeypatch.setattr("serve.registry.backup._copy", full)
    with pytest.raises(StorageFault, match="full"):
        backup.restore(state, actor="t")
    with pytest.raises(StorageFault, match="no SQLite database"):
        Registry(state / "lethe.db")
    (state / "lethe.db").unlink()  # as if it had come as far as that
    with registry_at(state) as empty, pytest.raises(RolledBack):
        empty.check_history()
    backup.close()


def test_a_registry_that_is_sound_and_cannot_be_used_now_is_not_replaced(registry: Registry, state: Path, tmp_path: Path) -> None:
    add(registry, "kept")
    write_backup(state, tmp_path / "backup.tar")
    with registry._engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 9999"))
    backup = Backup(tmp_path / "backup.tar")
    with pytest.raises(RegistryError, match="upgrade"):
        backup.restore(state, actor="t")
    backup.close()


def test_nobody_else_may_look_into_what_is_made(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        place = tmp_path / "a#b" / "state"
        with registry_at(place) as made:
            add(made, "kept")
        assert place.stat().st_mode & 0o077 == 0
        assert write_backup(place, tmp_path / "backup.tar")[0] == 2, "also where a path has signs that mean something in a URI"
        backup = Backup(tmp_path / "backup.tar")
        backup.restore(tmp_path / "new" / "state", actor="t")
        backup.close()
        assert (tmp_path / "new" / "state").stat().st_mode & 0o077 == 0
    finally:
        os.umask(previous)


def test_a_backup_that_is_none_or_was_changed_is_refused(registry: Registry, state: Path, tmp_path: Path) -> None:
    add(registry, "kept")
    file = tmp_path / "backup.tar"
    write_backup(state, file)
    content = file.read_bytes()
    for broken in (b"", b"something else", content[: len(content) // 2]):
        file.write_bytes(broken)
        with pytest.raises(BrokenBackup, match="not a whole backup"):
            Backup(file)
    file.write_bytes(content)
    folder = tmp_path / "changed"
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    with registry_at(folder) as inside:
        inside.disable("kept", actor="somebody")
    with tarfile.open(file, "w") as archive:
        for each in ("manifest.json", "lethe.db"):
            archive.add(folder / each, each)
    with pytest.raises(BrokenBackup, match="changed after it was made"):
        Backup(file)


# Usage


def test_usage_adds_up_and_is_told_by_day(tmp_path: Path) -> None:
    usage = Usage(tmp_path / "usage.db")
    usage.add({("2026-11-26", "k"): Used(1, 10, "a"), ("2026-11-25", "k"): Used(5, 50, "z")})
    usage.add({("2026-11-26", "k"): Used(2, 5, "b")})
    assert usage.of_day("2026-11-26") == {"k": Used(3, 15, "b")}
    usage.close()
