"""The routes of removals that the server carries out by itself, ``/lethe/v1/removals``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError

from guards.errors import InvalidForgetSet
from guards.forget_set import ForgetSet, describe_validation
from serve.control.removals import FILES, RemovalOrder, Removals
from serve.http.admin_routes import As, Column, Force, OurRoute, requested_set
from serve.http.contract import ERRORS, RemovalsAnswer, RemovalShown, takes
from serve.http.rules import ADMIN_PREFIX

Neighbours = Annotated[str, Query(description="another set, whose answers are to stay as they are")]
Goal = Annotated[Literal["forget", "refuse"], Query(description="answers as of a model that never knew, or none")]
Within = Annotated[str, Query(description="how long to look for better guards: 45m, 1h, 90s")]
Against = Annotated[str, Query(description="URL of a server that never knew, in place of the estimate")]
Recall = Annotated[float | None, Query(description="of a model that never knew; estimated from invented names if not given")]


def attach(app: FastAPI, removals: Removals) -> APIRouter:
    """Add the routes to vLLM's app. Returns them."""
    router = APIRouter(prefix=ADMIN_PREFIX, route_class=OurRoute, tags=["removals"], responses=ERRORS)

    async def shown(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(removals.describe, name)

    @router.get("/removals", response_model=RemovalsAnswer)
    async def list_removals() -> dict[str, Any]:
        return {"data": [await shown(name) for name in await asyncio.to_thread(removals.names)]}

    @router.post("/removals", status_code=202, response_model=RemovalShown, openapi_extra=takes(ForgetSet))
    async def remove(
        request: Request,
        name: str | None = None,
        neighbours: Neighbours = "",
        goal: Goal = "forget",
        within: Within = "45m",
        against: Against = "",
        reference: Recall = None,
        force: Force = False,
        column: Column = None,
        kind: As = None,
    ) -> dict[str, Any]:
        """Put a request in force, find the guards that suit it, and write the proof: what `lethe unlearn` does."""
        try:
            order = RemovalOrder(neighbours=neighbours, goal=goal, within=within, against=against, reference=reference, force=force)
        except ValidationError as error:
            raise InvalidForgetSet(describe_validation(error)) from None
        read = await requested_set(request, name, column, kind, force=force)
        await removals.order(read.forget_set, order)
        return await shown(read.forget_set.name)

    @router.get("/removals/{name}", response_model=RemovalShown)
    async def show_removal(name: str) -> dict[str, Any]:
        return await shown(name)

    @router.post("/removals/{name}/stop", response_model=RemovalShown)
    async def stop_removal(name: str) -> dict[str, Any]:
        """Stop for now; the same order again goes on. What is in force stays in force."""
        await shown(name)
        removals.pause(name)
        return await shown(name)

    @router.get("/removals/{name}/{file}", response_class=Response)
    async def read_file(name: str, file: str) -> Response:
        """One of report.html, probes.json, phrases.jsonl, certificate.json."""
        path = await asyncio.to_thread(removals.file, name, file)
        return FileResponse(path, media_type=FILES[file])

    app.include_router(router)
    return router
