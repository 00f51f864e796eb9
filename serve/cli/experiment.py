"""``lethe experiment``: policies against one another on live traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.talk import JsonOption, act, connect, fail, folding_table, out, print_json, unwrap
from serve.experiments.page import save_experiment

app = typer.Typer(no_args_is_help=True, help="Compare policies on live traffic, with statistics that survive peeking.")
NameArgument = Annotated[str, typer.Argument(help="The experiment's name.")]


@app.command("create")
def create(
    name: NameArgument,
    arm: Annotated[list[str], typer.Option(help="NAME=POLICY[:WEIGHT], at least twice; the others are compared to the first.")],
    unit: Annotated[str, typer.Option(help="What keeps its arm: key, user, header or conversation.")] = "key",
    header: Annotated[str, typer.Option(help="With --unit header: the header that names the unit.")] = "X-Experiment-Key",
    mode: Annotated[
        str,
        typer.Option(
            help="live: only the unit's arm answers; shadow: all do, clients see the first; paired: all do, clients see their own."
        ),
    ] = "live",
    share: Annotated[float, typer.Option(help="Share of all units that take part.")] = 1.0,
    sample: Annotated[float, typer.Option(help="Share of their requests that the other arms answer too.")] = 1.0,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Begin an experiment; the next request may take part."""
    order = {"name": name, "arms": [_arm(each) for each in arm], "unit": unit, "mode": mode, "share": share, "sample": sample}
    order |= {"header": header}
    with connect() as client:
        made = unwrap(client.post("/experiments", json={**order, "description": description}))
    out.print(f"{name} runs from revision {made['revision']} on")
    for note in made["notes"]:
        out.print(f"note: {note}")


@app.command("list")
def show_all(as_json: JsonOption = False) -> None:
    """List all experiments."""
    with connect() as client:
        listed = unwrap(client.get("/experiments"))
    if as_json:
        print_json(listed)
        return
    table = folding_table("name", "mode", "unit", "share", "arms", "runs")
    for each in listed["data"]:
        arms = ", ".join(f"{arm['name']}={arm['policy']}:{arm['weight']:g}" for arm in each["arms"])
        runs = f"since {each['created_at']}" if each["stopped_at"] is None else f"stopped {each['stopped_at']}"
        table.add_row(each["name"], each["mode"], each["unit"], f"{each['share']:.0%}", arms, runs)
    out.print(table)


@app.command("report")
def report(
    name: NameArgument,
    as_json: JsonOption = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page with plots to this file.")] = None,
) -> None:
    """Show what an experiment has shown so far. Looking early or often does no harm."""
    with connect() as client:
        found = unwrap(client.get(f"/experiments/{name}"))
    if html is not None:
        save_experiment(found, html)
    if as_json:
        print_json(found)
        return
    _print(found)
    if html is not None:
        out.print(f"written: {html}")


@app.command("weights")
def weights(name: NameArgument, changes: Annotated[list[str], typer.Argument(help="ARM=WEIGHT, one or more.")]) -> None:
    """Change arms' weights. As few units as possible change their arm, and those that do are no longer counted."""
    pairs = [each.partition("=") for each in changes]
    try:
        body = {arm: float(weight) for arm, _, weight in pairs}
    except ValueError:
        fail(f"{' '.join(changes)!r} must be ARM=WEIGHT, one or more, such as strict=60")
    act("PUT", f"/experiments/{name}/weights", f"{name} has new weights", json=body)


@app.command("stop")
def stop(name: NameArgument) -> None:
    """End an experiment. Its figures stay."""
    act("POST", f"/experiments/{name}/stop", f"{name} is stopped")


@app.command("delete")
def delete(name: NameArgument) -> None:
    """Delete an experiment that has stopped, and its figures."""
    act("DELETE", f"/experiments/{name}", f"{name} is deleted")


def _arm(text: str) -> dict[str, Any]:
    name, found, rest = text.partition("=")
    policy, _, weight = rest.partition(":")
    try:
        if not found:
            raise ValueError
        return {"name": name, "policy": policy, "weight": float(weight or 1)}
    except ValueError:
        return fail(f"--arm {text!r} must be NAME=POLICY or NAME=POLICY:WEIGHT, such as strict=default:50")


def _print(found: dict[str, Any]) -> None:
    described = found["experiment"]
    state = "runs" if found["stopped_at"] is None else f"stopped {found['stopped_at']}"
    arms = found["arms"]
    table = folding_table("", *(arm["name"] for arm in arms), title=f"{described['name']} ({described['mode']}, {state})")
    table.add_row("policy", *(arm["policy"] for arm in arms))
    table.add_row("weight", *(f"{arm['weight']:g}" for arm in arms))
    table.add_row("units", *(f"{arm['units']:,}" for arm in arms))
    titles = {metric: shown["title"] for arm in arms for metric, shown in arm["metrics"].items()}
    for metric, title in titles.items():
        cells = [arm["metrics"].get(metric) for arm in arms]
        table.add_row(title, *("" if cell is None else f"{cell['mean']:.4g} (n {cell['n']:,})" for cell in cells))
    for what in dict.fromkeys(what for arm in arms for what in arm["counts"]):
        table.add_row(what, *(f"{arm['counts'].get(what, 0):,}" for arm in arms))
    out.print(table)
    if found["comparisons"]:
        table = folding_table(f"against {found['control']}", "figure", "is", "between, at every look", "shown")
        for row in found["comparisons"]:
            low, high = (("?" if bound is None else f"{bound:.3f}") for bound in (row["low"], row["high"]))
            estimate = f"{row['estimate']:.3f} times" if row["as"] == "ratio" else f"{row['estimate']:+.3f}"
            table.add_row(row["arm"], row["title"], estimate, f"{low} and {high}", "yes" if row["decided"] else "")
        out.print(table)
    for sentence in found["verdict"]:
        out.print(sentence)
