"""The dashboard and the alert rules name metrics and labels that the server really exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.vllm.asking import text
from tests.vllm.conftest import Server

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "dashboards"
_METRIC = re.compile(r"\b(lethe_\w+|vllm:\w+)(?:\{([^}]*)\})?")
_BY = re.compile(r"(?:by|ignoring) \(([^)]*)\)")


def expressions() -> Iterator[str]:
    for panel in json.loads((DASHBOARDS / "lethe.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.fixture(scope="module")
def exported(server: Server, client: openai.OpenAI) -> dict[str, Any]:
    """Family -> its labels, as far as they have been seen."""
    text(client, "Hello", max_tokens=2)
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {family.name: family for family in families}


def family_of(metric: str) -> str:
    return re.sub(r"_(total|bucket|count|sum)$", "", metric)


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_metric_of_an_expression_is_exported(expression: str, exported: dict[str, Any]) -> None:
    named = [match[1] for match in _METRIC.finditer(expression)]
    assert named, expression
    for metric in named:
        family = exported.get(family_of(metric)) or exported.get(metric)
        assert family is not None, f"{metric} is not exported"
        if metric.endswith("_total"):
            assert family.type == "counter"
        if metric.endswith("_bucket"):
            assert family.type == "histogram"


def test_every_label_of_an_expression_is_one_of_its_metrics() -> None:
    """Labels show only once a series exists, so they are checked where they are declared."""
    from serve.control import in_force, similarity
    from serve.experiments import live, shadow
    from serve.generation import client as choke
    from serve.generation import gate, stream, workers

    declared: dict[str, set[str]] = {}
    for module in (in_force, live, shadow, similarity, choke, gate, stream, workers):
        for value in vars(module).values():
            if hasattr(value, "_labelnames") and hasattr(value, "_name"):
                declared[value._name] = {*value._labelnames, "le"}
    for expression in expressions():
        named = [match for match in _METRIC.finditer(expression) if match[1].startswith("lethe_")]
        allowed = set().union(*(declared[family_of(match[1])] for match in named)) if named else set()
        for match in named:
            chosen = {part.split("=")[0].rstrip("!~ ").strip() for part in (match[2] or "").split(",") if part}
            assert chosen <= declared[family_of(match[1])], expression
        for grouped in _BY.findall(expression):
            assert {label.strip() for label in grouped.split(",")} <= allowed, expression


def test_panels_show_labels_that_their_expressions_keep() -> None:
    for panel in json.loads((DASHBOARDS / "lethe.json").read_text())["panels"]:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {label.strip() for grouped in _BY.findall(target["expr"]) for label in grouped.split(",")}
            assert shown <= kept, panel["title"]
