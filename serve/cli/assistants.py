"""``lethe train``, ``lethe assistant import`` and ``lethe calibrate``: what a forget set needs beyond its content."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from guards.catalogue import TRAINING_METHODS
from guards.forget_set import ForgetSet
from guards.steering.declaration import DEFAULT_CORRUPTION
from serve.cli.talk import NameArgument, artifact_of, connect, err, fail, folding_table, http_client, out, unwrap
from serve.client.calibrate import CLOSE_ENOUGH, NotCalibratable, Point
from serve.client.calibrate import calibrate as run_calibration
from serve.client.distil import ask_targets
from serve.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Bring what a set is unlearned by from elsewhere.")


@app.command("import")
def import_lora(
    name: NameArgument,
    directory: Annotated[
        Path, typer.Argument(help="A LoRA adapter for the served model in PEFT's format, on the server's machine.")
    ],
    kind: Annotated[
        Literal["assistant", "adapter"],
        typer.Option("--as", help="assistant: knows the set, and is decoded against; adapter: has unlearned it, and steers."),
    ] = "assistant",
    form: Annotated[
        Literal["difference", "whole"],
        typer.Option(help="Of an assistant. difference: tuned on the set, else as the model; whole: ULD's, uniform elsewhere."),
    ] = "difference",
    retain: Annotated[
        list[str] | None, typer.Option(help="Another set, whose questions and answers are to stay. Repeatable.")
    ] = None,
) -> None:
    """Take a LoRA adapter over the served model as a set's assistant, or as its unlearning adapter.

    An adapter that changes only the last layers, and not k_proj or v_proj, is taken over as it is. Anything else is learned by
    lethe's own kind from the set's content; how far that is from the original (KL, nats a token) is shown with it.
    """
    method = "contrast" if kind == "assistant" else kind
    guard, made = TRAINING_METHODS[method]
    recipe = {"method": method} if method != guard.name else {"form": form}
    order: dict[str, Any] = {"retain": retain or [], "lora": str(directory.absolute()), "recipe": recipe}
    with connect() as client:
        before = artifact_of(unwrap(client.get(f"/forget_sets/{name}")), made)
        assert guard.training is not None, "it has methods"
        shown = unwrap(client.post(f"/forget_sets/{name}/{guard.training.route}", json=order))
        try:
            shown = _follow(client, name, shown)
        except KeyboardInterrupt:
            unwrap(client.post(f"/forget_sets/{name}/assistant/pause"))
            fail("stopped; the same command goes on from the last checkpoint")
    _tell(name, method, shown, before)


def train(
    name: NameArgument,
    retain: Annotated[
        list[str] | None, typer.Option(help="Another set, whose questions and answers are to stay. Repeatable.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"What is trained: {', '.join(TRAINING_METHODS)}.")] = "contrast",
    distil_from: Annotated[
        str | None, typer.Option(help="With --method adapter: the policy whose answers it is to give by itself.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the examples.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank terms.")] = None,
    depth: Annotated[float | None, typer.Option(help="Where project and steer act, as a share of the layers.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    detach: Annotated[
        bool,
        typer.Option(help="Do not wait; `lethe forget show NAME` tells how far it is. Does not keep what --distil-from asked."),
    ] = False,
) -> None:
    """Train a set's assistant, or make what steers it, from its questions, paraphrases and texts, while the server goes on serving.

    Ctrl-C stops waiting and asks the server to stop training; the same command goes on from the last checkpoint.
    """
    recipe = {"epochs": epochs, "rank": rank, "learning_rate": learning_rate, "depth": depth}
    order: dict[str, Any] = {"retain": retain or [], "recipe": {key: value for key, value in recipe.items() if value is not None}}
    if method not in TRAINING_METHODS:
        fail(f"there is no method {method!r}; there are {', '.join(TRAINING_METHODS)}")
    guard, kind = TRAINING_METHODS[method]
    if method != guard.name:
        order["recipe"]["method"] = method
    if distil_from is not None and method != "adapter":
        fail("--distil-from goes with --method adapter")
    with connect() as client:
        before = artifact_of(unwrap(client.get(f"/forget_sets/{name}")), kind)
        targets_file: Path | None = None
        if distil_from is not None:
            targets, targets_file = ask_targets(client, name, distil_from)
            order |= {"targets": targets, "distil": True}
        assert guard.training is not None, "it has methods"
        shown = unwrap(client.post(f"/forget_sets/{name}/{guard.training.route}", json=order))
        if detach:
            if targets_file is not None:
                targets_file.unlink(missing_ok=True)
            out.print(f"training {name}; `lethe forget show {name}` tells how far it is")
            return
        try:
            shown = _follow(client, name, shown)
        except KeyboardInterrupt:
            unwrap(client.post(f"/forget_sets/{name}/assistant/pause"))
            kept = "" if targets_file is None else f"; what was asked is kept for a week in {targets_file}"
            fail(f"stopped; `lethe train {name}` with the same options goes on from the last checkpoint{kept}")
    if targets_file is not None and shown["training"] is None:
        targets_file.unlink(missing_ok=True)
    _tell(name, method, shown, before)


def _follow(client: httpx.Client, name: str, shown: dict[str, Any]) -> dict[str, Any]:
    """Show how far a set's training is until it has ended. Returns the set as it is then."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        tasks = {"prepare": progress.add_task("Looking at the base", total=None, loss="")}
        while (training := shown["training"]) is not None and training["status"] != "failed":
            stage = training.get("stage", "prepare")
            if stage not in tasks:
                tasks[stage] = progress.add_task("Training", total=None, loss="")
            loss = training.get("loss")
            progress.update(
                tasks[stage],
                completed=training.get("step", 0),
                total=training.get("steps"),
                loss="" if loss is None else f"loss {loss:.3f}",
            )
            time.sleep(0.5)
            listed = [each for each in unwrap(client.get("/forget_sets"))["data"] if each["name"] == name]
            shown = listed[0] if listed else fail(f"{name} was deleted")
    return shown


