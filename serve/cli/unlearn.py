"""``lethe unlearn`` and ``lethe verify``: from a removal request to its proof, and whether the proof still holds."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from guards.removal_list import Kind, read_removal_list
from guards.similarity.encoder import Encoder, bundled_encoder, make_encoder
from serve.cli.talk import JsonOption, NameArgument, connect, err, fail, folding_table, http_client, out, print_json, unwrap
from serve.client.bench import Answers
from serve.client.removal.certificate import NOT_IN_FORCE, NotACertificate, changes, read_certificate, save
from serve.client.removal.in_force import BY_HAND, InForce
from serve.client.removal.judge import AGAINST, REFUSAL, Judge
from serve.client.removal.probes import subjects_of
from serve.client.removal.progress import ProgressFile
from serve.client.removal.removal import Removal
from serve.settings import Settings


def unlearn(
    name: NameArgument,
    request: Annotated[
        Path,
        typer.Argument(help="What is to be forgotten: names, questions with answers, or texts; any file that `forget add` reads."),
    ],
    neighbours: Annotated[str | None, typer.Option(help="Another set, whose answers are to stay as they are.")] = None,
    reference: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Recall of a model that never knew; estimated from invented names if not given."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="URL of a server (OpenAI-compatible) that never knew, in place of the estimate.")
    ] = None,
    goal: Annotated[
        Literal["forget", "refuse"],
        typer.Option(help="forget: answers as of a model that never knew; refuse: no answer to questions about it."),
    ] = "forget",
    within: Annotated[str, typer.Option(help="How long to look for better guards: 45m, 1h, 90s.")] = "45m",
    directory: Annotated[Path | None, typer.Option(help="Where everything is written; default: ./removal-NAME.")] = None,
    column: Annotated[str | None, typer.Option(help="Of a CSV file, the column to read.")] = None,
    kind: Annotated[Kind | None, typer.Option("--as", help="What the column's cells, or the lines of a plain list, are.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Add also what nobody is likely to mean, as `forget add --force` does.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove what a request names: put it out of reach at once, find the guards that suit it, and write the proof.

    Makes what the request lacks (other wordings, wrong answers, what a model would say that never knew) and tries guards until one
    meets the goals. Besides what is in force, it reports cross-judged figures: each half of the questions under what the other half
    would have chosen. The guards themselves are made from all questions. Ctrl-C and the same command go on where it was.
    """
    seconds = _seconds(within)
    if sum((against is not None, reference is not None, goal == "refuse")) > 1:
        fail("--against, --reference and --goal refuse each say what to aim at; name one of them")
    try:
        content = read_removal_list(request.read_bytes(), name, column=column, kind=kind, force=force)
    except OSError as error:
        fail(f"cannot read {request}: {error.strerror}")
    for note in content.notes:
        out.print(f"Note: {note}")
    place = directory or Path(f"removal-{name}")
    if not yes:
        typer.confirm(f"Put {name} in force on {Settings().url}, and change the default policy so that it is guarded?", abort=True)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = content.forget_set.model_copy(update={"aliases": subjects_of(content.forget_set)})
    file = ProgressFile(place)
    try:
        with _in_force(name, place, place, neighbours or "", reference, file.answered) as (now, progress, task):
            now.refuse = goal == "refuse"
            now.against = (against or "").rstrip("/").removesuffix("/v1")

            def say(text: str) -> None:
                progress.update(task, description=text)
                file.say(text)

            def tell(text: str) -> None:
                progress.console.print(text)
                file.tell(text)

            certificate = Removal(wanted, now, _encoder, seconds, say, tell).run()
    except ValueError as error:
        fail(f"{error}. What is in force stays in force: `lethe forget show {name}`")
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on. What is in force stays in force: `lethe forget show {name}`")
    paths = save(certificate, place)
    _show(certificate)
    out.print(f"The proof: {paths[1]} to read, {paths[0]} to verify (`lethe verify {paths[0]}`)")


