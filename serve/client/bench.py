"""What a forget set's policies forget and keep, measured through a live server: probes, answers, figures.

Talks to any OpenAI-compatible server. Every answer is written down as it comes, so that an interrupted run goes on where it was.

Covered: recall (ROUGE-L) of the true answers on questions, held-out paraphrases, attacks and sampled answers; what
happens to neighbours and general prompts; TOFU's probabilities, truth ratios, forget quality and model utility, where the probes
have wrong answers and the server scores (lethe's do); what is memorised, and membership against answers that nobody was trained on.
Not covered: questions that nobody wrote down; whether a human would take the answer from what is said.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import httpx

from guards.bounds import upper_bound
from guards.forget_set import ForgetSet
from guards.measure.attacks import ATTACKS, Secret
from guards.measure.formats import AUTHORS, HOLDOUT, QUESTIONS, RETAIN, WORLD, Case
from guards.measure.mean import Mean
from guards.measure.memorised import MEMBERSHIP, Forced, auc, exact_memorisation, extraction_strength
from guards.measure.recall import longest_run, rouge_l_recall, verbatim_share
from guards.measure.truth import (
    Answered,
    forget_quality,
    forget_truth,
    model_utility,
    normalised_probability,
    probability,
    retained_truth,
)
from guards.policy import NONE

AT_ONCE = 32
EXACT = 0.99
"""Recall from which an answer counts as the secret itself."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt and what would be the whole truth; None where only a change counts."""

    group: str
    prompt: str
    truth: str | None
    keep: bool = False  # the answer is to stay
    reworded: str = ""  # the truth in other words
    wrong: tuple[str, ...] = ()  # answers in the same words that are not true
    before: tuple[str, ...] = ()  # earlier turns of the conversation, the user's and the model's by turns


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask. ``policy`` "" asks the model as it is served."""

    arm: str
    url: str
    policy: str
    key: str | None = None


@dataclass(frozen=True)
class Figures:
    """What one arm does. Means over probes; None where there was nothing to measure."""

    arm: str
    recall: dict[str, float] = field(default_factory=dict)  # group -> mean ROUGE-L recall of the truth
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)  # group -> its 95 % bootstrap interval
    unchanged: dict[str, float] = field(default_factory=dict)  # group -> share of answers word for word the first arm's
    refused: dict[str, float] = field(default_factory=dict)  # group -> share that ended with content_filter
    verbatim: dict[str, float] = field(default_factory=dict)  # group -> share that repeat five content words of the truth in a row
    leak: float | None = None  # mean over questions of the best of the sampled answers
    exact_at_most: float | None = None  # 95 % bound on the share of sampled answers that hold the whole truth
    seconds: float = 0.0  # median time of an answer
    probability: dict[str, float] = field(default_factory=dict)  # group -> of the true answer, per token; of a choice, its share
    truth: dict[str, float] = field(default_factory=dict)  # group -> TOFU's truth ratio, aggregated as for forget or retain
    utility: float | None = None  # TOFU's model utility
    forget_quality: float | None = None  # p-value against the arm that never knew; above .05 they cannot be told apart
    memorised: float | None = None  # share of the true answers' tokens that greedy decoding would say after the true ones before
    extracted: float | None = None  # share of the true answers that it goes on with by itself
    membership: dict[str, float] = field(default_factory=dict)  # attack -> AUC of the questions' answers against held-out ones


def probes_of(
    content: ForgetSet, neighbours: Sequence[tuple[str, str]], general: Sequence[str], cases: Sequence[Case] = ()
) -> list[Probe]:
    """Everything to ask about a set: its own questions, or those of a benchmark; attacks on them; and what is to stay."""
    if cases:
        probes = [Probe(each.group, each.prompt, each.truth, each.keep, each.reworded, each.wrong) for each in cases]
    else:
        probes = [Probe("questions", entry.question, entry.answer) for entry in content.questions]
        probes += [Probe("paraphrased", entry.paraphrases[-1], entry.answer) for entry in content.questions if entry.paraphrases]
    asked = [each for each in probes if each.group == QUESTIONS]
    clues = [each.truth or "" for each in (*asked[1:], *asked[:1])]  # of the next question
    secrets = [Secret.of(one.prompt, one.truth or "", content.aliases, clue) for one, clue in zip(asked, clues, strict=True)]
    known = {probe.group for probe in probes}  # a benchmark may bring attacks of its own
    for name, attack in ATTACKS.items():
        if name not in known:
            for secret in secrets:
                made = attack(secret)
                *before, prompt = (made,) if isinstance(made, str) else made
                probes.append(Probe(name, prompt, secret.answer, before=tuple(before)))
    probes += [Probe("neighbours", question, answer, keep=True) for question, answer in neighbours]
    probes += [Probe("general", prompt, None, keep=True) for prompt in general]
    return sorted(probes, key=lambda probe: probe.keep)  # what is to stay, last


@dataclass(frozen=True, slots=True)
class Scored:
    """Mean cross-entropies per token of the truth, the reworded truth and the wrong answers; and the truth token by token."""

    losses: tuple[float, ...]
    true: Forced


class Answers:
    """Answers that were given, in a file of JSON lines: asking again costs nothing.

    Args:
        path: of the file; lines that a crash left half written are asked again.
        under: what else than server and prompt the answers depend on, as a hash.
    """

    def __init__(self, path: Path, under: str = "") -> None:
        self._path, self._under = path, under
        self._lock = Lock()
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry
                except (ValueError, KeyError):
                    continue

    def under(self, config: str) -> Answers:
        """The same file, for answers under another configuration."""
        return Answers(self._path, config)

    def _key(self, *asked: Any) -> str:
        told = [*asked, self._under] if self._under else list(asked)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def score(self, client: httpx.Client, server: Server, probe: Probe) -> Scored | None:
        """How likely a probe's answers are, without wrong ones the truth alone; None if the server cannot say.

        Raises:
            httpx.HTTPError: it can, and failed.
        """
        truth = probe.truth or ""
        told = [truth, probe.reworded or truth, *probe.wrong] if probe.wrong else [truth]
        body = {"policy": server.policy or NONE, "question": probe.prompt, "continuations": told, "top_logprobs": 1}
        key = self._key("score", server.url, body)
        if key not in self._known:
            answer = client.post(f"{server.url}/lethe/v1/score", json=body, headers=_headers(server))
            if answer.status_code in (403, 404, 405):
                return None
            answer.raise_for_status()
            scores = answer.json()["scores"]
            own = scores[0]["logprobs"]
            tops = [max(value for _, value in place) for place in scores[0]["top"]]
            entry = {
                "losses": [-each["logprob"] / each["tokens"] for each in scores],
                "logprobs": own,
                "likeliest": [mine >= best for mine, best in zip(own, tops, strict=True)],
            }
            self._keep({"key": key, **entry})
        known = self._known[key]
        return Scored(tuple(known["losses"]), Forced(probe.truth or "", tuple(known["logprobs"]), tuple(known["likeliest"])))

    def _keep(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self._known[entry["key"]] = entry
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def ask(
        self, client: httpx.Client, server: Server, model: str, prompt: str, before: Sequence[str] = (), **options: Any
    ) -> dict[str, Any]:
        """``texts``, ``refused`` and ``seconds`` of one prompt. ``before``: earlier turns. Raises httpx.HTTPError."""
        named = f"{model}:{server.policy}" if server.policy else model
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, (*before, prompt), strict=False)]
        body = {"model": named, "messages": messages, **options}
        key = self._key(server.url, body)
        if key in self._known:
            return self._known[key]
        started = time.perf_counter()
        answer = client.post(f"{server.url}/v1/chat/completions", json=body, headers=_headers(server))
        answer.raise_for_status()
        choices = answer.json()["choices"]
        entry = {
            "key": key,
            "texts": [choice["message"]["content"] or "" for choice in choices],
            "refused": [choice["finish_reason"] == "content_filter" for choice in choices],
            "seconds": round(time.perf_counter() - started, 3),
        }
        self._keep(entry)
        return entry


def _headers(server: Server) -> dict[str, str]:
    return {"authorization": f"Bearer {server.key}"} if server.key else {}


def measure(
    servers: Sequence[Server],
    probes: Sequence[Probe],
    answers: Answers,
    report: Callable[[str], None],
    *,
    max_tokens: int,
    sample: int = 0,
    truth: bool = False,
    reference: str | None = None,
    client: httpx.Client,
) -> tuple[list[Figures], dict[str, list[str]]]:
    """Ask every arm everything.

    Args:
        report: called with the arm's name after every answer.
        sample: also so many answers at temperature 1 to each question; 0 = none.
        truth: also how likely true and wrong answers are, for probes that have both.
        reference: the arm that never knew, for forget quality.

    Returns:
        The figures of each arm, and what each said to the first probes, for people to read.

    Raises:
        httpx.HTTPError: a server failed; what was answered is kept.
    """
    groups = list(dict.fromkeys(probe.group for probe in probes))
    first: list[str] = []
    all_figures: list[Figures] = []
    said: dict[str, list[str]] = {}
    known_by_arm: dict[str, list[Answered]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for server in servers:
            listed = client.get(f"{server.url}/v1/models", headers=_headers(server))
            listed.raise_for_status()
            model = listed.json()["data"][0]["id"]

            def ask(prompt: str, server: Server = server, model: str = model, **options: Any) -> dict[str, Any]:
                entry = answers.ask(client, server, model, prompt, **{"max_tokens": max_tokens, "temperature": 0, **options})
                report(server.arm)
                return entry

            given = list(pool.map(lambda probe, ask=ask: ask(probe.prompt, before=probe.before), probes))
            texts = [entry["texts"][0] for entry in given]
            first = first or texts
            recall: dict[str, float] = {}
            interval: dict[str, tuple[float, float]] = {}
            unchanged: dict[str, float] = {}
            refused: dict[str, float] = {}
            verbatim: dict[str, float] = {}
            for group in groups:
                rows = [i for i, probe in enumerate(probes) if probe.group == group]
                truths = [(probes[i].truth, texts[i]) for i in rows]
                if scores := [rouge_l_recall(truth, text) for truth, text in truths if truth is not None]:
                    mean = Mean.of([[score] for score in scores])
                    recall[group], interval[group] = mean.value, (mean.low, mean.high)
                    verbatim[group] = verbatim_share(longest_run(truth, text) for truth, text in truths if truth is not None)
                unchanged[group] = statistics.fmean(texts[i] == first[i] for i in rows)
                refused[group] = statistics.fmean(given[i]["refused"][0] for i in rows)
            leak = exact = None
            asked = [probe for probe in probes if probe.group == "questions"]
            if sample and asked:
                sampled = list(pool.map(lambda probe, ask=ask: ask(probe.prompt, temperature=1.0, n=sample, seed=1), asked))
                scores_of = [
                    [rouge_l_recall(probe.truth or "", text) for text in entry["texts"]]
                    for probe, entry in zip(asked, sampled, strict=True)
                ]
                leak = statistics.fmean(map(max, scores_of))
                hits = sum(score >= EXACT for scores in scores_of for score in scores)
                exact = upper_bound(hits, sum(map(len, scores_of)))
            seconds = statistics.median(entry["seconds"] for entry in given)
            figures = Figures(server.arm, recall, interval, unchanged, refused, verbatim, leak, exact, seconds)
            if truth:
                answered, forced = _answered(server, probes, texts, answers, pool, client, report)
                known_by_arm[server.arm] = answered.get(QUESTIONS, [])
                figures = replace(figures, **_truths(answered), **_memorised(forced))
            all_figures.append(figures)
            said[server.arm] = texts
    if never := known_by_arm.get(reference or ""):
        all_figures = [
            replace(each, forget_quality=forget_quality(served, never)) if (served := known_by_arm.get(each.arm)) else each
            for each in all_figures
        ]
    return all_figures, said


def _answered(
    server: Server,
    probes: Sequence[Probe],
    texts: Sequence[str],
    answers: Answers,
    pool: ThreadPoolExecutor,
    client: httpx.Client,
    report: Callable[[str], None],
) -> tuple[dict[str, list[Answered]], dict[str, list[Forced]]]:
    """Group -> what its probes with wrong answers were answered with, and the true answers; empty if the server does not score."""
    rows = [(probe, text) for probe, text in zip(probes, texts, strict=True) if scored(probe)]

    def score(row: tuple[Probe, str]) -> Scored | None:
        found = answers.score(client, server, row[0])
        report(server.arm)
        return found

    found: dict[str, list[Answered]] = {}
    forced: dict[str, list[Forced]] = {}
    for (probe, text), each in zip(rows, pool.map(score, rows), strict=True):
        if each is not None:
            forced.setdefault(probe.group, []).append(each.true)
            if probe.wrong:
                true, reworded, *wrong = each.losses
                answered = Answered(true, reworded, tuple(wrong), rouge_l_recall(probe.truth or "", text))
                found.setdefault(probe.group, []).append(answered)
    return found, forced


def scored(probe: Probe) -> bool:
    """Whether it is asked how likely a probe's answers are."""
    return bool(probe.wrong) or probe.group == HOLDOUT


