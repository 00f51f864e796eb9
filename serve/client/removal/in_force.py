"""What of a removal is in force, measured through the server: for the removal itself, and for verifying it later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from guards.measure.mean import Mean
from guards.policy import DEFAULT
from serve.cli.talk import unwrap
from serve.client.removal.certificate import figures_of, probes_fingerprint
from serve.client.removal.judge import REFUSAL, Asked, Judge, Reference
from serve.client.removal.probes import Probes
from serve.client.report import config_fingerprint

BY_HAND = "--reference"
"""Source of a reference that was given."""
MOST_NEIGHBOURS = 40
"""Questions of another set that are asked under every policy."""


@dataclass(slots=True)
class InForce:
    """One set under the default policy.

    Args:
        name: of the set. directory: where everything of its removal lies. admin: a client of the admin API.
        model: the served model's name and place. neighbours: another set, whose answers are to stay; "" = none.
        given: recall of a model that never knew; None = estimate it.
        refuse: whether its questions are to be refused, rather than answered as by such a model.
        against: URL of a server that never knew; "" = there is none.
    """

    name: str
    directory: Path
    admin: httpx.Client
    judge: Judge
    model: str
    neighbours: str
    given: float | None
    refuse: bool = False
    against: str = ""

    @property
    def probes_file(self) -> Path:
        return self.directory / "probes.json"

    def reference(self, probes: Probes) -> Reference:
        """Raises ValueError, httpx.HTTPError, see `Judge.reference`."""
        if self.refuse:
            return REFUSAL
        if self.against:
            return self.judge.reference_at(self.against, probes.probes)
        if self.given is not None:
            mean = Mean(self.given, self.given, self.given)
            return Reference(mean, mean, 0.0, BY_HAND)
        return self.judge.reference(probes.probes)

    def shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = unwrap(self.admin.get(f"/forget_sets/{self.name}"))
        return shown

    def policy(self) -> dict[str, Any]:
        """The default policy."""
        policy: dict[str, Any] = unwrap(self.admin.get(f"/policies/{DEFAULT}"))
        return {name: policy[name] for name in ("name", "forget_sets", "guards")}

    def config(self, shown: Mapping[str, Any], policy: Mapping[str, Any]) -> str:
        return config_fingerprint(shown, [policy], self.model)

    def asker(self, probes: Probes) -> Callable[[Judge, str], Asked]:
        """(who asks, policy) -> what the policy says."""
        kept = unwrap(self.admin.get(f"/forget_sets/{self.neighbours}"))["content"]["questions"] if self.neighbours else []
        neighbours = [entry["question"] for entry in kept[:MOST_NEIGHBOURS]]
        invented = [entry.question for entry in probes.neighbours]
        return lambda judge, policy: judge.ask_everything(policy, probes.probes, invented, neighbours, truth=bool(self.against))

    def measured_now(self) -> dict[str, Any]:
        """What a certificate says, as it is now, for `serve.client.removal.certificate.changes`. Raises OSError, ValueError."""
        probes = Probes.model_validate_json(self.probes_file.read_text("utf-8"))
        reference = self.reference(probes)
        shown, policy = self.shown(), self.policy()
        judged = self.asker(probes)(self.judge, DEFAULT).judged(reference)
        artifacts = [{"kind": each["kind"], "fingerprint": each["fingerprint"]} for each in shown["artifacts"]]
        asked = probes_fingerprint(self.probes_file)
        now = {
            "set": shown,
            "probes": asked,
            "artifacts": artifacts,
            "model": self.model,
            "policy": policy,
            "config": self.config(shown, policy),
        }
        return {**now, "figures": figures_of(judged)}
