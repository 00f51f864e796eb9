"""Assembly: vLLM's engine with the guarded model, vLLM's OpenAI app on our engine client, our routes beside it."""

from __future__ import annotations

import asyncio
import json
import signal
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm import envs
from vllm.config import ModelConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

from guards.base_model import BaseModel
from guards.policy import DEFAULT, NONE
from guards.similarity.encoder import bundled_encoder
from serve.control.control import Control
from serve.control.removals import Removals
from serve.control.similarity import Similarity
from serve.experiments.live import LiveExperiments
from serve.experiments.measurements import Measurements
from serve.experiments.shadow import Shadow
from serve.experiments.store import Experiments
from serve.generation.ask import InternalRoad
from serve.generation.client import GuardedEngineClient
from serve.generation.score import Scorer
from serve.generation.side_by_side import SideBySide
from serve.generation.workers import check_workers, count_closed_rows, load_artifacts
from serve.hits import RecentHits
from serve.http import admin_routes as admin
from serve.http import experiment_routes, removal_routes
from serve.http.budgets import Budgets
from serve.http.launch import check_binding, guard_arguments, model_directory, own_url, parse_arguments, template_of
from serve.http.middleware import Admission
from serve.http.probes import Probes
from serve.http.rules import is_loopback
from serve.http.tools import writes_dates
from serve.lock import sole_server
from serve.protocol.vocabulary import vocabulary_of
from serve.protocol.wire import BASE_KEY, PLAN_KEY
from serve.registry.store import Registry
from serve.registry.usage import FILE as USAGE
from serve.registry.usage import Usage
from serve.settings import Settings
from serve.terminal import Terminal

CUT_OFF_S = 5
"""How long answers may still take once the server is told to stop at once: a slow client must not keep it alive."""


@asynccontextmanager
async def guarded_app(
    args: Namespace, settings: Settings, registry: Registry, terminal: Terminal
) -> AsyncIterator[tuple[Any, Admission]]:
    """The complete app, ready to serve, and the admission around it. ``args`` have passed `guard_arguments`."""
    terminal.step(f"starting the engine with {args.served_model_name[0]}")
    async with build_async_engine_client(args) as inner:
        terminal.step("putting what is in force into the engine")
        model: ModelConfig = inner.model_config
        vocabulary = vocabulary_of(inner.renderer.get_tokenizer(), model.get_vocab_size())
        await asyncio.to_thread(vocabulary.warm)
        unable = await check_workers(inner, vocabulary.fingerprint)
        for guard, reason in unable.items():
            terminal.say(f"{guard} cannot be used here: {reason}")
        base = args.additional_config[PLAN_KEY][BASE_KEY]
        similarity = Similarity(settings.encoder or bundled_encoder(), settings.artifacts_dir)
        removals = Removals(settings.state_dir / "removals", registry, own_url(args), settings.training_niceness)
        control = Control(
            registry,
            vocabulary,
            settings.artifacts_dir,
            load=lambda artifacts: load_artifacts(inner, artifacts),
            similarity=similarity,
            refresh_ms=settings.refresh_ms,
            model=model_directory(args),
            base=None if base is None else BaseModel.model_validate(base),
            training_niceness=settings.training_niceness,
            removals=removals,
        )
        await control.start()
        try:
            client = GuardedEngineClient(
                inner,
                lambda: control.snapshot,
                control.phrases,
                vocabulary,
                settings.max_choices,
                similarity,
                control.text_guards,
                lambda: control.in_force.unavailable,
            )
            tasks = await inner.get_supported_tasks()
            app = build_app(args, tasks, model)
            await init_app_state(client, app.state, args, tasks)
            _list_policies_as_models(app, control)
            # Some templates write today's date into every prompt, so that what was measured yesterday is not what is asked today.
            app.state.lethe_dated_prompts = writes_dates(template_of(args))
            behind_admission = app.middleware_stack or app.build_middleware_stack()
            road = InternalRoad(behind_admission, app)
            served = args.served_model_name[0]
            scorer = Scorer(road, served, lambda: control.snapshot, inner.renderer.get_tokenizer(), model.max_model_len)
            usage = Usage(settings.state_dir / USAGE)
            budgets = Budgets(usage)
            await budgets.start()
            side_by_side = SideBySide(road, served, lambda: control.snapshot, budgets.spent)
            shadow = Shadow(
                waiting=settings.shadow_waiting,
                beside=settings.shadow_beside,
                quiet_s=settings.shadow_quiet_s,
                at_once=settings.shadow_at_once,
                tokens_per_minute=settings.shadow_tokens_per_minute,
            )
            measurements = Measurements(settings.state_dir / "observations.db")
            experiments = Experiments(registry)
            # What was deleted while an answer was under way, or the server crashed.
            known = [each.id for each in await asyncio.to_thread(experiments.all)]
            await asyncio.to_thread(measurements.keep_only, known)
            live = LiveExperiments(lambda: control.snapshot, measurements, control.phrases, similarity, shadow)
            of_experiments = experiment_routes.attach(app, control, experiments, measurements, live)
            hits = RecentHits()
            of_removals = removal_routes.attach(app, removals)
            admin.attach(app, control, registry, scorer, side_by_side, hits, [of_experiments, of_removals], unable)
            # Outermost, around every middleware that vLLM or a plugin of its brought along.
            admission = Admission(
                behind_admission,
                snapshot=lambda: control.snapshot,
                served_names=args.served_model_name,
                settings=settings,
                open_without_keys=is_loopback(args.host or ""),
                experiments=live,
                hits=hits,
                budgets=budgets,
                probes=Probes(settings.max_probes_per_hour, control.phrases, vocabulary),
                allowed_origins=args.allowed_origins,
            )
            app.middleware_stack = admission
            live.start(road)
            counting = asyncio.create_task(count_closed_rows(inner))
            try:
                yield app, admission
            finally:
                counting.cancel()
                await live.stop()
                await budgets.stop()
                measurements.close()
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


