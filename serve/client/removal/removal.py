"""One removal, from request to proof: what is done in which order, through the server's API like any client.

Something is in force from the first minute (corruption of the subject's name, which needs no training); what is found to be better
replaces it. Each step is repeated safely: a second run finds what the first has made and asked.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from guards.catalogue import CALIBRATIONS, TRAINING_METHODS
from guards.forget_set import ForgetSet, write_jsonl
from guards.measure.recall import words_of
from guards.policy import DEFAULT, NONE
from guards.similarity.encoder import Encoder
from guards.steering.declaration import DEFAULT_CORRUPTION, METHODS, Corruption
from guards.whole_file import write_whole
from serve.cli.talk import ServerSaysNo, artifact_of, unwrap
from serve.client.removal.certificate import make_certificate, tried_of
from serve.client.removal.in_force import InForce
from serve.client.removal.judge import REPEATED, Asked, Judge, Reference
from serve.client.removal.probes import Probes, make_probes
from serve.client.removal.search import CANDIDATES, REFUSE, Candidate, Trial, bisect, choose, cross_judged, guards_of

NOISE: Corruption = "rand_noise_first_n"
Say = Callable[[str], None]


@dataclass(slots=True)
class Removal:
    """One order.

    Args:
        content: the request, with its subject's names. now: the set as it is in force, and where everything of this removal lies.
        within_s: after this no other candidate is begun.
        say: called with what is being done; tell: with what is worth keeping on the screen.
    """

    content: ForgetSet
    now: InForce
    encoder: Callable[[], Encoder]
    within_s: float
    say: Say
    tell: Say

    @property
    def name(self) -> str:
        return self.now.name

    def run(self) -> dict[str, Any]:
        """Carry it out. Returns the certificate.

        Raises:
            ServerSaysNo, httpx.HTTPError: what was made and asked is kept; ValueError: the request holds too little.
        """
        deadline = time.monotonic() + self.within_s
        revision = self._put_something_in_force()
        names = ", ".join(self.content.aliases)
        how = "what the gate finds is refused" if self.now.refuse else f"{names} corrupted in prompts; looking for better"
        self.tell(f"{self.name} is in force from revision {revision} on: {how}")
        probes = self._probes()
        if {probe.half for probe in probes.probes} != {0, 1}:
            raise ValueError(
                f"the questions in {self.now.probes_file} are all of one half, and each half is judged by the other's choice; "
                'add a question to the request, or write "half": 0 and "half": 1'
            )
        self._put(self._with_wordings(probes))
        others = self._put_neighbours(probes)
        self._fit_gate(others)
        self.say("Asking about invented names")
        reference = self.now.reference(probes)
        if not self.now.refuse:
            self.tell(
                f"a model that never knew: recall {reference.questions.value:.3f} "
                f"({reference.questions.low:.3f} to {reference.questions.high:.3f}), from {reference.source}"
            )
        ask = self.now.asker(probes)
        trials: list[Trial] = []
        for candidate in (REFUSE,) if self.now.refuse else CANDIDATES:
            if trials and (time.monotonic() > deadline or any(trial.meets(reference) for trial in trials)):
                break
            if reason := self._prepare(candidate, others):
                self.tell(f"{candidate.name}: left out, {reason}")
                continue

            def measure(strength: float, candidate: Candidate = candidate) -> Trial:
                self.say(f"Trying {candidate.name} at {strength:g}")
                asked = self._try(candidate.strengths(strength), lambda policy: ask(self.now.judge, policy))
                return Trial(candidate, strength, asked, asked.judged(reference))

            for trial in bisect(candidate, measure, reference):
                trials.append(trial)
                self.tell(_line(trial, reference))
                if time.monotonic() > deadline:
                    break
        chosen = choose(trials, reference)
        self._put_strengths(chosen, reference)
        asked = self._in_force(ask)
        asked = self._with_passages(probes, others, chosen, reference, asked, lambda: self._in_force(ask))
        judged = asked.judged(reference)
        self._propose(judged.left)
        shown, policy = self.now.shown(), self.now.policy()
        revision = unwrap(self.now.admin.get("/revision"))["revision"]
        return make_certificate(
            shown,
            model=self.now.model,
            revision=revision,
            policy=policy,
            strengths=chosen.candidate.strengths(chosen.strength),
            config=self.now.config(shown, policy),
            probes=self.now.probes_file,
            neighbours=self.now.neighbours,
            reference=reference,
            judged=judged,
            cross_judged=cross_judged(trials, asked, reference),
            tried=tried_of(trials, chosen, reference),
            audit=self._audit_row(),
        )

    def _put(self, content: ForgetSet) -> dict[str, Any]:
        """Create or replace a set, unless it is the same already, and wait until it is compiled and embedded.

        A strength of corruption holds for one set of vectors. The request's own set gets it anew before its new vectors are ready:
        till then the server answers nothing that they would be needed for, so no answer is given without it.
        """
        answer = self.now.admin.get(f"/forget_sets/{content.name}")
        shown = None if answer.status_code == 404 else unwrap(answer)
        body: dict[str, Any] = {"content": write_jsonl(content).encode(), "headers": {"content-type": "application/jsonl"}}
        if shown is None:
            shown = unwrap(self.now.admin.post("/forget_sets", params={"name": content.name}, **body))
        elif shown["fingerprint"] != content.fingerprint:
            before = artifact_of(shown, "corruption")
            shown = unwrap(self.now.admin.put(f"/forget_sets/{content.name}", **body))
            if before is not None:
                self._calibrate(
                    {"corrupt": json.loads(before["detail"]).get(NOISE, {}).get("strength", DEFAULT_CORRUPTION[NOISE])}, {}
                )
        while any(artifact["status"] == "building" for artifact in shown["artifacts"]):
            time.sleep(0.2)
            shown = unwrap(self.now.admin.get(f"/forget_sets/{content.name}"))
        return dict(shown)

    def _put_something_in_force(self) -> int:
        """Before anything is known: the policy by which every set is guarded at its own strength, and corruption for this one."""
        self.say("Adding the set")
        stored = self.now.admin.get(f"/forget_sets/{self.name}")
        content = self.content
        if stored.status_code == 200 and (self.now.probes_file).exists():
            content = self._with_wordings(self._probes())  # a second run: what the first has made stays
        shown = self._put(content)
        if not _calibrated(shown):
            self._calibrate({"corrupt": DEFAULT_CORRUPTION[NOISE]}, {})
        policy = self.now.policy()
        guards = {name: each for name, each in policy["guards"].items() if each is not None}
        gate = dict(guards.get("gate") or {})
        refused = [each for each in gate.get("refuse", ()) if each != self.name] + ([self.name] if self.now.refuse else [])
        wanted = {**guards, "gate": gate | ({"refuse": refused} if refused or "refuse" in gate else {})}
        wanted["corrupt"] = guards.get("corrupt") or {"strength": "calibrated"}
        steering = list(guards.get("steering") or [])
        known = {each["method"] for each in steering}
        wanted["steering"] = steering + [{"method": m, "strength": "calibrated"} for m in METHODS if m not in known]
        sets = policy["forget_sets"]
        chosen = sets if sets == "enabled" or self.name in sets else [*sets, self.name]
        if (chosen, wanted) != (sets, guards):
            unwrap(self.now.admin.put(f"/policies/{DEFAULT}", json={"forget_sets": chosen, "guards": wanted}))
        return int(unwrap(self.now.admin.post(f"/forget_sets/{self.name}/enable"))["revision"])

    def _probes(self) -> Probes:
        path = self.now.probes_file
        if path.exists():
            try:
                return Probes.model_validate_json(path.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} cannot be read ({error}); mend it, or delete it to have it made again") from None

        def ask(prompts: Any, temperature: float) -> list[str]:
            return [text for text, _ in self.now.judge.ask(NONE, prompts, temperature)]

        probes = make_probes(self.content, ask, self.encoder, lambda what: self.say(f"Making {what}"))
        if not probes.probes:
            raise ValueError(f"the request {self.name!r} asks about nothing; add names, questions with answers, or texts")
        self._write(probes)
        made = sum(len(probe.made) for probe in probes.probes)
        self.tell(
            f"{len(probes.probes)} questions, {made} other wordings made, {len(probes.neighbours)} about others, "
            f"{len(probes.passages)} passages of answers that nobody else is told: see {path}"
        )
        return probes

    def _write(self, probes: Probes) -> None:
        write_whole(self.now.probes_file, lambda temporary: temporary.write_text(probes.model_dump_json(indent=1), "utf-8"))

    def _with_wordings(self, probes: Probes) -> ForgetSet:
        """The request with what was made for it, as evidence, and for what is trained and calibrated by it."""
        questions = [
            {"question": probe.question, "answer": probe.answer, "paraphrases": list(probe.wordings)} for probe in probes.probes
        ]
        phrases = tuple(dict.fromkeys((*self.content.phrases, *probes.phrases)))
        fields = self.content.model_dump() | {"aliases": probes.aliases, "questions": questions, "phrases": phrases}
        return ForgetSet.model_validate(fields)

    def _put_neighbours(self, probes: Probes) -> list[str]:
        """The sets whose answers are to stay. What was made of invented names is a set, too, and never in force."""
        name = f"{self.name[:52]}-neighbours"
        found = [self.now.neighbours] if self.now.neighbours else []
        if probes.neighbours:
            self._put(ForgetSet(name=name, description=f"Kept as it is beside {self.name}", questions=probes.neighbours))
            found.append(name)
        return found

    def _fit_gate(self, neighbours: list[str]) -> None:
        self.say("Fitting the gate")
        try:
            fitted = unwrap(self.now.admin.put(f"/forget_sets/{self.name}/gate", json={"neighbours": neighbours}))
        except ServerSaysNo as error:
            self.tell(f"the gate keeps its usual threshold: {error}")
            return
        found = json.loads((artifact_of(fitted, "gate") or {"detail": "{}"})["detail"])
        promise = f"P(miss) <= {found['epsilon']:.3g}, P(false alarm) <= {found['delta']:.3g}"
        self.tell(f"the gate opens at cosine {found['threshold']:.3f}: {promise}")

    def _prepare(self, candidate: Candidate, neighbours: list[str]) -> str:
        """Make what a candidate needs. Returns why it cannot be used; "" if it can."""
        for method in candidate.needs:
            guard, kind = TRAINING_METHODS[method]
            if artifact_of(self.now.shown(), kind) is not None:
                continue
            self.say(f"Making {kind}")
            assert guard.training is not None, "it has methods"
            order: dict[str, Any] = {"retain": neighbours} | ({} if method == guard.name else {"recipe": {"method": method}})
            try:
                shown = unwrap(self.now.admin.post(f"/forget_sets/{self.name}/{guard.training.route}", json=order))
            except ServerSaysNo as error:
                return str(error)
            while (training := shown["training"]) is not None:
                if training["status"] == "failed":
                    return str(training["reason"])
                self.say(f"Making {kind}: {training.get('stage', '')} {training.get('step', 0)}/{training.get('steps', '?')}")
                time.sleep(0.5)
                shown = self.now.shown()
            self._calibrate({method: 0.0}, {})  # it does nothing yet, where the policy says "calibrated"
        return ""

    def _try(self, strengths: dict[str, float], measure: Callable[[str], Asked]) -> Asked:
        """Measure a policy that exists for that long. Its name stands for its guards and the artifacts that they use."""
        shown = self.now.shown()
        made = sorted((each["kind"], each["fingerprint"], each["kind"] == "gate" and each["detail"]) for each in shown["artifacts"])
        content = {"forget_sets": [self.name], "guards": guards_of(strengths, [self.name] if self.now.refuse else ())}
        told = hashlib.sha256(json.dumps([content, made, self.now.model]).encode()).hexdigest()
        policy = f"{self.name[:50]}-{told[:12]}"
        unwrap(self.now.admin.put(f"/policies/{policy}", json=content))
        try:
            return measure(policy)
        finally:
            self.now.admin.delete(f"/policies/{policy}")

    def _calibrate(self, strengths: Mapping[str, float], evidence: Mapping[str, Any]) -> None:
        for what, strength in strengths.items():
            if what == "plausibility":
                continue  # goes with contrast
            of: dict[str, Any] = {"steering": what}
            if what == "corrupt":
                of = {"corrupt": NOISE}
            elif what == "contrast":
                of = {"plausibility": strengths.get("plausibility")}
            order = {"strength": strength, "evidence": dict(evidence), **of}
            unwrap(self.now.admin.put(f"/forget_sets/{self.name}/calibration", json=order))

    def _in_force(self, ask: Callable[[Judge, str], Asked]) -> Asked:
        """What the default policy says now."""
        self.say("Measuring what is in force")
        return ask(self.now.judge.under(self.now.config(self.now.shown(), self.now.policy())), DEFAULT)

    def _with_passages(
        self,
        probes: Probes,
        neighbours: list[str],
        chosen: Trial,
        reference: Reference,
        before: Asked,
        measure: Callable[[], Asked],
    ) -> Asked:
        """Take passages that still come out word for word as phrases, if more goals are met then. Returns what is in force."""
        judged = before.judged(reference)
        path, left = self.now.probes_file, [f" {' '.join(words_of(run))} " for run in judged.left]
        taken = tuple(each for each in probes.passages if any(f" {' '.join(words_of(each))} " in run for run in left))
        if judged.verbatim <= reference.verbatim + REPEATED or not taken:
            return before

        def put(phrases: tuple[str, ...]) -> None:
            changed = probes.model_copy(update={"phrases": phrases})
            self._write(changed)
            self._put(self._with_wordings(changed))
            self._fit_gate(neighbours)
            self._put_strengths(chosen, reference)

        put(tuple(dict.fromkeys((*probes.phrases, *taken))))
        after = measure()
        found = after.judged(reference)
        if len(found.unmet(reference)) < len(judged.unmet(reference)):
            self.tell(f"{len(taken)} passages still came out word for word; they are phrases of the set now, see {path}")
            return after
        put(probes.phrases)
        self.tell(f"{len(taken)} passages still come out word for word; as phrases they would not, but other goals would be missed")
        return before

    def _put_strengths(self, chosen: Trial, reference: Reference) -> None:
        """The choice, and 0 for every other guard that could act on the set. What is new acts before the old goes."""
        self.say(f"Putting {chosen.candidate.name} in force")
        judged, strengths = chosen.judged, chosen.candidate.strengths(chosen.strength)
        evidence = {
            "reference": round(reference.questions.value, 4),
            "recall": round(judged.questions.value, 4),
            "paraphrased": round(judged.paraphrases.value, 4),
        }
        shown = self.now.shown()
        possible = ["corrupt", *(method for method, (_, kind) in TRAINING_METHODS.items() if artifact_of(shown, kind) is not None)]
        self._calibrate(strengths, evidence)
        self._calibrate({what: 0.0 for what in possible if what not in strengths}, {})

    def _propose(self, left: Iterable[str]) -> None:
        """Passages of true answers that still come out word for word, for a person to look at: as phrases they would not."""
        path = self.now.directory / "phrases.jsonl"
        path.write_text("".join(json.dumps({"phrase": each}, ensure_ascii=False) + "\n" for each in left), "utf-8")
        if path.stat().st_size:
            self.tell(
                f"passages of the true answers that still come out word for word: {path}; add those that are not ordinary text"
            )

    def _audit_row(self) -> dict[str, Any] | None:
        """The change that put the set in force."""
        after, found = 0, None
        while rows := unwrap(self.now.admin.get("/audit", params={"after": after, "limit": 1000}))["data"]:
            mine = [row for row in rows if row["subject"] == self.name and row["action"] == "forget_set.enable"]
            found = mine[-1] if mine else found
            after = rows[-1]["revision"]
        return found


def _calibrated(shown: Mapping[str, Any]) -> bool:
    return any(each["kind"] in CALIBRATIONS and each["kind"] != "gate" for each in shown["artifacts"])


def _line(trial: Trial, reference: Reference) -> str:
    judged = trial.judged
    truth = "" if judged.forget_quality is None else f", truth ratios p = {judged.forget_quality:.2g}"
    truth += "" if judged.extracted is None else f", extraction {judged.extracted:.3f}"
    truth += "" if judged.probability is None else f", probability {judged.probability:.3f}"
    verdict = "meets the goals" if trial.meets(reference) else "does not meet them"
    return (
        f"{trial.candidate.name} at {trial.strength:g}: recall {judged.questions.value:.3f}, paraphrases "
        f"{judged.paraphrases.value:.3f}{truth}; {verdict}"
    )
