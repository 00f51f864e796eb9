"""The command line, ``lethe``: the commands of the other modules here under one name, and ``lethe serve``."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import httpx
import typer
from pydantic_settings import SettingsError

from guards.errors import GuardError, InvalidForgetSet
from serve.cli import assistants, bench, compare, experiment, forget, keys, look, policies, state, unlearn
from serve.cli.talk import ServerSaysNo, fail, out
from serve.lock import InUseElsewhere, server_runs
from serve.registry.records import RegistryError
from serve.settings import Settings
from serve.sqlite import StorageFault
from serve.terminal import LOG, plain_terminal, quiet_terminal

app = typer.Typer(
    name="lethe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve a language model that forgets on command.\n\n"
    "Start with `lethe serve`. In another terminal: `lethe forget add NAME FILE.jsonl`, then `lethe forget enable NAME`; the very "
    "next answer no longer contains the set's phrases. `lethe forget disable NAME` brings them back.\n\n"
    "State lives in LETHE_STATE_DIR; commands reach the server at LETHE_URL with the key in LETHE_KEY.",
)
for group, name in (
    (forget.app, "forget"),
    (policies.app, "policy"),
    (assistants.app, "assistant"),
    (experiment.app, "experiment"),
    (keys.app, "key"),
):
    app.add_typer(group, name=name)
for command in (
    assistants.train,
    assistants.calibrate,
    compare.compare,
    bench.bench,
    unlearn.unlearn,
    unlearn.verify,
    look.check,
    look.why,
    look.revision,
    look.audit,
    state.backup,
    state.restore,
    state.doctor,
):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lethe {metadata.version('lethe')}")
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")]


@app.callback()
def _options(version: VersionOption = False) -> None:
    """Options before a command."""


_OURS = (GuardError, RegistryError, StorageFault, InUseElsewhere)


def main() -> None:
    """Entry point: errors become one readable message and exit status 1."""
    try:
        app()
    except InvalidForgetSet as error:
        fail("\n".join(error.problems))
    except (*_OURS, ServerSaysNo) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except SettingsError as error:
        fail(f"{error}; lists are JSON, for instance LETHE_ALLOW_ROUTES='[\"POST /tokenize\"]'")
    except httpx.UnsupportedProtocol:
        fail(f"LETHE_URL={Settings().url!r} must be a URL such as http://127.0.0.1:8000")
    except httpx.ConnectError:
        fail(f"no server answers at {Settings().url}; start one with `lethe serve`, or set LETHE_URL")
    except httpx.HTTPError as error:
        fail(f"{type(error).__name__} while talking to {Settings().url}: {error}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Any model path or name vLLM takes. Default: the bundled one.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="The engine's log on the terminal, instead of in a file.")] = False,
    options: Annotated[str | None, typer.Option(help="Show vLLM's options that have this word in them (all: every one).")] = None,
    help_: Annotated[bool, typer.Option("--help", help="Show this and exit.")] = False,
) -> None:
    """Start the server. Takes every option of `vllm serve`: --host, --port, --max-model-len, ..."""
    if help_:
        out.print(context.get_help())
        out.print("All further options go to vLLM: `lethe serve --options all` lists them, `--options port` those about ports.")
        raise typer.Exit
    if options:
        from serve.http.launch import show_options

        show_options(options)
        raise typer.Exit
    settings = Settings()
    arguments = [*(["--model", model] if model else []), *context.args]
    if not verbose and server_runs(settings.state_dir):  # its log must stay its own
        raise InUseElsewhere(settings.state_dir)
    said = plain_terminal() if verbose else quiet_terminal(settings.state_dir / "logs" / LOG)
    said.step("loading vLLM")
    # These take seconds to import, and what they say belongs into the log.
    import uvloop

    from serve.default_model import MissingModel, default_model
    from serve.generation.workers import UnguardedWorker
    from serve.http.app import serve as run
    from serve.http.launch import UnsafeSetting

    def bundled() -> str:
        said.step("making the bundled model ready")
        return str(default_model(settings.cache_dir))

    try:
        # As vLLM does; with asyncio's own loop, Nagle's algorithm would hold every answer back for 40 ms.
        uvloop.run(run(arguments, settings, bundled, said))
    except (UnsafeSetting, UnguardedWorker, MissingModel, *_OURS, OSError, ValueError) as error:
        said.fail(str(error))
    except KeyboardInterrupt:
        said.end()
        said.say("stopped")
        raise typer.Exit(130) from None
    except (RuntimeError, SystemExit) as error:  # of vLLM, which has said why in its log
        if said.log is None:
            raise
        said.fail(f"the server did not start: {error}\n{said.last_words()}\nall of it is in {said.log}")
    said.say("stopped")
