"""The admin API, ``/lethe/v1``: forget sets, policies, revision, audit, check. Needs the ``admin`` scope (see admission)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import Field, ValidationError, model_validator
from sse_starlette import EventSourceResponse

from guards.catalogue import GUARDS
from guards.errors import GuardError, InvalidForgetSet, InvalidPolicy, Untrainable
from guards.forget_set import (
    MAX_TEXT_CHARACTERS,
    ForgetSet,
    Frozen,
    describe_validation,
    is_name,
    write_jsonl,
)
from guards.kinds import GuardKind, TrainingOrder, resolve
from guards.policy import DEFAULT, Policy, parse_policy
from guards.removal_list import Kind, RemovalList, check_new_set, read_removal_list
from guards.steering.declaration import Corruption, Method
from guards.strict_json import parse_object
from serve.control.control import Control
from serve.control.gate_fitting import GateOrder
from serve.experiments.measurements import UnknownRequest
from serve.generation.score import ScoreOrder, Scorer
from serve.generation.side_by_side import CompareOrder, SideBySide
from serve.hits import KEPT, HitRequest, RecentHits
from serve.http.contract import (
    ERRORS,
    AuditAnswer,
    CheckAnswer,
    CheckOrder,
    DeletedAnswer,
    ForgetSetAnswer,
    ForgetSetMade,
    ForgetSetsAnswer,
    GuardsAnswer,
    PoliciesAnswer,
    PolicyAnswer,
    PolicyMade,
    RevisionAnswer,
    document,
    takes,
)
from serve.http.rules import ADMIN_PREFIX
from serve.registry.plans import acting_sets, notes
from serve.registry.records import RegistryError, StoredSet, Stripped, UnknownName
from serve.registry.store import Registry
from serve.sqlite import StorageFault

JSON_LINES = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
TABLES = ("text/csv", "text/tab-separated-values")
Force = Annotated[bool, Query(description="add also what nobody is likely to mean, such as the phrase 'the'")]
Column = Annotated[str | None, Query(description="of a CSV file, the column to read")]
As = Annotated[Kind | None, Query(alias="as", description="what the cells of the column, or the lines of a plain list, are")]


class CalibrationBody(Frozen):
    """The strength that suits a set, and why."""

    strength: float = Field(ge=0, description='0 = this is not to act on the set, where a policy says "calibrated"')
    corrupt: Corruption | None = Field(None, description="the kind of corruption whose strength it is")
    steering: Method | None = Field(None, description="the method of steering whose strength it is; without either: contrast")
    plausibility: float | None = Field(None, gt=0, le=1, description="contrast's, where another than 0.006 suits the set")
    measured: str | None = Field(None, description="fingerprint of the artifact (for corruption, of the vectors) that was measured")
    evidence: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_strength(self) -> CalibrationBody:
        if self.corrupt is not None and self.steering is not None:
            raise ValueError("corrupt and steering are two strengths; put one after the other")
        if self.plausibility is not None and (self.corrupt or self.steering) is not None:
            raise ValueError(f"plausibility is contrast's, not that of {self.corrupt or self.steering}; leave it out")
        most = 100 if self.corrupt is None else 1_000 if self.corrupt == "rand_noise_first_n" else 1
        if self.strength > most:
            raise ValueError(f"strength is {self.strength:g}, of {self.corrupt or self.steering or 'contrast'} at most {most}")
        return self


class OurRoute(APIRoute):
    """Turns our errors into OpenAI error envelopes, on our routes only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except (GuardError, RegistryError, StorageFault) as error:
                status = error.status
                body: dict[str, Any] = {"message": str(error), "type": type(error).__name__, "param": None, "code": status}
                if isinstance(error, InvalidForgetSet):
                    body["problems"] = error.problems
                return JSONResponse({"error": body}, status_code=status)

        return handle_errors


