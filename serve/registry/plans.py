"""From policies to plans: what the guards of a policy do for the sets that are enabled.

Every question about that is answered here and nowhere else: what a request's plan is, on which sets a policy acts, what would
enforce a set, what a policy's author may be surprised by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from guards.kinds import Config, GuardKind, SetArtifacts
from guards.policy import Policy
from guards.similarity.declaration import DEFAULT_GATE_THRESHOLD, DEFAULT_STREAM_THRESHOLD, GateConfig, StreamConfig
from guards.steering.declaration import DEFAULT_CORRUPTION, CorruptConfig, SteeringConfig
from guards.text_plan import TextCheck, TextPlan
from guards.types import Entry, Plan

Sets = Mapping[str, SetArtifacts]
"""The enabled forget sets, by name."""


def plan_of(policy: Policy, sets: Sets, revision: int) -> Plan:
    """What the engine does for a request under a policy."""
    entries: list[Entry] = []
    for of_guard in _entries(policy.guards.enabled(), chosen(policy, sets)):
        strongest: dict[object, Entry] = {}
        for entry in of_guard:
            strongest[entry.key] = max(strongest.get(entry.key, entry), entry)
        entries += sorted(strongest.values())
    return Plan(revision, policy.name, tuple(entries))


def text_plan_of(policy: Policy, sets: Sets) -> TextPlan | None:
    """What is judged of a request's text under a policy; None if nothing is."""
    guards, made = policy.guards.enabled(), chosen(policy, sets)
    of = policy.guards.of
    gate, stream, corrupt = of(GateConfig), of(StreamConfig), of(CorruptConfig)
    checks = tuple(
        TextCheck(kind.name, config, tuple(made))  # type: ignore[arg-type]  # the catalogue checks it
        for kind, config in guards
        if kind.text and made
    )
    if (gate is None and stream is None) or not made:
        return TextPlan(checks=checks) if checks else None
    gate_thresholds, stream_thresholds, strengths = dict[str, float](), dict[str, float](), dict[str, float]()
    engages: dict[str, frozenset[tuple[str, tuple[str, ...]]]] = {}
    owners: dict[str, str] = {}
    missing, always = [], set[tuple[str, tuple[str, ...]]]()
    refused = set[str]()
    for each in made:
        gated = {entry.key for of_guard in _entries(guards, [each], gated_only=True) for entry in of_guard}
        if gate is not None and each.name in gate.refuse:
            refused.add(each.artifacts.get("similarity", each.name))
        if (owner := each.artifacts.get("similarity")) is None:
            missing.append(each.name)
            always |= gated  # nothing can be said about the set, so what would be gated acts always
            continue
        fitted = each.measured.get("gate", {})
        owners[owner] = each.name
        if gate is not None:
            calibrated = fitted.get("threshold", DEFAULT_GATE_THRESHOLD)
            gate_thresholds[owner] = calibrated if gate.threshold is None else gate.threshold
        if stream is not None:
            stream_thresholds[owner] = calibrated_stream_threshold(each) if stream.threshold is None else stream.threshold
        engages[owner] = engages.get(owner, frozenset()) | gated
        if corrupt is not None:
            found = each.measured.get("corruption", {}).get(corrupt.kind, {}).get("strength")
            usual = DEFAULT_CORRUPTION[corrupt.kind]
            if corrupt.strength is None:
                strength = usual if found is None else found
            elif corrupt.strength == "calibrated":  # a set whose calibration is gone is not left without any guard
                strength = found or (0.0 if any(_entries(guards, [each])) else usual)
            else:
                strength = corrupt.strength
            if strength > 0:
                strengths[owner] = strength
    engages = {owner: keys - always for owner, keys in engages.items()}
    return TextPlan(
        gate,
        stream,
        gate_thresholds,
        stream_thresholds,
        engages,
        owners,
        tuple(missing),
        corrupt,
        strengths,
        checks,
        frozenset(refused),
    )


