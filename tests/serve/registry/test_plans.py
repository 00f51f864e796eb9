"""What steering does to plans: who is steered by what, what keeps caches apart, and which tokens a name is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guards.contrastive.declaration import Contrast
from guards.errors import InvalidPolicy
from guards.kinds import SetArtifacts
from guards.policy import BUILT_IN, parse_policy
from guards.steering.declaration import Corrupt, Steer
from guards.suppression.vocabulary import Vocabulary
from guards.types import ArtifactRef, Entry, Plan
from serve.generation.gate import GateDecision, spans_of
from serve.registry.plans import enforcing, judging, notes
from serve.registry.snapshot import Snapshot
from tests.plans import made, suppress


def snapshot(guards: dict[str, Any], more: Mapping[str, SetArtifacts] = MappingProxyType({})) -> Snapshot:
    policy = parse_policy({"name": "p", "guards": guards})
    sets = made("a", adapter="a-adapter", steer="a-steer") | made("b", adapter="b-adapter") | dict(more)
    return Snapshot(1, sets, {**BUILT_IN, "p": policy}, ())


def embedded(**measured: Any) -> dict[str, SetArtifacts]:
    return made("a", adapter="a-adapter", similarity="a-vectors", measured=measured) | made(
        "b", adapter="b-adapter", similarity="b-vectors"
    )


def test_a_plan_names_every_chosen_sets_artifacts_of_the_policys_methods_and_no_others() -> None:
    plan = snapshot({"steering": [{"method": "adapter", "strength": 2}, {"method": "project"}]}).plan("p")
    assert plan.of(Steer) == (Steer("a-adapter", 2.0), Steer("b-adapter", 2.0)) and plan.engages and plan.changes_cache
    assert snapshot({}).plan("p").entries == ()
    assert snapshot({"steering": [{"method": "adapter", "enabled": False}]}).plan("p").entries == ()


def test_of_two_sets_with_one_artifact_the_stronger_calibration_holds() -> None:
    same = made("a", assistant="one", measured={"calibration": {"strength": 2.0}}) | made("b", assistant="one")
    plan = Snapshot(1, same, BUILT_IN, ()).plan("default")
    assert [entry.alpha for entry in plan.of(Contrast)] == [2.0]


def test_what_a_policy_expects_and_no_set_has_is_said() -> None:
    found = snapshot({"steering": [{"method": "steer"}]})
    assert notes(found.policies["p"], found.sets) == [
        "nothing under this policy acts on forget set 'b'",
        "forget set 'b' has no artifact by steer; make one with `lethe train b --method steer`",
    ]
    assert found.artifacts == [ArtifactRef("steering", "a-steer")]


def test_a_set_is_corrupted_with_the_policys_strength_or_its_calibrated_one_or_the_kinds_usual_one() -> None:
    def strengths(**corrupt: Any) -> dict[str, float]:
        calibrated = embedded(corruption={"zero_out_top_k": {"strength": 0.75}})
        found = snapshot({"gate": {}, "corrupt": corrupt}, calibrated).text_plans["p"]
        assert found is not None
        return dict(found.corrupt_strength)

    assert strengths(kind="zero_out_top_k") == {"a-vectors": 0.75, "b-vectors": 1.0}
    assert strengths(kind="rand_noise_first_n") == {"a-vectors": 2.0, "b-vectors": 2.0}, "calibrated for another kind"
    assert strengths(kind="zero_out_top_k", strength=0.5) == {"a-vectors": 0.5, "b-vectors": 0.5}


def test_a_policy_that_says_calibrated_acts_at_the_strength_that_was_measured_for_each_set() -> None:
    measured = {"steer_strength": {"strength": 0.5}, "corruption": {"rand_noise_first_n": {"strength": 1.5}}}
    a = made("a", steer="a-steer", project="a-project", similarity="a-vectors", measured=measured)
    b = made("b", steer="b-steer", similarity="b-vectors", measured={"steer_strength": {"strength": 0.0}})
    steering = [{"method": method, "strength": "calibrated"} for method in ("steer", "project")]
    found = snapshot({"gate": {}, "steering": steering, "corrupt": {"strength": "calibrated"}}, a | b)
    assert found.plan("p").of(Steer) == (Steer("a-steer", 0.5),)
    text = found.text_plans["p"]
    assert text is not None
    assert dict(text.corrupt_strength) == {"a-vectors": 1.5, "b-vectors": 2.0}, "nothing else acts on b: it is not left unguarded"


def test_a_set_that_lost_its_calibration_is_guarded_by_something() -> None:
    """New vectors come without one, when a set is replaced."""
    guards = {"gate": {}, "steering": [{"method": "steer", "strength": "calibrated"}], "corrupt": {"strength": "calibrated"}}
    others = made("b", phrases="b-phrases", similarity="b-vectors") | made("c", steer="c", similarity="c-vectors")
    text = snapshot(guards, made("a", similarity="a-vectors") | others).text_plans["p"]
    assert text is not None
    assert dict(text.corrupt_strength) == {"a-vectors": 2.0, "c-vectors": 2.0}, "b has its phrases"


def test_salts_differ_exactly_where_keys_and_values_do() -> None:
    plain = Plan(1, "p", suppress("phrases"))

    def with_entries(*entries: Entry) -> Plan:
        return replace(plain, entries=(*entries, *plain.entries))

    steered = with_entries(Steer("x", 1.0))
    assert plain.cache_salt is None
    assert steered.cache_salt == Plan(2, "q", (Steer("x", 1.0),)).cache_salt, "the same keys and values"
    corrupt = Corrupt("flip_sign_first_n", 1.0, 8, 0, ((1, 3),))
    others = [
        with_entries(Steer("x", 1.5)),
        with_entries(Steer("y", 1.0)),
        with_entries(corrupt, Steer("x", 1.0)),
        with_entries(corrupt),
        with_entries(replace(corrupt, seed=1)),
        with_entries(replace(corrupt, spans=((1, 4),))),
    ]
    salts = {each.cache_salt for each in (plain, steered, *others)}
    assert len(salts) == 2 + len(others)
    assert with_entries(replace(corrupt, spans=())).cache_salt is None, "nothing is corrupted"


def test_the_gate_engages_the_touched_sets_steering_only() -> None:
    both = snapshot({"gate": {}, "steering": [{"method": "adapter"}]}, embedded())
    plan, text = both.plan("p"), both.text_plans["p"]
    assert text is not None
    assert GateDecision(frozenset(), frozenset()).engaged(plan, text).entries == ()
    opened = GateDecision(frozenset({"b-vectors"}), frozenset()).engaged(plan, text)
    assert opened.entries == (Steer("b-adapter", 1.0),)
    corrupt = Corrupt("flip_sign_first_n", 1.0, 8, 0, ((1, 3),))
    assert GateDecision(frozenset({"a-vectors"}), frozenset(), corrupt).engaged(plan, text).of(Corrupt) == (corrupt,)


def test_a_closed_gate_leaves_what_acts_for_sets_about_which_nothing_can_be_said() -> None:
    """Two sets with one artifact, of which one is not embedded."""
    sets = made("a", adapter="same", similarity="a-vectors") | made("b", adapter="same")
    policy = parse_policy({"name": "p", "guards": {"gate": {}, "steering": [{"method": "adapter"}]}})
    found = Snapshot(1, sets, {"p": policy}, ())
    plan, text = found.plan("p"), found.text_plans["p"]
    assert text is not None and text.missing == ("b",)
    assert GateDecision(frozenset(), frozenset()).engaged(plan, text).entries == (Steer("same", 1.0),)


def test_a_gate_refuses_the_sets_it_names_and_engages_the_others() -> None:
    found = snapshot({"gate": {"refuse": ["b"]}, "steering": [{"method": "adapter"}]}, embedded())
    text = found.text_plans["p"]
    assert text is not None and text.acts
    assert text.refuses(["b-vectors"]) and text.refuses(["a-vectors", "b-vectors"])
    assert not text.refuses(["a-vectors"]) and not text.refuses([])
    only = parse_policy({"name": "p", "guards": {"gate": {"refuse": ["b"]}, "suppression": {"enabled": False}}})
    assert [enforcing([only], each) for each in embedded().values()] == [[], ["p"]], "the gate alone enforces what it refuses"
    assert judging([only], "b") == ["p"] and judging([only], "a") == []
    lost = Snapshot(1, made("a", similarity="a-vectors") | made("b"), {"p": only}, ()).text_plans["p"]
    assert lost is not None and lost.missing == ("b",) and lost.acts, "a set that is not embedded closes its requests"
    with pytest.raises(InvalidPolicy, match="refuses nobody"):
        parse_policy({"name": "p", "guards": {"gate": {"on_hit": "monitor", "refuse": ["b"]}}})


PIECES = [b"", b"a", b"b", b"ab", b" ", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"xyz"]
VOCABULARY = Vocabulary([b"<s>", *PIECES[1:]], special_ids=[0])


@example([6, 0, 7], "é")  # a special token within a character
@example([6, 6, 7], "é")  # half a character before it
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=12), st.sampled_from(["a", "ab", "bx", "é", "b a", "yz"]))
def test_spans_are_the_tokens_that_spell_a_place_and_no_others(tokens: list[int], name: str) -> None:
    def places(text: str) -> list[tuple[int, int]]:
        return [(i, i + len(name)) for i in range(len(text)) if text.startswith(name, i)]

    spans = spans_of(tokens, VOCABULARY, places)
    marked = {i for start, end in spans for i in range(start, end)}
    assert all(start < end for start, end in spans) and all(one[1] < two[0] for one, two in itertools.pairwise(spans))
    # The slow way: which bytes belong to a name, and which token each byte came from.
    data = [(byte, i) for i, token in enumerate(tokens) for byte in (b"" if token == 0 else PIECES[token])]
    text = bytes(byte for byte, _ in data)
    wanted: set[int] = set()
    encoded = name.encode()
    for i in range(len(text)):
        if text.startswith(encoded, i) and text[i] & 0xC0 != 0x80:
            wanted |= {data[j][1] for j in range(i, i + len(encoded))}
    assert wanted <= marked
    assert {i for i in marked - wanted if PIECES[tokens[i]]} == set()
