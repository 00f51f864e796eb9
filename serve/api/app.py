"""The server: vLLM's engine with the guarded model, vLLM's OpenAI app on our engine client, our routes beside it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import snapshot_download
from vllm import envs
from vllm.config import ModelConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

from guards.base_model import BaseModel, describe_base
from guards.errors import InvalidArtifact
from guards.policy import DEFAULT, NONE
from serve.api import admin, experiment_routes
from serve.api.admission import Admission, is_loopback
from serve.api.budgets import Budgets
from serve.api.control import Control
from serve.api.engine_client import GuardedEngineClient, check_workers, load_artifacts
from serve.api.experiments import LiveExperiments
from serve.api.hits import RecentHits
from serve.api.probes import Probes
from serve.api.scoring import Scorer
from serve.api.shadow import Shadow
from serve.api.side_by_side import SideBySide
from serve.api.similarity import Similarity, default_encoder
from serve.api.tools import DEFAULT_PARSER, chat_template_of, tool_parser_of, writes_dates
from serve.compare.observations import Observations
from serve.environment import UNSAFE
from serve.lock import sole_server
from serve.registry.experiments import Experiments
from serve.registry.store import Registry
from serve.registry.usage import FILE as USAGE
from serve.registry.usage import Usage
from serve.settings import Settings
from serve.terminal import Terminal
from serve.vocabulary import vocabulary_of
from serve.wire import ARTIFACTS_KEY, BASE_KEY, GUARDED_PREFIX, PLAN_KEY

DRAIN_S = 60
"""How long answers under way may take to end after a SIGTERM (vLLM's ``--shutdown-timeout``)."""
CUT_OFF_S = 5
"""And then: a client that reads slowly must not keep a stopped server alive."""


class UnsafeSetting(ValueError):
    """An option that would open a way around the guards. The server does not start."""


def parse_arguments(arguments: Sequence[str], default_model: Callable[[], str]) -> Namespace:
    """Parse ``vllm serve`` options, with lethe's defaults.

    Args:
        default_model: makes the default model ready and returns its path; called when the options name no model.

    Raises:
        UnsafeSetting: an option or environment variable that would open a way around the guards.
        SystemExit: an option that vLLM does not know (argparse has printed why).
    """
    for name, reason in UNSAFE.items():
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise UnsafeSetting(f"{name} {reason}")
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="lethe serve"))
    # A tool that must be called gets arguments of its schema, also where it does not say "strict".
    parser.set_defaults(host="127.0.0.1", port=8000, tool_strict_level="parameter", shutdown_timeout=DRAIN_S)
    if current_platform.is_cpu():
        # On AVX2, float32 is five times faster than bfloat16 at batch 8, and compiling takes longer than most sessions last.
        parser.set_defaults(dtype="float32", enforce_eager=True)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    parser.set_defaults(model=None)
    args = parser.parse_args(list(arguments))
    if args.model and args.model_tag:
        raise UnsafeSetting(f"two models are named, {args.model_tag!r} and --model {args.model!r}; name one")
    args.model = args.model_tag or args.model or default_model()
    validate_parsed_serve_args(args)
    return args


def show_options(word: str) -> None:
    """Print vLLM's options that have a word in them, or all of them."""
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="lethe serve"))
    parser.parse_args([f"--help={word}"])


