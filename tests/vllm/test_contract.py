"""What the running admin API answers is what its OpenAPI document says."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest


@pytest.fixture(scope="module")
def document(admin: httpx.Client) -> dict[str, Any]:
    return dict(admin.get("/openapi.json").json())


def test_answers_and_errors_are_what_the_document_says(admin: httpx.Client, document: dict[str, Any]) -> None:
    def ask(method: str, path: str, status: int, body: Any = None, **names: str) -> Any:
        answer = admin.request(method, path.format(**names), json=body)
        assert answer.status_code == status, answer.text
        described = document["paths"]["/lethe/v1" + path][method.lower()]["responses"][str(status)]
        schema = described["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
        return answer.json()

    one = {"name": "agreed"}
    ask("POST", "/forget_sets", 201, {"name": "agreed", "phrases": ["Phineas Nigellus"], "aliases": ["Black"]})
    ask("POST", "/forget_sets", 409, {"name": "agreed", "phrases": ["Phineas Nigellus"]})
    ask("POST", "/forget_sets", 400, {"name": "Not A Name", "phrases": [""]})
    try:
        ask("GET", "/forget_sets", 200)
        ask("GET", "/forget_sets/{name}", 200, **one)
        ask("GET", "/forget_sets/{name}", 404, name="nobody")
        ask("PUT", "/forget_sets/{name}", 200, {"phrases": ["Phineas Nigellus", "Sirius"]}, **one)
        ask("POST", "/forget_sets/{name}/enable", 200, **one)
        ask("GET", "/revision", 200)
        ask("POST", "/check", 200, {"text": "Who was Phineas Nigellus?"})
        ask("POST", "/check", 400, {"text": 1})
        ask("POST", "/forget_sets/{name}/disable", 200, **one)
        ask("PUT", "/policies/{name}", 200, {"guards": {"gate": "similarity"}}, **one)
        ask("GET", "/policies", 200)
        ask("GET", "/policies/{name}", 200, **one)
        ask(
            "POST",
            "/experiments",
            201,
            {"name": "agreed", "arms": [{"name": "a", "policy": "default"}, {"name": "b", "policy": "agreed"}]},
        )
        ask("GET", "/experiments", 200)
        ask("GET", "/experiments/{name}", 200, **one)
        ask("PUT", "/experiments/{name}/weights", 200, {"a": 2}, **one)
        ask("POST", "/experiments/{name}/stop", 200, **one)
        ask("DELETE", "/experiments/{name}", 200, **one)
        ask("GET", "/requests/{request_id}", 404, request_id="nobody")
        ask("GET", "/audit", 200)
        ask("DELETE", "/policies/{name}", 200, **one)
    finally:
        ask("DELETE", "/forget_sets/{name}", 200, **one)
