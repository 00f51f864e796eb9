"""The registry against a plain model of it, under concurrency, tampering and kill -9."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from guards.errors import InvalidPolicy
from guards.forget_set import ForgetSet
from guards.policy import Policy
from guards.suppression.declaration import Suppress
from serve.registry.records import Artifact, NameTaken, NotReady, UnknownName, now
from serve.registry.store import Registry

NAMES = st.sampled_from(["a", "b", "c"])


def ready(fingerprint: str) -> Artifact:
    return Artifact("phrases", fingerprint, "ready", "", now())


class RegistryMachine(RuleBasedStateMachine):
    """Random changes to the registry and to a dict; they must agree after each."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "lethe.db"
        self.registry = Registry(self.path)
        self.sets: dict[str, tuple[str, bool, bool]] = {}  # name -> (phrase, ready, enabled)
        self.revision = 0

    def teardown(self) -> None:
        self.registry.close()
        self.directory.cleanup()

    def changed(self, revision: int) -> None:
        assert revision == self.revision + 1
        self.revision = revision

    @rule(name=NAMES, phrase=st.sampled_from(["x", "y"]))
    def create(self, name: str, phrase: str) -> None:
        content = ForgetSet(name=name, phrases=[phrase])
        if name in self.sets:
            with pytest.raises(NameTaken, match=name):
                self.registry.create_set(content, actor="test")
        else:
            self.changed(self.registry.create_set(content, actor="test"))
            self.sets[name] = (phrase, False, False)

    @rule(name=NAMES, phrase=st.sampled_from(["x", "y"]))
    def build(self, name: str, phrase: str) -> None:
        noted = self.registry.record_artifact(name, ForgetSet(name=name, phrases=[phrase]).fingerprint, ready(f"art-{phrase}"))
        assert noted is (name in self.sets and self.sets[name][0] == phrase)
        if noted:
            self.sets[name] = (phrase, True, self.sets[name][2])

    @rule(name=NAMES)
    def enable(self, name: str) -> None:
        phrase, is_ready, enabled = self.sets.get(name, ("", False, False))
        if name not in self.sets:
            with pytest.raises(UnknownName, match=name):
                self.registry.enable(name, actor="test")
        elif enabled:
            assert self.registry.enable(name, actor="test") == self.revision
        elif not is_ready:
            with pytest.raises(NotReady, match="ready"):
                self.registry.enable(name, actor="test")
        else:
            self.changed(self.registry.enable(name, actor="test"))
            self.sets[name] = (phrase, True, True)

    @rule(name=NAMES)
    def disable(self, name: str) -> None:
        if name not in self.sets:
            with pytest.raises(UnknownName):
                self.registry.disable(name, actor="test")
        elif self.sets[name][2]:
            self.changed(self.registry.disable(name, actor="test"))
            self.sets[name] = (*self.sets[name][:2], False)
        else:
            assert self.registry.disable(name, actor="test") == self.revision

    @rule(name=NAMES, phrase=st.sampled_from(["x", "y"]))
    def replace(self, name: str, phrase: str) -> None:
        content = ForgetSet(name=name, phrases=[phrase])
        if name not in self.sets:
            with pytest.raises(UnknownName):
                self.registry.replace_set(content, [], actor="test")
        else:
            self.changed(self.registry.replace_set(content, [ready(f"art-{phrase}")], actor="test"))
            self.sets[name] = (phrase, True, self.sets[name][2])

    @precondition(lambda self: self.sets)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sets)))
        self.changed(self.registry.delete_set(name, actor="test"))
        del self.sets[name]

    @rule()
    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry(self.path)

    @invariant()
    def agrees(self) -> None:
        snapshot = self.registry.snapshot()
        assert snapshot.revision == self.registry.revision() == self.revision
        found = {name: made.artifacts["phrases"] for name, made in snapshot.sets.items()}
        assert found == {name: f"art-{phrase}" for name, (phrase, _, enabled) in self.sets.items() if enabled}
        assert snapshot.plan("default").artifacts_of(Suppress) == tuple(
            sorted({f"art-{p}" for p, _, enabled in self.sets.values() if enabled})
        )
        assert snapshot.plan("none").artifacts_of(Suppress) == ()
        assert {stored.name for stored in self.registry.forget_sets()} == set(self.sets)
        assert self.registry.first_broken_audit_row() is None
        assert [row.revision for row in self.registry.audit()] == list(range(1, self.revision + 1))


RegistryMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_the_registry_agrees_with_a_dict = RegistryMachine.TestCase


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "lethe.db")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit SET detail = '{}' WHERE revision = 2",
        "UPDATE audit SET actor = 'nobody' WHERE revision = 2",
        "DELETE FROM audit WHERE revision = 2",
        "UPDATE audit SET at = '2020-01-01' WHERE revision = 2",
    ],
)
def test_a_change_to_history_shows(registry: Registry, tmp_path: Path, change: str) -> None:
    for name in "abc":
        registry.create_set(ForgetSet(name=name, phrases=[name]), actor="test")
    assert registry.first_broken_audit_row() is None
    with sqlite3.connect(tmp_path / "lethe.db") as connection:
        connection.execute(change)
    assert registry.first_broken_audit_row() in (2, 3)


