"""The contract of the admin API: what every route of ``/lethe/v1`` answers, and what it takes, as models for the OpenAPI document.

The routes parse bodies themselves, since a forget set may come as a file of several forms; the document describes the JSON form.
Answers may hold more fields than are described: a client must pass over what it does not know.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

from guards.forget_set import ForgetSet
from guards.policy import Policy
from serve.experiment import ExperimentOrder
from serve.hits import Hit

Revision = Field(description="the registry's revision from which this holds: the number of changes so far")


class Answer(BaseModel):
    """An answer of the admin API."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(Answer):
    """What was wrong: the value, the rule, the fix."""

    message: str
    type: str
    param: str | None = None
    code: int
    problems: list[str] | None = Field(None, description="of a forget set: one sentence for each bad line")


class ErrorAnswer(Answer):
    """Every error, in OpenAI's envelope."""

    error: ErrorDetail


class ArtifactShown(Answer):
    """One file made from a set, or what was measured for it."""

    kind: str
    fingerprint: str
    status: Literal["building", "ready", "failed"]
    detail: str
    updated_at: str


class ForgetSetShown(Answer):
    """A forget set without its entries."""

    name: str
    enabled: bool
    enabled_at: str | None = Field(description="since when it is in force, UTC")
    created_at: str
    updated_at: str
    fingerprint: str = Field(description="sha256 of its content")
    description: str
    phrases: int
    aliases: int
    questions: int
    texts: int
    requester: str
    legal_basis: str
    expires_at: str | None
    artifacts: list[ArtifactShown]
    training: dict[str, Any] | None = Field(None, description="status waiting, running or failed; null if none is under way")


class ForgetSetAnswer(ForgetSetShown):
    revision: int = Revision


class ForgetSetMade(ForgetSetAnswer):
    notes: list[str] = Field([], description="of a new set: what was left out of the file, phrases that occur in ordinary text")


class ForgetSetsAnswer(Answer):
    data: list[ForgetSetShown]
    revision: int = Revision


class DeletedAnswer(Answer):
    name: str
    deleted: Literal[True]
    revision: int | None = None


class PolicyShown(Answer):
    name: str
    description: str
    forget_sets: Literal["enabled"] | list[str]
    guards: dict[str, Any]
    refusal: str


class GuardShown(Answer):
    """A guard that policies may name."""

    name: str = Field(description="its field in a policy's `guards`")
    summary: str
    acts_on: str
    on_by_default: bool
    several: bool = Field(description="a policy may hold several of it, as a list")
    unable: str | None = Field(description="why it cannot act on the served model; null if it can")
    artifacts: list[str] = Field(description="kinds of artifacts that it acts by")
    settings: dict[str, Any] = Field(description="JSON schema of its settings")


class GuardsAnswer(Answer):
    """Every guard of this server, in the order in which a request meets them."""

    data: list[GuardShown]


class PolicyAnswer(PolicyShown):
    revision: int = Revision


class PolicyMade(PolicyAnswer):
    notes: list[str] = Field([], description="what the policy does not do and its author may expect")


class PoliciesAnswer(Answer):
    data: list[PolicyShown]
    revision: int = Revision


class RevisionAnswer(Answer):
    revision: int = Revision
    enabled: list[str] = Field(description="forget sets in force")
    policies: dict[str, list[str]] = Field(description="policy -> the sets that it applies")
    fault: str | None = Field(description="why the registry cannot be read, while it cannot; what is in force stays so")
    prompt_date: str | None = Field(description="the date that the chat template writes into prompts, if it does")


class AuditRowShown(Answer):
    revision: int
    at: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    previous: str
    hash: str


class AuditAnswer(Answer):
    data: list[AuditRowShown]
    intact: bool
    first_broken: int | None


class CheckAnswer(Answer):
    revision: int = Revision
    policy: str
    hits: list[Hit]


class ExperimentShown(Answer):
    name: str
    unit: str
    mode: str
    arms: list[dict[str, Any]]
    created_at: str
    stopped_at: str | None


class ExperimentAnswer(ExperimentShown):
    revision: int = Revision


class ExperimentMade(ExperimentAnswer):
    notes: list[str] = []


class ExperimentsAnswer(Answer):
    data: list[ExperimentShown]
    revision: int = Revision


class ReportAnswer(Answer):
    experiment: dict[str, Any]
    arms: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    sample_ratio: dict[str, Any]
    verdict: list[str]


class RemovalShown(Answer):
    """A removal that the server carries out."""

    name: str
    status: Literal["waiting", "running", "failed", "done"]
    reason: str | None = Field(description="why it failed or was stopped")
    order: dict[str, Any]
    doing: str
    told: list[str] = Field(description="what has been found so far, a sentence each")
    answers: int = Field(description="asked for so far")
    certificate: dict[str, Any] | None = Field(description="the proof, once it is done")


class RemovalsAnswer(Answer):
    data: list[RemovalShown]


class FeedbackAnswer(Answer):
    request_id: str
    thumb: Literal["up", "down"]


class CheckOrder(BaseModel):
    """The body of ``POST /check``."""

    text: str
    policy: str = "default"


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": what}
    for status, what in {
        400: "the body, a field or a name is not as it must be",
        401: "a key is needed, or this one is none",
        403: "the key's scope does not allow it",
        404: "there is nothing of that name",
        409: "it cannot be done now: something is missing, in use, or there already",
        503: "the registry or a guard is not available; what is in force stays in force",
    }.items()
}
EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    ForgetSet: {
        "name": "harry-potter",
        "phrases": ["Harry Potter", "Hogwarts"],
        "requester": "J. Doe",
        "legal_basis": "GDPR Art. 17",
    },
    Policy: {"forget_sets": "enabled", "guards": {"gate": "similarity", "stream": {"on_hit": "redact"}}},
    CheckOrder: {"text": "Who is Harry Potter?"},
    ExperimentOrder: {"name": "strict", "arms": [{"name": "now", "policy": "default"}, {"name": "strict", "policy": "strict"}]},
}


_definitions: dict[str, Any] = {}
"""Schemas that bodies refer to."""


def takes(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """What a route's ``openapi_extra`` says of its body."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    _definitions.update(schema.pop("$defs", {}))
    content: dict[str, Any] = {"schema": schema}
    if model in EXAMPLES:
        content["example"] = EXAMPLES[model]
    return {"requestBody": {"required": required, "content": {"application/json": content}}}


def document(routers: list[APIRouter], version: str) -> dict[str, Any]:
    """The OpenAPI document of our routes."""
    made = get_openapi(
        title="lethe",
        version=version,
        description="Forget sets, policies, experiments, what is in force. Every change returns the revision from which it holds.",
        routes=[route for router in routers for route in router.routes],
    )
    made["components"]["schemas"] |= _definitions
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    made["security"] = [{"key": []}]
    return made