async def serve(arguments: Sequence[str], settings: Settings, default_model: Callable[[], str], terminal: Terminal) -> None:
    """Run the server until it is told to stop.

    Raises:
        UnsafeSetting, UnguardedWorker, RegistryError, StorageFault, GuardError, OSError: it cannot start, and why.
    """
    args = parse_arguments(arguments, default_model)
    with sole_server(settings.state_dir):
        await _serve(args, settings, terminal)


async def _serve(args: Namespace, settings: Settings, terminal: Terminal) -> None:
    registry = Registry(settings.state_dir / "lethe.db")
    registry.check_file()  # a damaged page may be one that is read first when it is needed most
    registry.check_history()
    check_binding(args.host, registry)
    guard_arguments(args, settings)
    address, listener = setup_server(args, reuse_port=False)
    try:
        async with guarded_app(args, settings, registry, terminal) as (app, admission):
            in_force = sum(each.enabled for each in await asyncio.to_thread(registry.forget_sets))
            terminal.ready(
                [
                    f"{in_force} forget set{'' if in_force == 1 else 's'} in force, state in {settings.state_dir}",
                    *([] if terminal.log is None else [f"the log is {terminal.log}"]),
                    f"serving {args.served_model_name[0]} on {address} (Ctrl-C stops)",
                ]
            )
            configured = get_uvicorn_log_config(args)
            log_config = {} if configured is None else {"log_config": configured}
            taking_signals = asyncio.create_task(_take_signals(app, admission, args.shutdown_timeout, terminal))
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


async def _take_signals(app: FastAPI, admission: Admission, drain_s: float, terminal: Terminal) -> None:
    """Stop when told to. SIGTERM lets answers that are under way end, SIGINT or a second signal cuts them off."""
    # vLLM's launcher has run up to its first wait by now: it has made the server, and put handlers of its own in place.
    loop, told = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, told.put_nowait, each)
    told_by = await told.get()
    terminal.say("stopping")
    if told_by is signal.SIGTERM and drain_s > 0:
        admission.drain()
        if admission.under_way:
            terminal.say(f"{admission.under_way} answers may take {drain_s:g} s to end; another signal cuts them off")
        waiting = {asyncio.ensure_future(told.get()), asyncio.ensure_future(admission.drained())}
        await asyncio.wait(waiting, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
    app.state.server.should_exit = True