def test_the_audit_never_repeats_what_must_be_forgotten(registry: Registry) -> None:
    secret = "the very secret"
    registry.create_set(ForgetSet(name="a", phrases=[secret], questions=[{"question": secret, "answer": secret}]), actor="test")
    registry.replace_set(ForgetSet(name="a", texts=[secret]), [], actor="test")
    registry.delete_set("a", actor="test")
    assert secret not in repr(registry.audit())


def test_concurrent_writers_get_distinct_revisions(tmp_path: Path) -> None:
    revisions: list[int] = []

    def write(worker: int) -> None:
        registry = Registry(tmp_path / "lethe.db")
        revisions.extend(registry.create_set(ForgetSet(name=f"w{worker}-{i}", phrases=["x"]), actor="test") for i in range(10))
        registry.close()

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(revisions) == list(range(1, 41))
    assert Registry(tmp_path / "lethe.db").first_broken_audit_row() is None


_WRITER = """
import sys
from pathlib import Path
from guards.forget_set import ForgetSet
from serve.registry.records import Artifact, now
from serve.registry.store import Registry
registry = Registry(Path(sys.argv[1]))
i = 0
while True:
    name = f"s{i}"
    registry.create_set(ForgetSet(name=name, phrases=["x" * 400] * 50), [Artifact("phrases", "f", "ready", "", now())], actor="t")
    print(registry.enable(name, actor="t"), flush=True)
    registry.disable(name, actor="t")
    i += 1
"""


def test_kill_9_at_any_moment_leaves_a_whole_registry(tmp_path: Path) -> None:
    """What was acknowledged is there, what was not is there wholly or not at all."""
    path, rng, acknowledged = tmp_path / "lethe.db", random.Random(5), 0
    for _ in range(6):
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(rng.random() * 0.5)
        os.kill(writer.pid, signal.SIGKILL)
        lines = writer.stdout.read().split("\n")
        writer.wait()
        writer.stdout.close()
        acknowledged = max([acknowledged, *(int(line) for line in lines[:-1] if line)])
        registry = Registry(path)
        assert registry.revision() >= acknowledged
        assert registry.first_broken_audit_row() is None
        rows = registry.audit(limit=100_000)
        created = [row.subject for row in rows if row.action == "forget_set.create"]
        assert {stored.name for stored in registry.forget_sets()} == set(created)
        toggles: dict[str, str | None] = dict.fromkeys(created)
        toggles.update({row.subject: row.action for row in rows if row.action.endswith("able")})
        for stored in registry.forget_sets():
            assert stored.enabled is (toggles[stored.name] == "forget_set.enable")
            assert len(registry.content(stored.name).phrases) == 50
        registry.close()


def test_policies_choose_among_enabled_sets(registry: Registry) -> None:
    for name in ("a", "b"):
        registry.create_set(ForgetSet(name=name, phrases=[name]), [ready(f"art-{name}")], actor="test")
        registry.enable(name, actor="test")
    registry.put_policy(Policy(name="only-a", forget_sets=("a",)), actor="test")
    registry.put_policy(Policy(name="off", guards={"suppression": {"enabled": False}}), actor="test")
    with pytest.raises(UnknownName, match="'c'"):
        registry.put_policy(Policy(name="bad", forget_sets=("c",)), actor="test")
    snapshot = registry.snapshot()
    assert snapshot.plan("default").artifacts_of(Suppress) == ("art-a", "art-b")
    assert snapshot.plan("only-a").artifacts_of(Suppress) == ("art-a",)
    assert snapshot.plan("off").artifacts_of(Suppress) == ()
    with pytest.raises(InvalidPolicy, match="bad"):
        snapshot.plan("bad")
    registry.disable("a", actor="test")
    assert registry.snapshot().plan("only-a").artifacts_of(Suppress) == ()
    registry.delete_policy("only-a", actor="test")
    with pytest.raises(UnknownName, match="built in"):
        registry.delete_policy("none", actor="test")


def test_keys_are_stored_hashed_and_recognised(registry: Registry, tmp_path: Path) -> None:
    assert registry.snapshot().caller(None, open_without_keys=True).name == "loopback"
    assert registry.snapshot().caller(None, open_without_keys=False) is None
    key_id, secret = registry.create_key("chat", "mine", actor="test")
    snapshot = registry.snapshot()
    assert snapshot.caller(secret, open_without_keys=True).name == key_id
    assert snapshot.caller(secret, open_without_keys=True).scopes == {"chat"}
    for wrong in (None, "", secret[:-1], secret + "x", key_id, "\udcff"):
        assert snapshot.caller(wrong, open_without_keys=True) is None
    registry.close()
    assert secret.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_an_expired_set_cannot_be_enabled(registry: Registry) -> None:
    expired = ForgetSet(name="a", phrases=["x"], expires_at="2020-01-01T00:00:00Z")
    registry.create_set(expired, [ready("f")], actor="test")
    with pytest.raises(NotReady, match="expired at 2020"):
        registry.enable("a", actor="test")


def test_a_set_that_nothing_would_enforce_cannot_be_enabled(registry: Registry) -> None:
    registry.create_set(ForgetSet(name="a", aliases=["x"]), actor="test")
    with pytest.raises(NotReady, match="no policy would enforce"):
        registry.enable("a", actor="test")
