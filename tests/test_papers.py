"""The documents say what is so: commands, variables, routes and files that they name exist, and all of them are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from guards.catalogue import OWN
from serve.cli import app
from serve.settings import Settings

ROOT = Path(__file__).parents[1]
PAPERS = ("README.md", "guards/README.md", "serve/README.md", "deploy/README.md", "tests/bench/README.md")
TEXTS = {paper: (ROOT / paper).read_text("utf-8") for paper in PAPERS}
EVERYTHING = "\n".join(TEXTS.values())
COMMAND = re.compile(r"(?:`|^|\$\(|; |&& |bin/)lethe ([a-z]+)(?: ([a-z]+))?(?=[ `\n;)])", re.MULTILINE)
VARIABLE = re.compile(r"(?<![A-Z_])(?:LETHE_|…_)([A-Z]+(?:_[A-Z]+)*)\b")
NOT_SETTINGS = {"PYTHON"}
"""Of the install script."""


def commands() -> dict[str, set[str]]:
    """Every command, with its subcommands."""
    group = typer.main.get_command(app)
    return {name: set(getattr(command, "commands", {})) for name, command in group.commands.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("paper", PAPERS)
def test_commands_that_a_document_names_exist(paper: str) -> None:
    known = commands()
    for name, sub in COMMAND.findall(TEXTS[paper]):
        assert name in known, f"lethe {name}"
        assert not known[name] or not sub or sub in known[name], f"lethe {name} {sub}"


def test_every_command_is_documented() -> None:
    for name, subs in commands().items():
        assert re.search(rf"lethe {name}\b", EVERYTHING), name
        for sub in subs:
            assert re.search(rf"lethe {name} {sub}\b|`{sub}\b", EVERYTHING), f"{name} {sub}"


def test_every_setting_is_documented_and_no_other() -> None:
    known = {name.upper() for name in Settings.model_fields}
    named = set(VARIABLE.findall(TEXTS["deploy/README.md"]))
    for name in named - NOT_SETTINGS:
        assert any(each == name or each.endswith("_" + name) for each in known), f"LETHE_{name}"
    for name in known:
        assert any(name == each or name.endswith("_" + each) for each in named), f"LETHE_{name}"


@pytest.mark.parametrize("paper", PAPERS)
def test_files_that_a_document_names_exist(paper: str) -> None:
    place = (ROOT / paper).parent
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[paper]):
        assert (place / link).exists(), link
    for file in re.findall(r"`((?:guards|serve|tests|deploy)/[\w./-]+)`", TEXTS[paper]):
        assert (ROOT / file).exists(), file


def test_every_admin_route_is_documented() -> None:
    documented = re.sub(r"{\w+}", "{}", TEXTS["serve/README.md"])
    for module in ("admin_routes.py", "experiment_routes.py", "removal_routes.py"):
        source = (ROOT / "serve" / "http" / module).read_text("utf-8")
        for path in re.findall(r'@router\.\w+\("(/[\w/{}]+)"', source):
            full = re.sub(r"{\w+}", "{}", path)
            assert full in documented or re.sub(r"^/(forget_sets|experiments|removals)/{}", "", full) in documented, path


def test_every_guard_and_every_setting_of_it_is_documented() -> None:
    rows: dict[str, str] = {}
    for name, row in re.findall(r"^\| `(\w+)` \|(.*)\|$", TEXTS["guards/README.md"], re.MULTILINE):
        rows.setdefault(name, row)
    for kind in OWN:
        assert kind.acts_on in rows[kind.name], kind.name
        settings = {name for name in kind.config.model_fields if name != "enabled"}
        assert settings == set(re.findall(r"`(\w+)`", rows[kind.name])) - {"enabled"}, kind.name


def test_every_metric_is_documented_with_its_labels() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "serve").rglob("*.py"))
    metrics = re.findall(r"(?:Counter|Gauge|Histogram)\(\s*\"(lethe_\w+)\",\s*\"[^\"]*\"(?:,\s*(\[[^]]*\]))?", source)
    assert len(metrics) > 15
    rows = [line for line in TEXTS["deploy/README.md"].splitlines() if line.startswith("| `lethe_")]
    for name, labels in metrics:
        [row] = [line for line in rows if f"`{name}`" in line]
        assert set(re.findall(r"\w+", labels)) <= set(re.findall(r"`(\w+)`", row)), name


def test_the_readme_is_one_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 120
