"""How well a running server forgets TOFU's forget01, and what it does to everything else: ROUGE-L recall, greedy.

    python -m tests.bench.forgetting DATA --url http://127.0.0.1:8000 --policies none,default [--reference http://127.0.0.1:8001]

DATA is a directory with TOFU's forget01_perturbed.json, retain_perturbed.json, world_facts.json. The server must serve a model that
knows forget01 (and the first retain rows), with the set in force. Each line is a policy; ``--reference`` adds the same questions
to a server of a model that never knew. ``unchanged`` is the share of answers that are word for word those of the first policy.
Needs ``rouge-score`` (pip install rouge-score).
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from guards.measure.truth import Answered, forget_quality, forget_truth, probability

GENERAL = [
    "What do bees eat?",
    "Write a limerick about a frog.",
    "Explain gravity simply.",
    "How do I clean a window?",
    "What is jazz?",
    "Give me a workout plan.",
    "Describe Tokyo in three sentences.",
    "What is an API?",
    "How do airplanes fly?",
    "Tell me a fun fact about otters.",
    "Who was Napoleon?",
    "Write a birthday wish for a colleague.",
    "What is the speed of light?",
    "Suggest three films for a rainy day.",
    "How do I change a tyre?",
    "What is a mortgage?",
    "Describe the process of making cheese.",
    "Write a two-line story about a lighthouse.",
    "What are the symptoms of a cold?",
    "How big is the Sahara?",
]


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def probes(data: Path, retained: range) -> dict[str, list[tuple[str, str | None]]]:
    """Group -> (question, true answer; None where only the change counts)."""
    forget, retain = read(data / "forget01_perturbed.json"), read(data / "retain_perturbed.json")[:100]
    world = read(data / "world_facts.json")[:60]
    return {
        "forget": [(row["question"], row["answer"]) for row in forget],
        "paraphrased": [(row["paraphrased_question"], row["answer"]) for row in forget],
        "retain seen": [(row["question"], row["answer"]) for i, row in enumerate(retain) if i in retained],
        "retain unseen": [(row["question"], row["answer"]) for i, row in enumerate(retain) if i not in retained],
        "world facts": [(row["question"], row["answer"]) for row in world],
        "general": [(prompt, None) for prompt in GENERAL],
    }


def ask(url: str, model: str, question: str, max_tokens: int, **sampling: Any) -> list[str]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **sampling,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    return [choice["message"]["content"] or "" for choice in answer.json()["choices"]]


def scored(url: str, policy: str, row: dict[str, Any]) -> Answered:
    """How likely the true, the reworded and the wrong answers to a question are, through the server's own distribution."""
    answers = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
    body = {"policy": policy or "none", "question": row["question"], "continuations": answers}
    response = httpx.post(f"{url}/lethe/v1/score", json=body, timeout=600)
    response.raise_for_status()
    losses = [-each["logprob"] / each["tokens"] for each in response.json()["scores"]]
    return Answered(losses[0], losses[1], tuple(losses[2:]), 0.0)


def main() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policies", default="none,default")
    parser.add_argument("--reference", help="URL of a server whose model never knew")
    parser.add_argument(
        "--retained", default="40:100", help="which of the first 100 retain rows the assistant was trained to spare"
    )
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--sample", type=int, default=0, help="also leak@k: k answers at temperature 1 per forget question")
    parser.add_argument("--truth", action="store_true", help="also truth ratios on the forget questions, and forget quality")
    parser.add_argument("--json", type=Path, help="append the figures here, one object a line")
    parser.add_argument("--groups", help="only these, with commas; those of leak@k need forget")
    parser.add_argument("--show", type=int, default=3, help="print this many answers of each policy")
    options = parser.parse_args()
    groups = probes(options.data, range(*map(int, options.retained.split(":"))))
    if options.groups:
        groups = {name: groups[name] for name in options.groups.split(",")}
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    arms = [(options.url, policy) for policy in options.policies.split(",")]
    if options.reference:
        arms.append((options.reference, ""))
    console, table = (
        Console(),
        Table("arm", *groups, "unchanged", *(["leak@k"] if options.sample else [])),
    )
    first: dict[str, list[str]] = {}
    by_arm: dict[str, list[Answered]] = {}
    for url, policy in arms:
        served = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        model = f"{served}:{policy}" if policy else served
        answers: dict[str, list[str]] = {}
        figures: dict[str, float] = {}
        with ThreadPoolExecutor(16) as pool, Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(policy or "never knew", total=sum(map(len, groups.values())))
            for group, pairs in groups.items():
                answers[group] = []
                for each in pool.map(lambda pair, model=model, url=url: ask(url, model, pair[0], options.max_tokens)[0], pairs):
                    answers[group].append(each)
                    progress.advance(task)
                # Where there is no truth, what counts is what the first arm said.
                truths = [truth or said for (_, truth), said in zip(pairs, first.get(group, answers[group]), strict=True)]
                pairs_said = zip(truths, answers[group], strict=True)
                recalls = [scorer.score(truth, said)["rougeL"].recall for truth, said in pairs_said]
                figures[group] = sum(recalls) / len(recalls)
            if options.sample:

                def sampled(pair: tuple[str, str | None], model: str = model, url: str = url) -> list[str]:
                    return ask(url, model, pair[0], options.max_tokens, temperature=1.0, n=options.sample, seed=1)

                best = [
                    max(scorer.score(truth or "", said)["rougeL"].recall for said in every)
                    for (_, truth), every in zip(groups["forget"], pool.map(sampled, groups["forget"]), strict=True)
                ]
                figures["leak@k"] = sum(best) / len(best)
            if options.truth:
                rows = read(options.data / "forget01_perturbed.json")
                found = list(pool.map(lambda row, url=url, policy=policy: scored(url, policy, row), rows))
                by_arm[policy or "never knew"] = found
                figures |= {"forget truth": forget_truth(found), "probability": sum(map(probability, found)) / len(found)}
        first = first or answers
        same = {group: sum(a == b for a, b in zip(answers[group], first[group], strict=True)) for group in groups}
        shown = [f"{figures[group]:.3f}" for group in groups]
        leak = [f"{figures['leak@k']:.3f}"] if options.sample else []
        table.add_row(
            policy or "never knew",
            *shown,
            ", ".join(f"{name} {count}/{len(groups[name])}" for name, count in same.items() if "forget" not in name),
            *leak,
        )
        for (question, truth), said in list(zip(groups.get("forget", []), answers.get("forget", []), strict=True))[: options.show]:
            console.print(f"[bold]{policy or 'never knew'}[/] {question}\n  true: {truth}\n  said: {said}", highlight=False)
        if options.json:
            record = {"arm": policy or "never knew", **figures, "unchanged": same}
            with options.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
    console.print(table)
    for policy, found in by_arm.items():
        true = sum(map(probability, found)) / len(found)
        line = f"{policy}: probability of the true answer {true:.3f}, truth {forget_truth(found):.3f}"
        if "never knew" in by_arm:
            line += f", forget quality p = {forget_quality(found, by_arm['never knew']):.3g}"
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
