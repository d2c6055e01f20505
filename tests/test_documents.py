"""What the documents show exists: commands parse, flags and files are there."""

import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from infra.manifests import INFRA, PROJECT, ROOT, SETTINGS, split_command

import pipeline
from pipeline.cli import parse_settings
from pipeline.records import STATUSES, Layout, Space, part_schema

DOCUMENTS = [ROOT / "README.md", INFRA / "README.md"]
LINKED = [*DOCUMENTS, ROOT / "pipeline" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]


def list_commands(path: Path) -> list[str]:
    """Return the jobs' commands in the shell blocks of a document."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    jobs = re.compile(r"(?:python jobs/\w+\.py|image-(?:embed|index|nightly|search|serve)) .*")
    return [match[0] for line in lines if (match := jobs.search(line)) and "…" not in match[0]]


def list_flags(settings_class: type) -> set[str]:
    hints = get_type_hints(settings_class)
    nested = [hints[item.name] for item in fields(settings_class) if is_dataclass(hints[item.name])]
    own = {f"--{item.name.replace('_', '-')}" for item in fields(settings_class)}
    return own.union(*(list_flags(kind) for kind in nested))


@pytest.mark.parametrize("path", DOCUMENTS, ids=["README", "infra"])
def test_every_command_parses_with_the_settings_of_its_job(path: Path) -> None:
    commands = list_commands(path)
    assert commands
    for command in commands:
        script, flags = split_command(command)
        assert script in PROJECT["scripts"]
        parse_settings(SETTINGS[script], ["--k" if flag == "-k" else flag for flag in flags])


@pytest.mark.parametrize("path", DOCUMENTS, ids=["README", "infra"])
def test_every_flag_that_is_named_is_a_flag(path: Path) -> None:
    named = set(re.findall(r"`(--[a-z][a-z0-9-]+)", path.read_text()))
    known = set().union(*(list_flags(kind) for kind in SETTINGS.values()))
    assert named - known <= {"--help", "--config", "--check", "--json", "--print-completion"}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_that_is_named_is_there(path: Path) -> None:
    text = path.read_text()
    linked = {path.parent / link for link in re.findall(r"\]\(([^)#:]+)[)#]", text)}
    named = {ROOT / name for name in re.findall(r"\b(?:infra|jobs|tests)/[\w/.-]+\.\w+", text)}
    inside = re.findall(r"`((?:\w+/)*\w+\.py)`", text) if path.parent.name != "infra" else []
    named |= {
        ROOT / name if (ROOT / name).exists() else ROOT / "pipeline" / name for name in inside
    }
    assert [str(file) for file in linked | named if not file.exists()] == []


def test_the_readme_lists_every_backbone_job_status_and_column() -> None:
    text = (ROOT / "README.md").read_text()
    jobs = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("[a-z]*.py")}
    space = inspect.signature(Space).parameters
    space_values = dict.fromkeys(space, "") | {"dim": 8, "mean": (), "std": (), "versions": {}}
    layout = Layout(chunk_images=1, chunk_bytes=1, top_k_classes=1)
    columns = part_schema(Space(**space_values), layout).names
    for name in (*pipeline.list_backbones(), *jobs, *STATUSES, *columns):
        assert f"`{name}`" in text, f"{name} is missing"