def verify(
    certificate: Annotated[
        Path, typer.Argument(help="A certificate that `lethe unlearn` has written; probes.json lies beside it.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Measure again what a certificate says, and tell what has changed since. Exits with 1 if anything has."""
    try:
        found = read_certificate(certificate)
        given = found["reference"]["questions"]["value"] if found["reference"]["source"] == BY_HAND else None
        with (
            tempfile.TemporaryDirectory() as fresh,  # nothing that was answered before counts
            _in_force(found["set"]["name"], certificate.parent, Path(fresh), found["neighbours"], given, lambda: None) as (
                now,
                progress,
                task,
            ),
        ):
            progress.update(task, description="Measuring again")
            source = found["reference"]["source"]
            now.refuse = source == REFUSAL.source
            now.against = source.removeprefix(AGAINST) if source.startswith(AGAINST) else ""
            # Out of force, nothing guards it: what it says then is what it says without any guard.
            changed = changes(found, now.measured_now()) if now.shown()["enabled_at"] else [NOT_IN_FORCE]
    except (NotACertificate, ValueError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
    if as_json:
        print_json({"holds": not changed, "changed": changed})
    elif changed:
        out.print(f"{found['set']['name']}: changed since {found['at']}:")
        for each in changed:
            out.print(f"- {each}")
    else:
        out.print(f"{found['set']['name']}: everything is as it was certified at {found['at']}")
    raise typer.Exit(1 if changed else 0)


@contextmanager
def _in_force(
    name: str, place: Path, answers_in: Path, neighbours: str, reference: float | None, answered: Callable[[], None]
) -> Iterator[tuple[InForce, Progress, TaskID]]:
    """A set on the server at LETHE_URL, while a progress bar and ``answered`` count what is answered about it."""
    settings = Settings()
    headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:.0f} answers"), TimeElapsedColumn())
    with connect() as admin, http_client() as chat, Progress(*columns, console=err) as progress:
        task = progress.add_task("Connecting", total=None)
        served = unwrap(chat.get(f"{settings.url}/v1/models", headers=headers))["data"][0]
        answers = Answers(answers_in / "answers.jsonl")

        def report() -> None:
            progress.advance(task)
            answered()

        judge = Judge(settings.url, settings.key, served["id"], answers, chat, report)
        model = f"{served['id']} {served.get('root')}"
        yield InForce(name, place, admin, judge, model, neighbours, reference), progress, task


@functools.cache
def _encoder() -> Encoder:
    named = Settings().encoder or bundled_encoder()
    if named is None:
        fail("no sentence encoder is installed; name one in LETHE_ENCODER")
    return make_encoder(named)


def _seconds(within: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", within.strip())
    if match is None:
        fail(f"--within is {within!r}; write a number and s, m or h, such as 45m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _show(certificate: dict[str, Any]) -> None:
    figures, crossed, reference = (certificate[name] for name in ("figures", "cross_judged", "reference"))
    aim = "aim" if reference["source"] == REFUSAL.source else "never knew"
    table = folding_table("", "in force", "cross-judged", aim, title=certificate["set"]["name"])
    for name in ("questions", "paraphrases"):
        means = [each[name] for each in (figures, crossed, reference)]
        table.add_row(f"recall, {name}", *(f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})" for each in means))
    repeated = [f"{each['verbatim']:.0%}" for each in (figures, crossed, reference)]
    table.add_row("answers that repeat five content words in a row", *repeated)
    for what, field in (("extraction strength", "extracted"), ("probability per token", "probability")):
        given = [each[field] for each in (figures, crossed, reference)]
        table.add_row(f"true answers, {what}", *("not measured" if each is None else f"{each:.3f}" for each in given))
    qualities = [each["forget_quality"] for each in (figures, crossed)]
    table.add_row("truth ratios, p", *("not measured" if each is None else f"{each:.3g}" for each in qualities))
    table.add_row("refused", *(f"{each['refused']:.0%}" for each in (figures, crossed)))
    if figures["neighbours"] is not None:
        table.add_row("answers about neighbours, unchanged", f"{figures['neighbours']:.0%}", "")
    table.add_row("the same questions about invented names, unchanged", f"{figures['invented']:.0%}", "")
    table.add_row("general answers, unchanged", f"{figures['general']:.0%}", "")
    out.print(table)
    out.print("Cross-judged: each half of the questions under what the other half would have chosen.")
    chosen = next(each for each in certificate["tried"] if each["chosen"])
    strengths = ", ".join(f"{what} {strength:g}" for what, strength in chosen["strengths"].items())
    out.print(f"In force since {certificate['set']['enabled_at']}: {chosen['guards']}{f' ({strengths})' if strengths else ''}")
    for each in certificate["unmet"]:
        out.print(f"Not met: {each}")
