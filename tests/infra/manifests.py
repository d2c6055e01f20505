"""The files under infra/ as the tests read them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline import config

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS = {
    "image-benchmark": config.BenchmarkConfig,
    "image-embed": config.EmbedConfig,
    "image-index": config.IndexConfig,
    "image-nightly": config.NightlyConfig,
    "image-search": config.SearchConfig,
    "image-serve": config.ServeConfig,
}
"""Settings class of each console script."""
NIGHTLY_PATH = "/etc/image-embedding/nightly.toml"
"""Where the manifests mount infra/nightly.toml."""


def load(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kubernetes() -> dict[str, dict[str, Any]]:
    """Return every object under infra/kubernetes by ``"<kind>/<name>"``."""
    objects = [
        item for path in sorted((INFRA / "kubernetes").glob("*.yaml")) for item in load(path)
    ]
    named = {f"{o['kind']}/{o['metadata'].get('name', 'generated')}": o for o in objects}
    assert len(named) == len(objects), "two objects share a name"
    return named


def walk(value: object) -> Iterator[dict[str, Any]]:
    """Yield every mapping inside ``value``, outermost first."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)


def find_containers(value: object) -> list[dict[str, Any]]:
    """Return every container of every pod template inside ``value``."""
    return [c for mapping in walk(value) for c in mapping.get("containers", [])]


def find_clusters(value: object) -> list[dict[str, Any]]:
    """Return every specification of a Ray cluster inside ``value``."""
    return [mapping for mapping in walk(value) if "headGroupSpec" in mapping]


def split_command(text: str) -> tuple[str, list[str]]:
    """Return the console script of a command line and its arguments, with paths as they are here.

    ``python jobs/x.py`` is ``image-x``.
    """
    words = shlex.split(re.sub(r"\\\n", " ", text), comments=True)
    words = [str(INFRA / "nightly.toml") if w == NIGHTLY_PATH else w for w in words]
    words = [w.replace(NIGHTLY_PATH, str(INFRA / "nightly.toml")) for w in words]
    if words[:1] in (["python"], ["python3"]):
        job = Path(words[1])
        assert (ROOT / "jobs" / job.name).exists(), f"no such job: {job}"
        return f"image-{job.stem}", words[2:]
    return words[0], words[1:]