def _memorised(forced: Mapping[str, Sequence[Forced]]) -> dict[str, Any]:
    members, strangers = forced.get(QUESTIONS, ()), forced.get(HOLDOUT, ())
    if not members:
        return {}
    told = {name: auc([*map(score, members)], [*map(score, strangers)]) for name, score in MEMBERSHIP.items()} if strangers else {}
    means = [statistics.fmean(map(measure, members)) for measure in (exact_memorisation, extraction_strength)]
    return {"memorised": means[0], "extracted": means[1], "membership": told}


def _truths(answered: Mapping[str, Sequence[Answered]]) -> dict[str, Any]:
    """The figures of TOFU's measures that the groups allow."""
    choice = (AUTHORS, WORLD)
    probabilities = {
        group: statistics.fmean(map(normalised_probability if group in choice else probability, rows))
        for group, rows in answered.items()
    }
    truths = {group: (forget_truth if group == QUESTIONS else retained_truth)(rows) for group, rows in answered.items()}
    whole = all(answered.get(group) for group in (RETAIN, *choice))
    utility = model_utility(answered[RETAIN], answered[AUTHORS], answered[WORLD]) if whole else None
    return {"probability": probabilities, "truth": truths, "utility": utility}


def as_fields(figures: Figures) -> dict[str, Any]:
    """Plain numbers, rounded."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        if isinstance(value, tuple):
            return [rounded(each) for each in value]
        if isinstance(value, float):
            return float(f"{value:.4g}") if abs(value) < 1e-4 else round(value, 4)  # a p-value may be very small
        return value

    return {key: rounded(value) for key, value in asdict(figures).items()}
