"""``lethe compare``: one question under several policies, side by side."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from serve.cli.talk import JsonOption, connect, err, fail, folding_table, out, print_json, unwrap


def compare(
    question: Annotated[str, typer.Argument(help="What every policy is asked.")],
    arms: Annotated[str, typer.Option(help="Policies, with commas; the others are compared to the first.")] = "none,default",
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same for all arms.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Ask every policy the same question at once, and show what each says, what its guards did and how long it took."""
    names = [name.strip() for name in arms.split(",") if name.strip()]
    order = {"question": question, "arms": names, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    done: dict[str, Any] | None = None
    texts = dict.fromkeys(names, "")
    with (
        connect() as client,
        client.stream("POST", "/compare", json={**order, "stream": True}) as answer,
        Live(console=err, transient=True, auto_refresh=False) as live,
    ):
        if not answer.is_success:
            answer.read()
            unwrap(answer)
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                fields = json.loads(line.removeprefix("data: "))
                if kind == "done":
                    done = fields
                else:
                    texts[fields["arm"]] += fields["text"]
                    live.update(_growing(texts), refresh=True)
    if done is None:
        fail("the server ended the comparison before it was done; see its log")
    elif as_json:
        print_json(done)
    else:
        _show(done)


def _growing(texts: dict[str, str]) -> Table:
    table = folding_table("policy", "answer")
    for name, text in texts.items():
        table.add_row(name, text)
    return table


def _show(done: dict[str, Any]) -> None:
    first = done["arms"][0]["policy"]
    table = folding_table(
        "policy", "end", "guards", "first token", "all", f"differs from {first}", title=f"revision {done['revision']}"
    )
    for arm in done["arms"]:
        at = arm["divergence"]["at"]
        differs = "" if at is None else f"from token {at + 1}, {arm['divergence']['same']:.0%} in common"
        first_token = "" if arm["first_token_ms"] is None else f"{arm['first_token_ms']:.0f} ms"
        events = ", ".join(dict.fromkeys(arm["guard_events"]))
        table.add_row(arm["policy"], arm["finish_reason"] or "error", events, first_token, f"{arm['total_ms']:.0f} ms", differs)
    for arm in done["arms"]:
        out.rule(arm["policy"], align="left")
        out.print(arm["error"] or arm["text"] + (f" [{arm['refusal']}]" if arm["refusal"] else ""))
    out.print(table)
    if any(arm["error"] for arm in done["arms"]):
        raise typer.Exit(1)
