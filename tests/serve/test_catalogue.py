"""The catalogue of guards, with guards and an encoder of another package (`tests/toys`) that no file of lethe knows."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guards.catalogue import CALIBRATIONS, GUARDS, OWN, TRAINED
from guards.errors import InvalidPolicy
from guards.kinds import GuardKind, resolve
from guards.policy import Policy, parse_policy
from guards.similarity.encoder import EncoderUnavailable, installed_encoders, make_encoder
from serve.control.similarity import Similarity
from serve.registry.records import UnreadablePolicy
from serve.registry.store import Registry

TOYS = Path(__file__).parents[1] / "toys"


def with_toys(program: str, toys: Path = TOYS) -> subprocess.CompletedProcess[str]:
    """Run a program where that package is installed: guards are found when the catalogue is imported."""
    path = os.pathsep.join([str(toys), str(TOYS.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_whatever_a_guard_declares_exists(kind: GuardKind) -> None:
    places = [kind.logits, kind.text]
    places += [kind.files.reader] if kind.files else []
    places += [kind.build.fingerprint, kind.build.make] if kind.build else []
    places += [kind.training.order, kind.training.check] if kind.training else []
    assert [place for place in places if place and not callable(resolve(place))] == []
    assert kind.entry is None or kind.entry.guard == kind.name
    if kind.training is not None:
        assert kind.files is not None and set(kind.training.methods.values()) == set(kind.files.kinds)
        compile(f"import {kind.training.program}", "", "exec")


def test_kinds_of_artifacts_are_told_apart_by_their_names() -> None:
    kinds = [name for kind in OWN if kind.files for name in kind.files.kinds]
    assert len({*kinds, *CALIBRATIONS}) == len(kinds) + len(CALIBRATIONS)
    assert {"assistant", "project", "steer", "adapter"} == set(TRAINED)
    assert not set(CALIBRATIONS) & set(TRAINED)
    assert list(GUARDS)[-1] == "suppression", "it has the last word"


def test_a_guard_of_another_package_is_in_policies_plans_and_on_the_wire() -> None:
    ran = with_toys(
        """
