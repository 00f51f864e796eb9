"""The routes of experiments, ``/lethe/v1/experiments`` for operators and ``/lethe/v1/feedback`` for every key."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from pydantic import Field, RootModel, ValidationError

from guards.forget_set import Frozen, describe_validation
from serve.control.control import Control
from serve.experiment import Experiment, ExperimentOrder, InvalidExperiment, parse_experiment
from serve.experiments.live import LiveExperiments
from serve.experiments.measurements import Measurements
from serve.experiments.report import report
from serve.experiments.store import Experiments
from serve.http.admin_routes import OurRoute, read_object
from serve.http.contract import (
    ERRORS,
    DeletedAnswer,
    ExperimentAnswer,
    ExperimentMade,
    ExperimentsAnswer,
    FeedbackAnswer,
    ReportAnswer,
    takes,
)
from serve.http.rules import ADMIN_PREFIX
from serve.registry.records import now

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")


class Feedback(Frozen):
    """The body of ``POST /lethe/v1/feedback``."""

    request_id: str = Field(min_length=1, max_length=200, description="an answer's x-request-id, or its id")
    thumb: Literal["up", "down"]


class Weights(RootModel[dict[str, float]]):
    """The body of a change of weights: arm -> weight."""


def attach(
    app: FastAPI, control: Control, experiments: Experiments, measurements: Measurements, live: LiveExperiments
) -> APIRouter:
    """Add the routes to vLLM's app. Returns them."""
    router = APIRouter(prefix=ADMIN_PREFIX, route_class=OurRoute, tags=["experiments"], responses=ERRORS)

    def actor(request: Request) -> str:
        return str(request.scope["lethe.caller"].name)

    @router.get("/experiments", response_model=ExperimentsAnswer)
    async def list_experiments() -> dict[str, Any]:
        found = await asyncio.to_thread(experiments.all)
        return {"data": [_described(each) for each in found], "revision": control.snapshot.revision}

    @router.post("/experiments", status_code=201, response_model=ExperimentMade, openapi_extra=takes(ExperimentOrder))
    async def create_experiment(request: Request) -> dict[str, Any]:
        order = parse_experiment(await read_object(request))
        created = await asyncio.to_thread(experiments.create, order, actor=actor(request))
        revision = await control.refresh()
        return {**_described(created), "revision": revision, "notes": _notes(created)}

    @router.get("/experiments/{name}", response_model=ReportAnswer)
    async def show_experiment(name: str) -> dict[str, Any]:
        experiment = await asyncio.to_thread(experiments.get, name)
        await live.settle()
        figures = await asyncio.to_thread(measurements.figures, experiment.id, experiment.epoch)
        changes = await asyncio.to_thread(experiments.changes_since, experiment)
        return report(experiment, figures, changes=changes, at=now())

    @router.put("/experiments/{name}/weights", response_model=ExperimentAnswer, openapi_extra=takes(Weights))
    async def reweigh_experiment(name: str, request: Request) -> dict[str, Any]:
        weights = await read_object(request)
        if not weights or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in weights.values()):
            raise InvalidExperiment('the body must be {"ARM": WEIGHT, ...}, weights being numbers')
        changed = await asyncio.to_thread(experiments.reweigh, name, weights, actor=actor(request))
        return {**_described(changed), "revision": await control.refresh()}

    @router.post("/experiments/{name}/stop", response_model=ExperimentAnswer)
    async def stop_experiment(name: str, request: Request) -> dict[str, Any]:
        stopped = await asyncio.to_thread(experiments.stop, name, actor=actor(request))
        return {**_described(stopped), "revision": await control.refresh()}

    @router.delete("/experiments/{name}", response_model=DeletedAnswer)
    async def delete_experiment(name: str, request: Request) -> dict[str, Any]:
        revision = await asyncio.to_thread(experiments.delete, name, actor=actor(request))
        await control.refresh()
        await live.flush()
        await asyncio.to_thread(measurements.keep_only, [each.id for each in await asyncio.to_thread(experiments.all)])
        return {"name": name, "deleted": True, "revision": revision}

    @router.post("/feedback", response_model=FeedbackAnswer, openapi_extra=takes(Feedback))
    async def give_feedback(request: Request) -> dict[str, Any]:
        try:
            feedback = Feedback.model_validate(await read_object(request))
        except ValidationError as error:
            raise InvalidExperiment("; ".join(describe_validation(error))) from None
        await live.flush()
        found = _REQUEST_ID.search(feedback.request_id)  # also inside of "chatcmpl-..."
        request_id = feedback.request_id if found is None else found[0]
        await asyncio.to_thread(measurements.rate, request_id, float(feedback.thumb == "up"), caller=actor(request))
        return {"request_id": request_id, "thumb": feedback.thumb}

    app.include_router(router)
    return router


def _described(experiment: Experiment) -> dict[str, Any]:
    return {
        **experiment.order.model_dump(mode="json", exclude={"salt", "arms"}),
        "arms": [arm.model_dump() | {"weight": experiment.weights[arm.name]} for arm in experiment.order.arms],
        "created_at": experiment.created_at,
        "stopped_at": experiment.stopped_at,
    }


def _notes(experiment: Experiment) -> list[str]:
    """What whoever creates it may not expect."""
    notes = []
    if experiment.order.mode != "shadow" and experiment.order.unit != "key":
        notes.append(
            "callers say what unit they are, so they can look for another arm, and whoever compares arms sees what a set keeps "
            "secret; unit 'key' is the one that they cannot choose"
        )
    if experiment.order.unit == "user":
        notes.append("requests without a user field take no part")
    if experiment.order.unit == "header":
        notes.append(f"requests without a header {experiment.order.header} take no part")
    return notes