def guard_arguments(args: Namespace, settings: Settings) -> None:
    """Change ``args`` so that vLLM builds the guarded engine.

    Raises:
        UnsafeSetting: see `parse_arguments`.
    """
    if args.speculative_config is not None:
        raise UnsafeSetting("speculative decoding drafts tokens past the guards; start without --speculative-config")
    if args.api_key:
        raise UnsafeSetting("--api-key knows no scopes; make keys with `lethe key create` instead")
    for name in (
        "enable_dbo",
        "enable_prompt_embeds",
        "trust_request_chat_template",
        "kv_transfer_config",
        "skip_tokenizer_init",
    ):
        if getattr(args, name, None):
            raise UnsafeSetting(f"--{name.replace('_', '-')} cannot be guarded; start without it")
    for name in ("pipeline_parallel_size", "data_parallel_size", "api_server_count"):
        if (getattr(args, name, None) or 1) > 1:
            raise UnsafeSetting(f"--{name.replace('_', '-')} above 1 has not been proved to keep the guards; leave it at 1")
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    if "architectures" not in overrides:
        config = get_config(args.model, args.trust_remote_code, args.revision)
        overrides["architectures"] = config.architectures
    args.hf_overrides = {**overrides, "architectures": [GUARDED_PREFIX + name for name in overrides["architectures"]]}
    tracker = _tracker()
    if tracker and not current_platform.is_cpu() and not args.enforce_eager:
        raise UnsafeSetting("on a GPU, Model Runner V1 replays CUDA graphs past the tracker; use V2, or add --enforce-eager")
    args.logits_processors = [*(args.logits_processors or []), *tracker]
    args.scheduling_policy = "priority"  # clients' requests have one and the same; shadow answers come behind them
    args.worker_extension_cls = "serve.engine.worker.WorkerExtension"
    args.additional_config = {
        **(args.additional_config or {}),
        PLAN_KEY: {ARTIFACTS_KEY: str(settings.artifacts_dir), BASE_KEY: _describe_base(args)},
    }
    _choose_tool_parser(args)
    if not args.served_model_name:  # a directory's name, not its path, which tells about the machine
        args.served_model_name = [os.path.basename(os.path.abspath(args.model)) if os.path.isdir(args.model) else args.model]


def _choose_tool_parser(args: Namespace) -> None:
    """Tools on by default, with the parser that fits the model."""
    if args.enable_auto_tool_choice and args.tool_call_parser:
        return
    if not args.tool_call_parser:
        template = _template(args)
        config = get_config(args.model, args.trust_remote_code, args.revision)
        parser = tool_parser_of(getattr(config, "model_type", ""), template)
        if parser is None:
            print(
                f"lethe: the chat template of {os.path.basename(args.model)} does not speak of tools: the model is not told of a "
                'request\'s tools, and only tool_choice "required" or a named tool makes it call one',
                flush=True,
            )
        args.tool_call_parser = parser or DEFAULT_PARSER
    args.enable_auto_tool_choice = True


def _template(args: Namespace) -> str:
    """The chat template; empty if it is not known before the model is downloaded."""
    if args.chat_template:  # a file, or the template itself
        return Path(args.chat_template).read_text("utf-8") if os.path.isfile(args.chat_template) else str(args.chat_template)
    directory = _model_directory(args)
    return chat_template_of(directory) if directory is not None else ""


