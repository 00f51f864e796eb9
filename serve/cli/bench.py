"""``lethe bench``: measure what a set's policies forget and keep, and write a report to file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guards.forget_set import ForgetSet
from guards.measure.attacks import ATTACKS
from guards.measure.formats import QUESTIONS, Case, read_cases
from serve.cli.talk import NameArgument, connect, err, fail, folding_table, http_client, out, unwrap
from serve.client.bench import Answers, Server, as_fields, measure, probes_of, scored
from serve.client.calibrate import PROMPTS
from serve.client.report import TRUTHS, config_fingerprint, make_report, save
from serve.settings import Settings

EXAMPLES = 3
NEVER_KNEW = "never knew"


def bench(
    name: NameArgument,
    policies: Annotated[str, typer.Option(help="Policies to measure, with commas.")] = "none,default",
    neighbours: Annotated[str | None, typer.Option(help="A set whose answers should stay as they are.")] = None,
    data: Annotated[Path | None, typer.Option(help="Ask what TOFU, RWKU or MUSE ask: the directory of their files.")] = None,
    most: Annotated[int, typer.Option(help="Most prompts of each group in --data that is to stay.")] = 100,
    truth: Annotated[
        bool, typer.Option(help="Also how likely true and wrong answers are: truth ratio, forget quality, utility.")
    ] = False,
    against: Annotated[str | None, typer.Option(help="URL of a server (OpenAI-compatible) that never knew.")] = None,
    attacks: Annotated[bool, typer.Option(help="Also the attacks on every question.")] = True,
    sample: Annotated[int, typer.Option(help="Answers to sample for each question at temperature 1 (leak@k).")] = 0,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 80,
    output: Annotated[Path | None, typer.Option(help="Directory of the report. Default: report-NAME.")] = None,
) -> None:
    """Ask a set's questions, their paraphrases and attacks on them under every policy, and write a report that can be filed.

    Answers are kept in the output directory as they come: Ctrl-C and the same command again go on where it was.
    """
    directory = output or Path(f"report-{name}")
    with connect() as client:
        shown = unwrap(client.get(f"/forget_sets/{name}"))
        if "content" not in shown:
            fail(f"the texts of {name} were dropped, so nothing can be asked about it")
        content = ForgetSet.model_validate({"name": name, **shown["content"]})
        if not content.questions and data is None:
            fail(f"{name} has no questions to ask; add some, with answers, or name a benchmark's directory with --data")
        kept = unwrap(client.get(f"/forget_sets/{neighbours}"))["content"]["questions"] if neighbours else []
        chosen = [each.strip() for each in policies.split(",") if each.strip()]
        configs = [unwrap(client.get(f"/policies/{policy}")) for policy in chosen]
        dated = unwrap(client.get("/revision"))["prompt_date"]
    settings = Settings()
    url = settings.url.rstrip("/")
    servers = [Server(policy, url, policy, settings.key) for policy in chosen]
    if against:
        _refuse_unless_served(against)
        servers.append(Server(NEVER_KNEW, against.rstrip("/").removesuffix("/v1"), ""))
    cases = [] if data is None else at_most(read_cases(data), most)
    probes = probes_of(content, [(entry["question"], entry["answer"]) for entry in kept], PROMPTS, cases)
    if not attacks:
        probes = [probe for probe in probes if probe.group not in ATTACKS]
    if truth and not any(probe.wrong for probe in probes):
        fail("--truth needs wrong answers beside the true ones: name a directory that has TOFU's *_perturbed.json with --data")
    directory.mkdir(parents=True, exist_ok=True)
    # Answers hold for one configuration: another one starts its own file.
    config = config_fingerprint(shown, [{**each, "revision": 0} for each in configs], f"{url} {dated}" if dated else url)
    answers = Answers(directory / f"answers-{config[:16]}.jsonl")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with http_client() as chat, Progress(*columns, console=err) as progress:
        asked = sum(probe.group == QUESTIONS for probe in probes)
        total = len(probes) + (asked if sample else 0) + (sum(map(scored, probes)) if truth else 0)
        tasks = {server.arm: progress.add_task(server.arm, total=total) for server in servers}
        figures, said = measure(
            servers,
            probes,
            answers,
            lambda arm: progress.advance(tasks[arm]),
            max_tokens=max_tokens,
            sample=sample,
            truth=truth,
            reference=NEVER_KNEW if against else None,
            client=chat,
        )
        model = chat.get(f"{url}/v1/models", headers={"authorization": f"Bearer {settings.key}"} if settings.key else {})
    fields = [as_fields(each) for each in figures]
    examples = [
        {"prompt": probe.prompt, "said": {"the truth": probe.truth, **{arm: texts[i] for arm, texts in said.items()}}}
        for i, probe in enumerate(probes[:EXAMPLES])
    ]
    report = make_report(
        shown,
        fields,
        examples,
        config=config,
        model=model.json()["data"][0]["id"],
        sample=sample,
        kept=list(dict.fromkeys(probe.group for probe in probes if probe.keep)),
        probes=total,
        asked="one user turn in the model's chat template"
        + (f", which dates it {dated}" if dated else "")
        + f"; no examples and no system prompt of ours; greedily, at most {max_tokens} tokens, to the model's own end",
        reference=NEVER_KNEW if against else None,
    )
    _print(fields, sample)
    if truth and not against:
        out.print("Forget quality is left out: it compares with a model that never knew; name its server with --against.")
    for path in save(report, directory):
        out.print(f"written: {path}")


def _refuse_unless_served(against: str) -> None:
    """Better now than after an hour of asking."""
    try:
        httpx.get(f"{against.rstrip('/').removesuffix('/v1')}/v1/models", timeout=30)
    except httpx.HTTPError as error:
        fail(f"no server answers at --against {against} ({type(error).__name__}); start the model that never knew there first")


def at_most(cases: Sequence[Case], most: int) -> list[Case]:
    """All cases that are to be forgotten, and the first so many of each group that is to stay."""
    seen: Counter[str] = Counter()
    chosen = []
    for case in cases:
        seen[case.group] += 1
        if not case.keep or seen[case.group] <= most:
            chosen.append(case)
    return chosen


def _print(figures: list[dict[str, Any]], sample: int) -> None:
    table = folding_table(
        "", *(arm["arm"] for arm in figures), title="ROUGE-L recall of the truth, and answers word for word the same"
    )
    for group in figures[0]["unchanged"]:
        cells = []
        for arm in figures:
            recall = f"{arm['recall'][group]:.3f}" if group in arm["recall"] else ""
            cells.append(f"{recall} ({arm['unchanged'][group]:.0%})".strip())
        table.add_row(group, *cells)
    if sample:
        table.add_section()
        table.add_row(f"leak@{sample}", *(f"{arm['leak']:.3f}" for arm in figures))
        table.add_row("whole truth sampled, at most", *(f"{arm['exact_at_most']:.4f}" for arm in figures))
    table.add_row(
        "five content words in a row",
        *(f"{arm['verbatim'][QUESTIONS]:.0%}" if QUESTIONS in arm["verbatim"] else "" for arm in figures),
    )
    for title, value in TRUTHS.items():
        cells = ["" if (found := value(arm)) is None else f"{found:.3g}" for arm in figures]
        if any(cells):
            table.add_row(title, *cells)
    out.print(table)
