"""The command line: ``lethe serve | forget | train | calibrate | policy | check | audit | revision | key``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic_settings import SettingsError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from guards.errors import GuardError, InvalidForgetSet
from guards.forget_set import ForgetSet, read_jsonl
from serve.calibrate import CLOSE_ENOUGH, NotCalibratable, Point
from serve.calibrate import calibrate as run_calibration
from serve.registry.snapshot import SCOPES
from serve.registry.store import Registry, RegistryError
from serve.settings import Settings

app = typer.Typer(
    name="lethe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve a language model that forgets on command.\n\n"
    "Start with `lethe serve`. In another terminal: `lethe forget add NAME FILE.jsonl`, then `lethe forget enable NAME`; the very "
    "next answer no longer contains the set's phrases. `lethe forget disable NAME` brings them back.\n\n"
    "State lives in LETHE_STATE_DIR; commands reach the server at LETHE_URL with the key in LETHE_KEY.",
)
forget = typer.Typer(no_args_is_help=True, help="Add, show, enable, disable and remove forget sets.")
policy = typer.Typer(no_args_is_help=True, help="Show and change policies: which sets apply, through which guards.")
key = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys. Works without a running server.")
app.add_typer(forget, name="forget")
app.add_typer(policy, name="policy")
app.add_typer(key, name="key")

out = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)
NameArgument = Annotated[str, typer.Argument(help="The forget set's name: 1 to 63 of a-z, 0-9, _ and -.")]


def main() -> None:
    """Entry point: errors become one readable message and exit status 1."""
    try:
        app()
    except InvalidForgetSet as error:
        _fail("\n".join(error.problems))
    except (GuardError, RegistryError, _ServerSaysNo) as error:
        _fail(str(error))
    except SettingsError as error:
        _fail(f"{error}; lists are JSON, for instance LETHE_ALLOW_ROUTES='[\"POST /tokenize\"]'")
    except httpx.UnsupportedProtocol:
        _fail(f"LETHE_URL={Settings().url!r} must be a URL such as http://127.0.0.1:8000")
    except httpx.ConnectError:
        _fail(f"no server answers at {Settings().url}; start one with `lethe serve`, or set LETHE_URL")
    except httpx.HTTPError as error:
        _fail(f"{type(error).__name__} while talking to {Settings().url}: {error}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Any model path or name vLLM takes. Default: the bundled one.")] = None,
    help_: Annotated[bool, typer.Option("--help", help="Show this and exit.")] = False,
) -> None:
    """Start the server. Takes every option of `vllm serve`: --host, --port, --max-model-len, ..."""
    if help_:
        out.print(context.get_help())
        out.print("All further options go to vLLM; `vllm serve --help=all` lists them.")
        raise typer.Exit
    import uvloop

    from serve.api.app import UnsafeSetting
    from serve.api.app import serve as run
    from serve.api.engine_client import UnguardedWorker
    from serve.default_model import MissingModel, default_model

    settings = Settings()
    arguments = [*(["--model", model] if model else []), *context.args]
    try:
        # As vLLM does; with asyncio's own loop, Nagle's algorithm would hold every answer back for 40 ms.
        uvloop.run(run(arguments, settings, lambda: str(default_model(settings.cache_dir))))
    except (UnsafeSetting, UnguardedWorker, MissingModel, OSError, ValueError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@forget.command("add")
def forget_add(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(help="JSON lines: {'phrase': ...}, {'alias': ...}, {'question': ..., 'answer': ...}")],
    replace: Annotated[bool, typer.Option(help="Replace the set if it exists.")] = False,
) -> None:
    """Add a forget set from a file, and wait until it is compiled. It does nothing until enabled."""
    try:
        content = file.read_bytes()
    except OSError as error:
        _fail(f"cannot read {file}: {error.strerror}")
    read_jsonl(content, name)  # the same check that the server makes, before anything is sent
    with _client() as client:
        headers = {"content-type": "application/jsonl"}
        if replace and client.get(f"/forget_sets/{name}").status_code == 200:
            answer = client.put(f"/forget_sets/{name}", content=content, headers=headers)
        else:
            answer = client.post("/forget_sets", params={"name": name}, content=content, headers=headers)
        added = _unwrap(answer)
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as progress:
            progress.add_task(f"Compiling {added['phrases']:,} phrases")
            while added["phrases"] and not any(a["status"] in ("ready", "failed") for a in added["artifacts"]):
                time.sleep(0.2)
                listed = _unwrap(client.get("/forget_sets"))["data"]  # not the set itself, whose content may be large
                added = {**added, **next(each for each in listed if each["name"] == name)}
    _print_set(added)
    if any(artifact["status"] == "failed" for artifact in added["artifacts"]):
        raise typer.Exit(1)
    if added["phrases"] and not added["enabled"]:
        out.print(f"Next: lethe forget enable {name}")
    elif not added["phrases"] and _assistant_of(added) is None:
        out.print(f"This set has no phrases. Next: lethe train {name}, so that an assistant enforces it")


@forget.command("list")
def forget_list() -> None:
    """List all forget sets."""
    with _client() as client:
        listed = _unwrap(client.get("/forget_sets"))
    table = Table("name", "enabled since", "phrases", "artifacts", "requester", "expires", title=f"revision {listed['revision']}")
    for each in listed["data"]:
        artifacts = ", ".join(f"{artifact['kind']} {artifact['status']}" for artifact in each["artifacts"])
        since = each["enabled_at"] or "no"
        table.add_row(each["name"], since, f"{each['phrases']:,}", artifacts, each["requester"], each["expires_at"] or "")
    out.print(table)


@forget.command("show")
def forget_show(name: NameArgument) -> None:
    """Show a set: its state, its artifacts, its paperwork, its content."""
    with _client() as client:
        _print_set(_unwrap(client.get(f"/forget_sets/{name}")))


@forget.command("enable")
def forget_enable(name: NameArgument) -> None:
    """Put a set in force, from the next request on."""
    _act("POST", f"/forget_sets/{name}/enable", f"{name} is in force")
    with _client() as client:
        policies = _unwrap(client.get("/revision"))["policies"]
    if name not in policies["default"]:
        out.print("Note: the default policy leaves this set out; `lethe revision` shows which policies apply it.")


@forget.command("disable")
def forget_disable(name: NameArgument) -> None:
    """Take a set out of force, from the next request on."""
    _act("POST", f"/forget_sets/{name}/disable", f"{name} is not in force")


@forget.command("remove")
def forget_remove(name: NameArgument) -> None:
    """Delete a set. If it was enabled, it is out of force from the next request on."""
    _act("DELETE", f"/forget_sets/{name}", f"{name} is deleted")


@app.command()
def train(
    name: NameArgument,
    retain: Annotated[
        list[str] | None, typer.Option(help="Another set, whose questions and answers are to stay. Repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the examples.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the assistant's adapters.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    detach: Annotated[bool, typer.Option(help="Do not wait; `lethe forget show NAME` tells how far it is.")] = False,
) -> None:
    """Train a set's assistant from its questions, paraphrases and texts, while the server goes on serving.

    Ctrl-C stops waiting and asks the server to stop training; the same command goes on from the last checkpoint.
    """
    recipe = {"epochs": epochs, "rank": rank, "learning_rate": learning_rate}
    order = {"retain": retain or [], "recipe": {key: value for key, value in recipe.items() if value is not None}}
    with _client() as client:
        before = _assistant_of(_unwrap(client.get(f"/forget_sets/{name}")))
        shown = _unwrap(client.post(f"/forget_sets/{name}/assistant", json=order))
        if detach:
            out.print(f"training {name}; `lethe forget show {name}` tells how far it is")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        try:
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
                    listed = _unwrap(client.get("/forget_sets"))["data"]
                    shown = next((each for each in listed if each["name"] == name), None) or _fail(f"{name} was deleted")
        except KeyboardInterrupt:
            _unwrap(client.post(f"/forget_sets/{name}/assistant/pause"))
            _fail(f"stopped; `lethe train {name}` with the same options goes on from the last checkpoint")
    if shown["training"] is not None:
        _fail(f"training failed: {shown['training']['reason']}")
    assistant = _assistant_of(shown)
    if assistant is None or assistant == before:
        out.print("The training ran into the same assistant as before; nothing has changed.")
        return
    out.print(f"{name} has an assistant: {assistant['detail']}")
    if shown["enabled"]:
        out.print(f"{name} is in force, and contrasted from now on")
    else:
        out.print(f"Next: lethe forget enable {name}")


@app.command()
def calibrate(
    name: NameArgument,
    neighbours: Annotated[str | None, typer.Option(help="A set whose questions should stay as they are.")] = None,
    reference: Annotated[float | None, typer.Option(help="Recall of a model that never knew. Default: estimated.")] = None,
) -> None:
    """Find the strength at which a set is forgotten as well as by a model that never knew it, and store it with the set.

    Needs paraphrases (the last of each question is held out from training) and, without --reference, aliases that they name. The
    set must be enabled and have an assistant.
    """
    with _client() as client:
        shown = _unwrap(client.get(f"/forget_sets/{name}"))
        if _assistant_of(shown) is None or not shown["enabled"]:
            _fail(f"{name} must have an assistant and be enabled: lethe train {name}; lethe forget enable {name}")
        measured = (_assistant_of(shown) or {}).get("fingerprint")
        content = ForgetSet.model_validate({"name": name, **shown["content"]})
        kept = _unwrap(client.get(f"/forget_sets/{neighbours}"))["content"]["questions"] if neighbours else []
        trial = f"calibrating-{name}"[:63]
        settings = Settings()
        headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
        with (
            httpx.Client(base_url=settings.url, headers=headers, timeout=600) as chat,
            Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as progress,
        ):
            served = chat.get("/v1/models").json()["data"][0]["id"]
            task = progress.add_task("Asking without guards")

            def ask(policy: str, question: str) -> str:
                messages = [{"role": "user", "content": question}]
                body = {"model": f"{served}:{policy}", "messages": messages, "temperature": 0, "max_tokens": 64}
                return _unwrap(chat.post("/v1/chat/completions", json=body))["choices"][0]["message"]["content"] or ""

            def set_alpha(alpha: float) -> str:
                fields = {"forget_sets": [name], "guards": {"contrast": {"alpha": alpha}, "suppression": {"enabled": False}}}
                _unwrap(client.put(f"/policies/{trial}", json=fields))
                progress.update(task, description=f"Asking at strength {alpha:.2f}")
                return trial

            def report(point: Point | None) -> None:
                if point is not None:
                    progress.console.print(f"strength {point.alpha:.2f}: recall {point.recall:.3f}")

            try:
                found = run_calibration(content, [entry["question"] for entry in kept[:40]], reference, ask, set_alpha, report)
            except NotCalibratable as error:
                _fail(str(error))
            finally:
                client.delete(f"/policies/{trial}")
        stored = _unwrap(
            client.put(
                f"/forget_sets/{name}/calibration", json={"alpha": found.alpha, "assistant": measured, "evidence": found.evidence}
            )
        )
    title = f"{name}: {found.questions} held-out questions"
    table = Table("strength", "recall", "", "neighbours", "general", title=title)
    for point in found.points:
        mark = " <" if point.alpha == found.alpha else ""
        bar = "█" * round(40 * point.recall)
        table.add_row(f"{point.alpha:.2f}{mark}", f"{point.recall:.3f}", bar, f"{point.neighbours:.3f}", f"{point.general:.3f}")
    table.add_row("reference", f"{found.reference:.3f}", "░" * round(40 * found.reference), "", "", style="dim")
    out.print(table)
    out.print(f"{name} is contrasted with strength {found.alpha:.2f} from revision {stored['revision']} on")
    chosen = next(point for point in found.points if point.alpha == found.alpha)
    if chosen.recall > found.reference + CLOSE_ENOUGH:
        out.print("Note: no strength reached the reference; more paraphrases or epochs may, or phrases.")


@policy.command("list")
def policy_list() -> None:
    """List all policies."""
    with _client() as client:
        listed = _unwrap(client.get("/policies"))
    table = Table("name", "forget sets", "guards", "description", title=f"revision {listed['revision']}")
    for each in listed["data"]:
        sets = each["forget_sets"] if isinstance(each["forget_sets"], str) else ", ".join(each["forget_sets"])
        guards = ", ".join(name for name, config in each["guards"].items() if config and config.get("enabled", True))
        table.add_row(each["name"], sets, guards or "none", each["description"])
    out.print(table)


@policy.command("put")
def policy_put(
    name: Annotated[str, typer.Argument(help="The policy's name.")],
    file: Annotated[Path, typer.Argument(help="JSON: {'forget_sets': 'enabled' or [...], 'guards': {...}, 'refusal': ...}")],
) -> None:
    """Create or replace a policy."""
    try:
        fields = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        _fail(f"cannot read {file} as JSON: {error}")
    _act("PUT", f"/policies/{name}", f"{name} holds", json=fields)


@policy.command("remove")
def policy_remove(name: Annotated[str, typer.Argument(help="The policy's name.")]) -> None:
    """Delete a policy; `default` returns to its built-in form."""
    _act("DELETE", f"/policies/{name}", f"{name} is removed")


@app.command()
def check(
    text: Annotated[str, typer.Argument(help="Any text; - reads standard input.")],
    policy: Annotated[str, typer.Option(help="The policy to check against.")] = "default",
) -> None:
    """Show what the forget sets would hit in a text. Exit status 1 if something in force is hit."""
    text = sys.stdin.read() if text == "-" else text
    with _client() as client:
        found = _unwrap(client.post("/check", json={"text": text, "policy": policy}))
    table = Table("forget set", "guard", "place", "text", "in force")
    for hit in found["hits"]:
        place = f"{hit['start']}-{hit['end']}"
        table.add_row(hit["forget_set"], hit["guard"], place, hit["text"], "yes" if hit["in_force"] else "no")
    out.print(table if found["hits"] else "Nothing is hit.")
    if any(hit["in_force"] for hit in found["hits"]):
        raise typer.Exit(1)


@app.command()
def revision() -> None:
    """Show what is in force."""
    with _client() as client:
        shown = _unwrap(client.get("/revision"))
    table = Table("policy", "forget sets that it applies", title=f"revision {shown['revision']}")
    for name, names in shown["policies"].items():
        table.add_row(name, ", ".join(names) or "none")
    out.print(table)


@app.command()
def audit(
    after: Annotated[int, typer.Option(help="Show what came after this revision.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with everything.")] = False,
) -> None:
    """Show who changed what, and whether the record is intact."""
    rows: list[dict[str, Any]] = []
    shown = None
    with _client() as client:
        while shown is None or shown["data"]:
            shown = _unwrap(client.get("/audit", params={"after": rows[-1]["revision"] if rows else after, "limit": 1_000}))
            rows += shown["data"]
    for row in rows:
        detail = {name: value for name, value in row["detail"].items() if value not in ("", None, 0, False)}
        brief = ", ".join(f"{name} {value}" for name, value in detail.items() if name in ("requester", "legal_basis", "reason"))
        line = f"{row['revision']:>6}  {row['at'][:19]}Z  {row['action']:<19}  {row['subject']}  by {row['actor']}"
        print(json.dumps(row) if as_json else f"{line}  {brief}".rstrip())
    if not shown["intact"]:
        _fail(f"the record was tampered with: revision {shown['first_broken']} does not fit the ones before it")
    if not as_json:
        head = rows[-1]["hash"] if rows else "none"
        print(f"The chain is intact. Note its head elsewhere to notice if its end is cut off: {head}")


@key.command("create")
def key_create(
    scope: Annotated[str, typer.Option(help="chat: talk; compare: also choose policies; admin: everything.")],
    label: Annotated[str, typer.Option(help="Whose key it is.")] = "",
) -> None:
    """Make a key and print it once. As soon as one key exists, every route needs one."""
    if scope not in SCOPES:
        _fail(f"scope {scope!r} must be one of {', '.join(SCOPES)}")
    key_id, secret = _registry().create_key(scope, label, actor="command line")  # type: ignore[arg-type]
    err.print(f"{key_id} ({scope}); keep the secret, it is not shown again:")
    print(secret)


@key.command("list")
def key_list() -> None:
    """List all keys (not their secrets)."""
    table = Table("id", "scope", "label", "created")
    for each in _registry().stored_keys():
        table.add_row(each.id, each.scope, each.label, each.created_at)
    out.print(table)


@key.command("revoke")
def key_revoke(key_id: Annotated[str, typer.Argument(help="The key's id, from `lethe key list`.")]) -> None:
    """Revoke a key. Running servers follow within a second."""
    out.print(f"{key_id} is revoked (revision {_registry().revoke_key(key_id, actor='command line')})")


class _ServerSaysNo(Exception):
    """The server refused, with a message for people."""


def _client() -> httpx.Client:
    settings = Settings()
    headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    return httpx.Client(base_url=settings.url.rstrip("/") + "/lethe/v1", headers=headers, timeout=600)


def _unwrap(answer: httpx.Response) -> Any:
    if answer.is_success:
        return answer.json()
    try:
        error = answer.json()["error"]
        message = "\n".join(error.get("problems", [error["message"]]))
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {answer.status_code}: {answer.text[:500]}"
    if answer.status_code == 401:
        message += " (this command sends the one in LETHE_KEY)"
    raise _ServerSaysNo(message)


def _act(method: str, path: str, done: str, **options: Any) -> None:
    with _client() as client:
        revision = _unwrap(client.request(method, path, **options))["revision"]
    out.print(f"{done} from revision {revision} on")


def _print_set(shown: dict[str, Any]) -> None:
    table = Table(show_header=False, title=shown["name"])
    table.add_row("enabled", f"since {shown['enabled_at']}" if shown["enabled"] else "no")
    for name in ("description", "requester", "legal_basis", "expires_at", "fingerprint", "revision"):
        if shown[name]:
            table.add_row(name, str(shown[name]))
    for artifact in shown["artifacts"]:
        if artifact["kind"] == "calibration":
            found = json.loads(artifact["detail"])
            strength = f"strength {found['alpha']:.2f}, reference {found.get('reference')}"
            table.add_row("calibration", f"{strength}, {artifact['updated_at']}")
        else:
            table.add_row(artifact["kind"], f"{artifact['status']} {artifact['detail']}")
    if training := shown.get("training"):
        state = training.get("reason") or f"{training.get('stage', '')} {training.get('step', '')}/{training.get('steps', '')}"
        table.add_row("training", f"{training['status']} {state}")
    for name in ("phrases", "aliases", "questions", "texts"):
        entries = shown.get("content", {}).get(name, [])
        listed = [entry["question"] if isinstance(entry, dict) else entry for entry in entries[:20]]
        more = [f"... and {len(entries) - 20:,} more"] if len(entries) > 20 else []
        if shown[name]:
            count = f"{shown[name]:,}" + (" (kept, not enforced by this release)" if name == "aliases" else "")
            table.add_row(name, "\n".join([count, *listed, *more]))
    out.print(table)


def _assistant_of(shown: dict[str, Any]) -> dict[str, Any] | None:
    return next((artifact for artifact in shown["artifacts"] if artifact["kind"] == "assistant"), None)


def _registry() -> Registry:
    return Registry(Settings().state_dir / "lethe.db")


def _fail(message: str) -> Any:
    print(f"lethe: {message}", file=sys.stderr)
    raise SystemExit(1)