def calibrated_stream_threshold(made: SetArtifacts) -> float:
    """Cosine from which a passage of an answer gives a set away."""
    return float(made.measured.get("gate", {}).get("stream_threshold", DEFAULT_STREAM_THRESHOLD))


def chosen(policy: Policy, sets: Sets) -> list[SetArtifacts]:
    """The enabled sets that a policy chooses, by name."""
    names = sorted(sets if policy.forget_sets == "enabled" else set(policy.forget_sets) & sets.keys())
    return [sets[name] for name in names]


def acting_sets(policy: Policy, sets: Sets) -> list[str]:
    """The sets that act on a request under a policy."""
    acts_on = _acts_on(policy)
    return [each.name for each in chosen(policy, sets) if acts_on(each)]


def _acts_on(policy: Policy) -> Callable[[SetArtifacts], bool]:
    """Whether a policy does anything for a set that it chooses. The policy is read once, however many sets there are."""
    guards, judged = policy.guards.enabled(), judges(policy)
    gate = policy.guards.of(GateConfig)
    refused = frozenset(gate.refuse if gate is not None else ())
    checked = any(TextCheck(kind.name, config, ()).acts for kind, config in guards if kind.text)  # type: ignore[arg-type]

    def acts_on(made: SetArtifacts) -> bool:
        by_similarity = (judged or made.name in refused) and "similarity" in made.artifacts
        return checked or by_similarity or any(_entries(guards, [made]))

    return acts_on


def judges(policy: Policy, name: str = "") -> bool:
    """Whether a hit by similarity does anything under a policy, so that a set that is not embedded closes its requests.

    Args:
        name: of a set that may be refused; "" = one that is not.
    """
    gate, stream = policy.guards.of(GateConfig), policy.guards.of(StreamConfig)
    refused = frozenset({name} & set(gate.refuse)) if gate is not None else frozenset[str]()
    return TextPlan(gate, stream, refused=refused).acts or (gate is not None and policy.guards.of(CorruptConfig) is not None)


def enforcing(policies: Iterable[Policy], made: SetArtifacts) -> list[str]:
    """Would anything enforce this set? The policies that do if it is enabled."""
    sets = {made.name: made}
    return sorted(policy.name for policy in policies if acting_sets(policy, sets))


def judging(policies: Iterable[Policy], name: str) -> list[str]:
    """The policies under which a set must be embedded."""
    return sorted(policy.name for policy in policies if judges(policy, name) and chosen(policy, {name: SetArtifacts(name)}))


def notes(policy: Policy, sets: Sets) -> list[str]:
    """What a policy does not do and its author may expect: one sentence for each enabled set that it chooses."""
    guards = policy.guards.enabled()
    if not guards:
        return []  # meant to do nothing
    acting = set(acting_sets(policy, sets))
    found = [
        f"nothing under this policy acts on forget set {each.name!r}" for each in chosen(policy, sets) if each.name not in acting
    ]
    gate = policy.guards.of(GateConfig)
    if gate is not None and gate.on_hit == "engage" and policy.guards.of(CorruptConfig) is None:
        found += [
            f"the gate has nothing to engage for {each.name!r}"
            for each in chosen(policy, sets)
            if each.name not in gate.refuse and not any(_entries(guards, [each], gated_only=True))
        ]
    for config in policy.guards.all(SteeringConfig):
        found += [
            f"forget set {each.name!r} has no artifact by {config.method}; "
            f"make one with `lethe train {each.name} --method {config.method}`"
            for each in chosen(policy, sets)
            if config.method not in each.artifacts and config.strength != "calibrated"
        ]
    return found


def _entries(
    guards: Sequence[tuple[GuardKind, Config]], sets: Collection[SetArtifacts], *, gated_only: bool = False
) -> list[list[Entry]]:
    """What guards do for these sets: a list for each guard of the engine, in the order of the catalogue."""
    of_guard: dict[str, list[Entry]] = {}
    for kind, config in guards:
        if kind.entries is not None and not kind.text and (kind.gated or not gated_only):
            of_guard.setdefault(kind.name, []).extend(entry for made in sets for entry in kind.entries(config, made))
    return list(of_guard.values())