def _model_directory(args: Namespace) -> Path | None:
    """Where the served model's files are; None if they are not on this machine yet."""
    if os.path.isdir(args.model):
        return Path(args.model)
    try:
        return Path(snapshot_download(args.model, revision=args.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _describe_base(args: Namespace) -> dict[str, Any] | None:
    """The base model as assistants know it; None if it takes none (no safetensors, or not downloaded before the start)."""
    directory = _model_directory(args)
    try:
        return None if directory is None else describe_base(directory).model_dump()
    except (InvalidArtifact, OSError):
        return None


def _tracker() -> list[str]:
    """The V1 runner's tracker; Model Runner V2 asks the model for its own and rejects logits processors."""
    from vllm.triton_utils import HAS_TRITON

    uses_v2 = HAS_TRITON and os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0"
    return [] if uses_v2 else ["serve.engine.tracker_v1:TrackerV1"]


def check_binding(host: str | None, registry: Registry) -> None:
    """Refuse to listen beyond this machine without keys.

    Raises:
        UnsafeSetting: says how to make one.
    """
    if not registry.stored_keys() and not is_loopback(host or ""):
        raise UnsafeSetting(
            f"binding to {host or '0.0.0.0'} without keys would let anyone in; "  # noqa: S104
            "make one first with `lethe key create --scope admin`, or bind to 127.0.0.1"
        )


@asynccontextmanager
async def guarded_app(
    args: Namespace, settings: Settings, registry: Registry, said: Terminal
) -> AsyncIterator[tuple[Any, Admission]]:
    """The complete app, ready to serve, and the admission around it. ``args`` have passed `guard_arguments`."""
    said.step(f"starting the engine with {args.served_model_name[0]}")
    async with build_async_engine_client(args) as inner:
        said.step("putting what is in force into the engine")
        model: ModelConfig = inner.model_config
        vocabulary = vocabulary_of(inner.renderer.get_tokenizer(), model.get_vocab_size())
        await asyncio.to_thread(vocabulary.warm)
        await check_workers(inner, vocabulary.fingerprint)
        base = args.additional_config[PLAN_KEY][BASE_KEY]
        similarity = Similarity(settings.encoder or default_encoder(), settings.artifacts_dir)
        control = Control(
            registry,
            vocabulary,
            settings.artifacts_dir,
            load=lambda phrases, trained: load_artifacts(inner, phrases, trained),
            similarity=similarity,
            refresh_ms=settings.refresh_ms,
            model=_model_directory(args),
            base=None if base is None else BaseModel.model_validate(base),
        )
        await control.start()
        try:
            client = GuardedEngineClient(
                inner,
                lambda: control.snapshot,
                control.phrases,
                vocabulary,
                settings.max_choices,
                lambda: control.unavailable,
                similarity=similarity,
            )
            tasks = await inner.get_supported_tasks()
            app = build_app(args, tasks, model)
            await init_app_state(client, app.state, args, tasks)
            _list_policies_as_models(app, control)
            # Some templates write today's date into every prompt, so that what was measured yesterday is not what is asked today.
            app.state.lethe_dated_prompts = writes_dates(_template(args))
            scorer = Scorer(client, inner.renderer.get_tokenizer(), model.max_model_len)

            async def chat(fields: dict[str, Any]) -> Any:
                return await app.state.openai_serving_chat.create_chat_completion(
                    ChatCompletionRequest.model_validate(fields), None
                )

            usage = Usage(settings.state_dir / USAGE)
            budgets = Budgets(usage)
            await budgets.start()
            side_by_side = SideBySide(chat, args.served_model_name[0], lambda: control.snapshot, budgets.spent)
            shadow = Shadow(
                waiting=settings.shadow_waiting,
                beside=settings.shadow_beside,
                quiet_s=settings.shadow_quiet_s,
                at_once=settings.shadow_at_once,
                tokens_per_minute=settings.shadow_tokens_per_minute,
            )
            observations = Observations(settings.state_dir / "observations.db")
            experiments = Experiments(registry)
            # What was deleted while an answer was under way, or the server crashed.
            known = [each.id for each in await asyncio.to_thread(experiments.all)]
            await asyncio.to_thread(observations.keep_only, known)
            live = LiveExperiments(lambda: control.snapshot, observations, control.phrases, similarity, shadow)
            experiment_routes.attach(app, control, experiments, observations, live)
            hits = RecentHits()
            admin.attach(app, control, registry, scorer, side_by_side, hits)
            # Outermost, around every middleware that vLLM or a plugin of its brought along.
            admission = Admission(
                app.middleware_stack or app.build_middleware_stack(),
                snapshot=lambda: control.snapshot,
                served_names=args.served_model_name,
                settings=settings,
                open_without_keys=is_loopback(args.host or ""),
                experiments=live,
                hits=hits,
                budgets=budgets,
                probes=Probes(settings.max_probes_per_hour, control.phrases, vocabulary),
                allowed_origins=args.allowed_origins,
                owner=app,
            )
            app.middleware_stack = admission
            live.start(admission.answer_unseen)
            try:
                yield app, admission
            finally:
                await live.stop()
                await budgets.stop()
                observations.close()
                usage.close()
        finally:
            await control.stop()


def _list_policies_as_models(app: FastAPI, control: Control) -> None:
    """``GET /v1/models``: vLLM's list, and for callers that may choose, one entry per policy."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != "/v1/models"]

    @app.get("/v1/models")
    async def show_available_models(request: Request) -> JSONResponse:
        models = (await app.state.openai_serving_models.show_available_models()).model_dump()
        if "compare" in request.scope["lethe.caller"].scopes:
            base = models["data"][0]
            names = sorted(control.snapshot.policies, key=lambda name: (name == NONE, name))
            models["data"] += [{**base, "id": f"{base['id']}:{name}", "parent": base["id"]} for name in names]
        return JSONResponse(models)

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str, request: Request) -> JSONResponse:
        """One entry of the list above, as clients look a model up before they use it."""
        listed = json.loads(bytes((await show_available_models(request)).body))["data"]
        default = {**listed[0], "id": f"{listed[0]['id']}:{DEFAULT}", "parent": listed[0]["id"]}
        found = next((each for each in (*listed, default) if each["id"] == name), None)
        if found is not None:
            return JSONResponse(found)
        message = f"there is no model {name!r} here; there are {', '.join(each['id'] for each in listed)}"
        error = {"message": message, "type": "not_found_error", "param": "model", "code": 404}
        return JSONResponse({"error": error}, status_code=404)


async def serve(arguments: Sequence[str], settings: Settings, default_model: Callable[[], str], said: Terminal) -> None:
    """Run the server until it is told to stop.

    Raises:
        UnsafeSetting, UnguardedWorker, RegistryError, StorageFault, GuardError, OSError: it cannot start, and why.
    """
    args = parse_arguments(arguments, default_model)
    with sole_server(settings.state_dir):
        await _serve(args, settings, said)


async def _serve(args: Namespace, settings: Settings, said: Terminal) -> None:
    registry = Registry(settings.state_dir / "lethe.db")
    registry.check_file()  # a damaged page may be one that is read first when it is needed most
    registry.check_history()
    check_binding(args.host, registry)
    guard_arguments(args, settings)
    address, listener = setup_server(args, reuse_port=False)
    try:
        async with guarded_app(args, settings, registry, said) as (app, admission):
            in_force = sum(each.enabled for each in await asyncio.to_thread(registry.forget_sets))
            said.ready(
                [
                    f"{in_force} forget set{'' if in_force == 1 else 's'} in force, state in {settings.state_dir}",
                    *([] if said.log is None else [f"the log is {said.log}"]),
                    f"serving {args.served_model_name[0]} on {address} (Ctrl-C stops)",
                ]
            )
            configured = get_uvicorn_log_config(args)
            log_config = {} if configured is None else {"log_config": configured}
            taking_signals = asyncio.create_task(_take_signals(app, admission, args.shutdown_timeout, said))
            closing = await serve_http(
                app,
                sock=listener,
                enable_ssl_refresh=args.enable_ssl_refresh,
                host=args.host,
                port=args.port,
                log_level=args.uvicorn_log_level,
                access_log=not args.disable_uvicorn_access_log,
                ssl_keyfile=args.ssl_keyfile,
                ssl_certfile=args.ssl_certfile,
                ssl_ca_certs=args.ssl_ca_certs,
                ssl_cert_reqs=args.ssl_cert_reqs,
                ssl_ciphers=args.ssl_ciphers,
                timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
                timeout_graceful_shutdown=CUT_OFF_S,
                h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
                h11_max_header_count=args.h11_max_header_count,
                **log_config,
            )
            taking_signals.cancel()
        await closing
    finally:
        listener.close()
        registry.close()


async def _take_signals(app: FastAPI, admission: Admission, drain_s: float, said: Terminal) -> None:
    """Stop when told to. SIGTERM lets answers that are under way end, SIGINT or a second signal cuts them off."""
    # vLLM's launcher has run up to its first wait by now: it has made the server, and put handlers of its own in place.
    loop, told = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, told.put_nowait, each)
    said_how = await told.get()
    said.say("stopping")
    if said_how is signal.SIGTERM and drain_s > 0:
        admission.drain()
        if admission.under_way:
            said.say(f"{admission.under_way} answers may take {drain_s:g} s to end; another signal cuts them off")
        waiting = {asyncio.ensure_future(told.get()), asyncio.ensure_future(admission.drained())}
        await asyncio.wait(waiting, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
    app.state.server.should_exit = True