import json
from guards.catalogue import GUARDS
from guards.kinds import SetArtifacts
from guards.policy import BUILT_IN, parse_policy
from serve.protocol.wire import PLAN_KEY, decode_plan, encode_plan
from serve.registry.plans import enforcing, plan_of, text_plan_of
policy = parse_policy({"name": "p", "guards": {"digits": {"also_fractions": True}, "shouting": {"answer": "redact"}}})
counting = parse_policy({"name": "counts", "guards": {"shouting": {"prompt": "monitor", "answer": "monitor"}}})
sets = {"a": SetArtifacts("a"), "b": SetArtifacts("b")}
plan, text = plan_of(policy, sets, 1), text_plan_of(policy, sets)
assert decode_plan({PLAN_KEY: json.loads(json.dumps(encode_plan(plan)))}) == plan
print(json.dumps({
    "guards": list(GUARDS),
    "entries": [entry.characters for entry in plan.entries],
    "checks": [[check.guard, check.config.answer, [made.name for made in check.sets]] for check in text.checks],
    "enforcing": enforcing([policy, counting, *BUILT_IN.values()], SetArtifacts("a")),
    "none": plan_of(BUILT_IN["none"], sets, 1).entries == (),
}))
"""
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    assert found["guards"] == [*(kind.name for kind in OWN[:-1]), "digits", "shouting", "suppression"]
    assert found["entries"] == ["0123456789/%"], "one for both sets"
    assert found["checks"] == [["shouting", "redact", ["a", "b"]]]
    assert found["enforcing"] == ["p"] and found["none"], "what only counts enforces nothing"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("digits = toys:MISSING", "cannot be loaded"),
        ("digits = toys:DigitsGuard", "must name a GuardKind"),
        ("another = toys:DIGITS", "of that name"),
        ("all = bold:ALL", "cannot be called 'all'"),
        ("suppression = guards.suppression.declaration:SUPPRESSION", "there is a guard 'suppression' already"),
        ("digits = toys:DIGITS\ntwin = bold:TWIN", "there is a guard with the settings toys.DigitsConfig already"),
        ("thief = bold:THIEF", "there is a kind of artifacts 'assistant' already"),
        ("bold = bold:BOLD", "off unless a policy names it"),
        ("bare = bold:BARE", "needs entry"),
    ],
)
def test_a_guard_that_cannot_be_used_keeps_everything_from_starting_and_says_why(tmp_path: Path, entry: str, message: str) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lethe.guards]\n{entry}\n")
    (tmp_path / "toys.py").write_text((TOYS / "toys.py").read_text())
    (tmp_path / "bold.py").write_text(
        "import dataclasses, toys\n"
        "BOLD = dataclasses.replace(toys.DIGITS, name='bold', default=toys.DigitsConfig())\n"
        "BARE = dataclasses.replace(toys.DIGITS, name='bare')\n"
        "class TwinEntry(toys.NoDigits): guard = 'twin'\n"
        "TWIN = dataclasses.replace(toys.DIGITS, name='twin', entry=TwinEntry)\n"
        "class AllEntry(toys.NoDigits): guard = 'all'\n"
        "class AllConfig(toys.DigitsConfig): pass\n"
        "ALL = dataclasses.replace(toys.DIGITS, name='all', entry=AllEntry, config=AllConfig)\n"
        "class ThiefEntry(toys.NoDigits): guard = 'thief'\n"
        "from guards.contrastive.declaration import CONTRAST\n"
        "class ThiefConfig(toys.DigitsConfig): pass\n"
        "THIEF = dataclasses.replace(toys.DIGITS, name='thief', entry=ThiefEntry, config=ThiefConfig, files=CONTRAST.files)\n"
    )
    ran = with_toys("import guards.policy", tmp_path)
    assert ran.returncode != 0 and message in ran.stderr.splitlines()[-1], ran.stderr


def test_a_policy_that_names_a_guard_which_was_uninstalled_closes_and_one_where_it_is_off_does_not(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "lethe.db")
    registry.put_policy(parse_policy({"name": "p"}), actor="t")
    stored = Policy(name="p").model_dump(mode="json")
    for digits, readable in ((None, True), ({"enabled": False}, True), ({"enabled": True}, False)):
        stored["guards"]["digits"] = digits
        with registry._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE policies SET content = ?", (json.dumps(stored),))
        if readable:
            assert "p" in registry.snapshot().policies
        else:
            with pytest.raises(UnreadablePolicy, match="install the guard"):
                registry.snapshot()
    registry.close()
    for written in ({}, {"enabled": False}):  # what somebody writes and does not exist is a mistake
        with pytest.raises(InvalidPolicy, match="digits"):
            parse_policy({"name": "q", "guards": {"digits": written}})


def test_an_encoder_of_another_package_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guards.forget_set import ForgetSet

    monkeypatch.syspath_prepend(TOYS)
    assert installed_encoders() == ["trigrams"]
    assert np.allclose(np.linalg.norm(make_encoder("trigrams").embed(["one text", "another"]), axis=1), 1)

    async def scenario() -> None:
        similarity = Similarity("trigrams", tmp_path)
        await similarity.start()
        try:
            assert similarity.failure is None
            content = ForgetSet(name="a", questions=[{"question": "Where do the copper lanterns hang?", "answer": "In the mill."}])
            vectors = await similarity.build(content)
            path = tmp_path / "similarity" / f"{vectors.fingerprint}.safetensors"
            path.parent.mkdir()
            vectors.save(path)
            await similarity.load([vectors.fingerprint])
            thresholds = {vectors.fingerprint: 0.8}
            assert await similarity.judge_conversation(["where do the copper lanterns hang"], thresholds)
            assert not await similarity.judge_conversation(["What is two plus two?"], thresholds)
        finally:
            await similarity.stop()

    asyncio.run(scenario())


def test_an_encoder_that_returns_something_else_than_vectors_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOYS)
    import toys

    monkeypatch.setattr(toys.Trigrams, "embed", lambda _self, texts: np.full((len(texts), 256), np.nan))
    with pytest.raises(EncoderUnavailable, match="not finite"):
        make_encoder("trigrams").embed(["x"])
    monkeypatch.setattr(toys.Trigrams, "__init__", lambda _self: 1 / 0, raising=False)
    with pytest.raises(EncoderUnavailable, match="cannot be made"):
        make_encoder("trigrams")
    with pytest.raises(EncoderUnavailable, match=r"modules\.json|cannot load"):
        make_encoder("absent")