def attach(
    app: FastAPI,
    control: Control,
    registry: Registry,
    scorer: Scorer,
    side_by_side: SideBySide,
    hits: RecentHits,
    more: Sequence[APIRouter] = (),
    unable: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add the admin routes to vLLM's app.

    Args:
        more: other routers that the OpenAPI document describes.
        unable: guards that cannot act on the served model, and why.
    """
    router = APIRouter(prefix=ADMIN_PREFIX, route_class=OurRoute, tags=["forget sets and policies"], responses=ERRORS)

    def actor(request: Request) -> str:
        return str(request.scope["lethe.caller"].name)

    @router.get("/forget_sets", response_model=ForgetSetsAnswer)
    async def list_forget_sets() -> dict[str, Any]:
        sets = await asyncio.to_thread(registry.forget_sets)
        described = [{**_describe(stored), "training": control.training(stored.name)} for stored in sets]
        return {"data": described, "revision": control.snapshot.revision}

    @router.post("/forget_sets", status_code=201, response_model=ForgetSetMade, openapi_extra=takes(ForgetSet))
    async def create_forget_set(
        request: Request, name: str | None = None, force: Force = False, column: Column = None, kind: As = None
    ) -> dict[str, Any]:
        read = await requested_set(request, name, column, kind, force=force)
        revision = await control.create(read.forget_set, actor=actor(request))
        return {**await _shown(read.forget_set.name, revision), "notes": read.notes}

    @router.get("/forget_sets/{name}", response_model=ForgetSetAnswer)
    async def show_forget_set(name: str, request: Request) -> Response:
        try:
            content = await asyncio.to_thread(registry.content, name)
        except Stripped:
            return JSONResponse(await _shown(name, control.snapshot.revision))
        if any(kind in request.headers.get("accept", "") for kind in JSON_LINES):
            return PlainTextResponse(write_jsonl(content), media_type=JSON_LINES[0])
        shown = await _shown(name, control.snapshot.revision)
        return JSONResponse({**shown, "content": content.model_dump(mode="json", exclude={"name"})})

    @router.put("/forget_sets/{name}", response_model=ForgetSetMade, openapi_extra=takes(ForgetSet))
    async def replace_forget_set(
        name: str, request: Request, force: Force = False, column: Column = None, kind: As = None
    ) -> dict[str, Any]:
        read = await requested_set(request, name, column, kind, force=force)
        return {**await _shown(name, await control.replace(read.forget_set, actor=actor(request))), "notes": read.notes}

    @router.delete("/forget_sets/{name}", response_model=DeletedAnswer)
    async def delete_forget_set(name: str, request: Request) -> dict[str, Any]:
        return {"name": name, "deleted": True, "revision": await control.delete(name, actor=actor(request))}

    @router.post("/forget_sets/{name}/enable", response_model=ForgetSetAnswer)
    async def enable_forget_set(name: str, request: Request) -> dict[str, Any]:
        return await _shown(name, await control.enable(name, actor=actor(request)))

    @router.post("/forget_sets/{name}/disable", response_model=ForgetSetAnswer)
    async def disable_forget_set(name: str, request: Request) -> dict[str, Any]:
        return await _shown(name, await control.disable(name, actor=actor(request)))

    @router.post("/forget_sets/{name}/strip", response_model=ForgetSetAnswer)
    async def strip_forget_set(name: str, request: Request) -> dict[str, Any]:
        return await _shown(name, await control.strip(name, actor=actor(request)))

    def add_training(kind: GuardKind, route: str, order_type: type[TrainingOrder]) -> None:
        """A route that starts training what a guard acts by."""

        async def train(name: str, request: Request) -> dict[str, Any]:
            fields = await read_object(request) if await request.body() else {}
            try:
                order = order_type.model_validate(fields)
            except ValidationError as error:
                raise Untrainable("; ".join(describe_validation(error))) from None
            await control.train(kind, name, order)
            return await _shown(name, control.snapshot.revision)

        required = any(field.is_required() for field in order_type.model_fields.values())
        router.add_api_route(
            f"/forget_sets/{{name}}/{route}",
            train,
            methods=["POST"],
            status_code=202,
            name=f"train_{route}",
            description=f"Train what {kind.name} acts by.",
            response_model=ForgetSetAnswer,
            openapi_extra=takes(order_type, required=required),
        )

    for kind in GUARDS.values():
        if kind.training is not None:
            add_training(kind, kind.training.route, resolve(kind.training.order))

    @router.post("/forget_sets/{name}/assistant/pause", response_model=ForgetSetAnswer)
    async def pause_training(name: str) -> dict[str, Any]:
        await control.pause_training(name)
        return await _shown(name, control.snapshot.revision)

    @router.put("/forget_sets/{name}/calibration", response_model=ForgetSetAnswer, openapi_extra=takes(CalibrationBody))
    async def put_calibration(name: str, request: Request) -> dict[str, Any]:
        try:
            found = CalibrationBody.model_validate(await read_object(request))
        except ValidationError as error:
            raise InvalidPolicy("; ".join(describe_validation(error))) from None
        of = found.model_dump(include={"corrupt", "steering", "plausibility", "measured"})
        return await _shown(name, await control.put_calibration(name, found.strength, found.evidence, actor=actor(request), **of))

    @router.put("/forget_sets/{name}/gate", response_model=ForgetSetAnswer, openapi_extra=takes(GateOrder, required=False))
    async def fit_gate(name: str, request: Request) -> dict[str, Any]:
        try:
            order = GateOrder.model_validate(await read_object(request) if await request.body() else {})
        except ValidationError as error:
            raise InvalidPolicy("; ".join(describe_validation(error))) from None
        return await _shown(name, await control.fit_gate(name, order, actor=actor(request)))

    @router.get("/policies", response_model=PoliciesAnswer)
    async def list_policies() -> dict[str, Any]:
        policies = control.snapshot.policies.values()
        return {"data": [policy.model_dump(mode="json") for policy in policies], "revision": control.snapshot.revision}

    @router.get("/guards", response_model=GuardsAnswer)
    async def list_guards() -> dict[str, Any]:
        shown = [
            {
                "name": kind.name,
                "summary": kind.summary,
                "acts_on": kind.acts_on,
                "on_by_default": kind.default is not None,
                "several": kind.many,
                "unable": unable.get(kind.name),
                "artifacts": [] if kind.files is None else list(kind.files.kinds),
                "settings": kind.config.model_json_schema(),
            }
            for kind in GUARDS.values()
        ]
        return {"data": shown}

    @router.get("/policies/{name}", response_model=PolicyAnswer)
    async def show_policy(name: str) -> dict[str, Any]:
        snapshot = control.snapshot
        if name not in snapshot.policies:
            raise UnknownName(f"there is no policy {name!r}; there are {', '.join(sorted(snapshot.policies))}")
        return {**snapshot.policies[name].model_dump(mode="json"), "revision": snapshot.revision}

    @router.put("/policies/{name}", response_model=PolicyMade, openapi_extra=takes(Policy))
    async def put_policy(name: str, request: Request) -> dict[str, Any]:
        policy = parse_policy({**_without(await read_object(request), "name", name), "name": name})
        revision = await control.put_policy(policy, actor=actor(request))
        return {**policy.model_dump(mode="json"), "revision": revision, "notes": notes(policy, control.snapshot.sets)}

    @router.delete("/policies/{name}", response_model=DeletedAnswer)
    async def delete_policy(name: str, request: Request) -> dict[str, Any]:
        return {"name": name, "deleted": True, "revision": await control.delete_policy(name, actor=actor(request))}

    @router.get("/revision", response_model=RevisionAnswer)
    async def show_revision() -> dict[str, Any]:
        snapshot = control.snapshot
        return {
            "revision": snapshot.revision,
            "prompt_date": date.today().isoformat() if app.state.lethe_dated_prompts else None,
            "fault": control.in_force.fault,
            "enabled": sorted(snapshot.sets),
            "policies": {name: acting_sets(each, snapshot.sets) for name, each in sorted(snapshot.policies.items())},
        }

    @router.get("/audit", response_model=AuditAnswer)
    async def show_audit(
        after: Annotated[int, Query(ge=0, le=2**53)] = 0, limit: Annotated[int, Query(ge=1, le=1_000)] = 100
    ) -> dict[str, Any]:
        rows = await asyncio.to_thread(registry.audit, after=after, limit=limit)
        broken = await asyncio.to_thread(registry.first_broken_audit_row)
        return {"data": [asdict(row) for row in rows], "intact": broken is None, "first_broken": broken}

    @router.post("/check", response_model=CheckAnswer, openapi_extra=takes(CheckOrder))
    async def check(request: Request) -> dict[str, Any]:
        fields = await read_object(request)
        text, policy = fields.get("text"), fields.get("policy", DEFAULT)
        if not isinstance(text, str) or not isinstance(policy, str) or fields.keys() - {"text", "policy"}:
            raise InvalidPolicy('the body must be {"text": "...", "policy": "..."}, policy being optional')
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidPolicy(f"text has {len(text):,} characters, at most {MAX_TEXT_CHARACTERS:,} are checked at once; split it")
        hits = await control.check(text, policy)
        return {"revision": control.snapshot.revision, "policy": policy, "hits": [asdict(hit) for hit in hits]}

    @router.get("/requests/{request_id}", response_model=HitRequest)
    async def show_request(request_id: str) -> HitRequest:
        found = hits.get(request_id)
        if found is None:
            raise UnknownRequest(
                f"no guard hit a request {request_id!r} of the last {KEPT:,} that one hit since the server started; "
                "take the id from the answer's x-request-id header"
            )
        return found

    @router.post("/score", openapi_extra=takes(ScoreOrder))
    async def score(request: Request) -> dict[str, Any]:
        try:
            order = ScoreOrder.model_validate(await read_object(request))
        except ValidationError as error:
            raise InvalidPolicy("; ".join(describe_validation(error))) from None
        scoring = asyncio.create_task(scorer.score(order, request.scope["lethe.caller"]))
        try:
            while not (await asyncio.wait([scoring], timeout=1))[0]:
                if await request.is_disconnected():  # hundreds of answers are not worked out for nobody
                    raise InvalidPolicy("the client went away before everything was scored")
            scores = await scoring
        finally:
            scoring.cancel()
        return {"revision": control.snapshot.revision, "policy": order.policy, "scores": scores}

    @router.post("/compare", openapi_extra=takes(CompareOrder))
    async def compare(request: Request) -> Response:
        try:
            order = CompareOrder.model_validate(await read_object(request))
        except ValidationError as error:
            raise InvalidPolicy("; ".join(describe_validation(error))) from None
        side_by_side.check(order)
        events = side_by_side.events(order, request.scope["lethe.caller"])
        if order.stream:
            return EventSourceResponse(({"event": kind, "data": json.dumps(fields)} async for kind, fields in events), sep="\n")
        async for kind, fields in events:
            if kind == "done":
                return JSONResponse(fields)
        raise AssertionError("a comparison ends with everything")

    async def _shown(name: str, revision: int) -> dict[str, Any]:
        stored = await asyncio.to_thread(registry.forget_set, name)
        return {**_describe(stored), "training": control.training(name), "revision": revision}

    @router.get("/openapi.json", include_in_schema=False)
    async def show_contract() -> dict[str, Any]:
        return document([router, *more], metadata.version("lethe"))

    app.include_router(router)


def _describe(stored: StoredSet) -> dict[str, Any]:
    return {
        "name": stored.name,
        "enabled": stored.enabled,
        "enabled_at": stored.enabled_at,
        "created_at": stored.created_at,
        "updated_at": stored.updated_at,
        **stored.header,
        "artifacts": [asdict(artifact) for artifact in stored.artifacts],
    }


async def requested_set(request: Request, name: str | None, column: str | None, kind: Kind | None, *, force: bool) -> RemovalList:
    """The set in a body: a JSON object; or, with the name in the URL, a file of another form (see `guards.removal_list`)."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip()
    if content_type in (*JSON_LINES, *TABLES) or column is not None or kind is not None:
        if name is None or not is_name(name):
            raise InvalidForgetSet([f"name {name!r} must be 1 to 63 of a-z, 0-9, _ and -, in the URL: ?name=..."])
        return await asyncio.to_thread(read_removal_list, await request.body(), name, column=column, kind=kind, force=force)
    fields = await read_object(request)
    if name is not None:
        fields = {**_without(fields, "name", name), "name": name}
    return await asyncio.to_thread(check_new_set, fields, force=force)


async def read_object(request: Request) -> dict[str, Any]:
    """A body that is one JSON object. Raises InvalidJson."""
    return parse_object(await request.body())


def _without(fields: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    """``fields`` without ``key``, which may be there only with the value that the URL gives it."""
    if fields.get(key, value) != value:
        raise InvalidForgetSet([f"{key} {fields[key]!r} in the body differs from {value!r} in the URL; drop one of them"])
    return {name: content for name, content in fields.items() if name != key}