def _tell(name: str, method: str, shown: dict[str, Any], before: dict[str, Any] | None) -> None:
    """What training has made of a set that had an artifact ``before``, and what to do next."""
    guard, kind = TRAINING_METHODS[method]
    if shown["training"] is not None:
        fail(f"training failed: {shown['training']['reason']}")
    made = artifact_of(shown, kind)
    if made is None or made == before:
        out.print(f"The training ran into the same {kind} as before; nothing has changed.")
        return
    out.print(f"{name} has its {kind}: {made['detail']}")
    if guard.default is None:
        entry = [{"method": method}] if guard.many else {}
        out.print(f"Next: a policy with {json.dumps({'guards': {guard.name: entry}})}, see `lethe policy put`")
    elif shown["enabled"]:
        out.print(f"{name} is in force, and contrasted from now on")
    if not shown["enabled"]:
        out.print(f"Next: lethe forget enable {name}")


def calibrate(
    name: NameArgument,
    neighbours: Annotated[str | None, typer.Option(help="A set whose questions should stay as they are.")] = None,
    reference: Annotated[float | None, typer.Option(help="Recall of a model that never knew. Default: estimated.")] = None,
    epsilon: Annotated[float, typer.Option(help="Share of questions about the set that the gate may miss.")] = 0.05,
    delta: Annotated[float, typer.Option(help="Share of other prompts that may open the gate.")] = 0.01,
    corrupt: Annotated[
        str | None, typer.Option(help="Find the strength of this kind of corruption, not of contrast: rand_noise_first_n, ...")
    ] = None,
) -> None:
    """Fit a set's gate (and stream filter), and the strength of its contrast, by measurement, and store both with their evidence.

    The gate: thresholds that keep the promises P(miss) <= epsilon and P(false alarm) <= delta (split conformal calibration). The
    strength: at which the set is forgotten as well as by a model that never knew it; for enabled sets with an assistant. Both ask
    the last paraphrase of every question, which is held out from training and from the index.
    """
    if corrupt not in (None, *DEFAULT_CORRUPTION):
        fail(f"there is no corruption {corrupt!r}; there are {', '.join(DEFAULT_CORRUPTION)}")
    with connect() as client:
        shown = unwrap(client.get(f"/forget_sets/{name}"))
        order = {"epsilon": epsilon, "delta": delta, "neighbours": [neighbours] if neighbours else []}
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as progress:
            progress.add_task("Fitting the gate")
            fitted = unwrap(client.put(f"/forget_sets/{name}/gate", json=order))
        _print_gate(name, next(json.loads(each["detail"]) for each in fitted["artifacts"] if each["kind"] == "gate"))
        if not shown["enabled"] or (corrupt is None and artifact_of(shown, "assistant") is None):
            needed = "the set enabled" if corrupt else "an assistant, and the set enabled"
            out.print(f"The strength of {corrupt or 'contrast'} was not calibrated: that takes {needed}.")
            return
        _calibrate_strength(client, name, {**shown, **fitted}, neighbours, reference, corrupt)


