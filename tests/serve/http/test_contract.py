"""The OpenAPI document of the admin API is one, and describes every route."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from serve.http.contract import EXAMPLES


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    from fastapi import FastAPI

    from serve.http import admin_routes, experiment_routes

    app, nothing = FastAPI(), Any
    more = experiment_routes.attach(app, nothing, nothing, nothing, nothing)  # type: ignore[arg-type]
    admin_routes.attach(app, nothing, nothing, nothing, nothing, nothing, [more])  # type: ignore[arg-type]
    show = next(route for route in app.routes if getattr(route, "path", "") == "/lethe/v1/openapi.json")
    return asyncio.run(show.endpoint())  # type: ignore[attr-defined]


def test_every_reference_is_defined_and_every_route_says_what_it_answers_and_takes(described: dict[str, Any]) -> None:
    text = json.dumps(described)
    defined = described["components"]["schemas"]
    for name in set(re.findall(r'"#/components/schemas/([^"]+)"', text)):
        assert name in defined, name
    assert len(described["paths"]) >= 20
    for path, methods in described["paths"].items():
        assert path.startswith("/lethe/v1/")
        for method, route in methods.items():
            assert "404" in route["responses"], path
            if method in ("put", "post") and not re.search(r"/(enable|disable|strip|pause|stop)$", path):
                assert "requestBody" in route, (method, path)


def test_examples_are_what_they_are_examples_of() -> None:
    for model, example in EXAMPLES.items():
        known = {"name": "x"} if "name" in model.model_fields else {}
        model.model_validate({**known, **example})