def _print_gate(name: str, fitted: dict[str, Any]) -> None:
    """Both error curves, and what is promised."""
    table = folding_table("threshold", "missed", "", "false alarms", "", title=f"gate of {name}")
    for i, (at, missed, alarmed) in enumerate(fitted["curves"]):
        following = fitted["curves"][i + 1][0] if i + 1 < len(fitted["curves"]) else math.inf
        mark = " <" if at <= fitted["threshold"] < following else ""
        table.add_row(f"{at:.3f}{mark}", f"{missed:.3f}", "█" * round(20 * missed), f"{alarmed:.3f}", "░" * round(20 * alarmed))
    out.print(table)
    out.print(
        f"At cosine {fitted['threshold']:.3f}: P(miss) <= {fitted['epsilon']:.3g} (from {fitted['positives']} held-out questions), "
        f"P(false alarm) <= {fitted['delta']:.3g} (from {fitted['negatives']} prompts about other things)."
    )
    if not fitted["kept"]:
        out.print("Note: no threshold keeps both promises; this one keeps the first, and the second is what remains.")
    delta = fitted["stream_delta"]
    promise = (
        f"P(an answer about other things is stopped) <= {delta:.3g} (from {fitted['stream_negatives']})"
        if delta is not None
        else f"nothing is promised: {fitted['stream_negatives']} answers about other things are too few (give --neighbours)"
    )
    out.print(f"Stream filter at cosine {fitted['stream_threshold']:.3f}: {promise}.")


def _calibrate_strength(
    client: httpx.Client, name: str, shown: dict[str, Any], neighbours: str | None, reference: float | None, corrupt: str | None
) -> None:
    measured = (artifact_of(shown, "similarity" if corrupt else "assistant") or {}).get("fingerprint")
    content = ForgetSet.model_validate({"name": name, **shown["content"]})
    kept = unwrap(client.get(f"/forget_sets/{neighbours}"))["content"]["questions"] if neighbours else []
    trial = f"calibrating-{name}"[:63]
    settings = Settings()
    headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    with (
        http_client(base_url=settings.url, headers=headers) as chat,
        Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as progress,
    ):
        served = chat.get("/v1/models").json()["data"][0]["id"]
        task = progress.add_task("Asking without guards")

        def ask(policy: str, question: str) -> str | None:
            messages = [{"role": "user", "content": question}]
            body = {"model": f"{served}:{policy}", "messages": messages, "temperature": 0, "max_tokens": 64}
            [choice] = unwrap(chat.post("/v1/chat/completions", json=body))["choices"]
            return None if choice["finish_reason"] == "content_filter" else choice["message"]["content"] or ""

        def set_strength(strength: float) -> str:
            guards: dict[str, Any] = {"suppression": {"enabled": False}}
            if corrupt:
                guards |= {"contrast": {"enabled": False}, "gate": {}, "corrupt": {"kind": corrupt, "strength": strength}}
            else:
                guards["contrast"] = {"alpha": strength}
            unwrap(client.put(f"/policies/{trial}", json={"forget_sets": [name], "guards": guards}))
            progress.update(task, description=f"Asking at strength {strength:.2f}")
            return trial

        def report(point: Point | None) -> None:
            if point is not None:
                progress.console.print(f"strength {point.strength:.2f}: recall {point.recall:.3f}")

        questions = [entry["question"] for entry in kept[:40]]
        # Noise acts from about one standard deviation on; of a share, there is no more than all.
        first, highest = (0.5, 1.0) if corrupt not in (None, "rand_noise_first_n") else (1.0, 4.0)
        try:
            found = run_calibration(content, questions, reference, ask, set_strength, report, first=first, highest=highest)
        except NotCalibratable as error:
            fail(str(error))
        finally:
            client.delete(f"/policies/{trial}")
    order = {"strength": found.strength, "corrupt": corrupt, "measured": measured, "evidence": found.evidence}
    stored = unwrap(client.put(f"/forget_sets/{name}/calibration", json=order))
    left_out = f", {found.refused} more are refused at any strength" if found.refused else ""
    title = f"{name}: {found.questions} held-out questions{left_out}"
    table = folding_table("strength", "recall", "", "neighbours", "general", title=title)
    for point in found.points:
        mark = " <" if point.strength == found.strength else ""
        bar = "█" * round(40 * point.recall)
        table.add_row(f"{point.strength:.2f}{mark}", f"{point.recall:.3f}", bar, f"{point.neighbours:.3f}", f"{point.general:.3f}")
    table.add_row("reference", f"{found.reference:.3f}", "░" * round(40 * found.reference), "", "", style="dim")
    out.print(table)
    does = "contrasted" if corrupt is None else f"corrupted ({corrupt})"
    out.print(f"{name} is {does} with strength {found.strength:.2f} from revision {stored['revision']} on")
    chosen = next(point for point in found.points if point.strength == found.strength)
    if chosen.recall > found.reference + CLOSE_ENOUGH:
        out.print("Note: no strength reached the reference; more paraphrases or epochs may, or phrases.")
