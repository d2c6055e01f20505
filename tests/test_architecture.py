"""Ratchets: who imports whom, the public names, the flags of each job."""

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import pipeline

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# A heavy library is imported behind its door only; ``a.*`` is a whole subpackage.
DOORS = {
    "ray": {
        "pipeline.dataflow",
        "pipeline.metrics",
        "pipeline.service.cluster",
        "pipeline.service.deployment",
        "pipeline.index.*",
        "pipeline.benchmark.*",
        "jobs.baselines.*",
    },
    "faiss": {"pipeline.index.*"},
    "fsspec": {"pipeline.storage", "pipeline.stores.*"},
    "s3fs": {"pipeline.storage", "pipeline.stores.*"},
    "botocore": {"pipeline.storage", "pipeline.stores.*"},
    "aiohttp": {"pipeline.storage", "pipeline.stores.*"},
    "fastapi": {"pipeline.service.*"},
    "starlette": {"pipeline.service.*"},
    "uvicorn": {"pipeline.service.*"},
    "tyro": {"pipeline.cli"},
    "timm": {"jobs.baselines.*", "pipeline.benchmark.*"},
    "torchvision": {"pipeline.gpudecode"},
}

# Layers of DESIGN.md, low to high; a module imports from its own layer or a lower one.
LAYERS = (
    ("pipeline.errors",),
    ("pipeline.records", "pipeline.config"),
    (
        "pipeline.stores.*",
        "pipeline.storage",
        "pipeline.resources",
        "pipeline.jpeg2000",
        "pipeline.efficiency",
    ),
    ("pipeline.images", "pipeline.decodepool", "pipeline.strips", "pipeline.shards"),
    ("pipeline.containers.*", "pipeline.parts", "pipeline.lease", "pipeline.backbones.*"),
    ("pipeline.readers", "pipeline.transforms", "pipeline.engines"),
    (
        "pipeline.loads",
        "pipeline.crops",
        "pipeline.quarantine",
        "pipeline.report",
        "pipeline.receipts",
    ),
    ("pipeline.gpudecode", "pipeline.metrics", "pipeline.report_page"),
    ("pipeline.embedder",),
    ("pipeline.actors",),
    ("pipeline.dataflow",),
    ("pipeline.outputs", "pipeline.estimate", "pipeline.run"),
)


def fits(module: str, patterns: set[str] | tuple[str, ...]) -> bool:
    return any(
        module == p or (p.endswith(".*") and f"{module}.".startswith(p[:-1])) for p in patterns
    )


def list_imports(path: Path) -> set[str]:
    """Return the modules a file imports anywhere, but for type checking."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_heavy_library_is_imported_behind_its_door_only(library: str):
    users = {
        module
        for module, path in MODULES.items()
        if any(name.split(".")[0] == library for name in list_imports(path))
    }
    assert {module for module in users if not fits(module, DOORS[library])} == set()


def find_layer(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if fits(module, layer)), None)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if find_layer(m) is not None))
def test_imports_point_downwards(module: str):
    layer = find_layer(module)
    imported = {name for name in list_imports(MODULES[module]) if name in MODULES} - {"pipeline"}
    upwards = {name for name in imported if (find_layer(name) or 0) > layer}
    upwards |= {name for name in imported if find_layer(name) is None}
    assert upwards == set()


@pytest.mark.parametrize("folder", ["pipeline.index", "pipeline.service"])
def test_index_and_service_never_import_the_embedding_flow(folder: str):
    flow = {"pipeline.dataflow", "pipeline.run", "pipeline.estimate", "pipeline.loads"}
    for module, path in MODULES.items():
        if fits(module, (f"{folder}.*",)):
            assert list_imports(path) & flow == set(), module


def test_no_job_but_the_service_needs_the_extra_of_the_service():
    """``pip install .[cpu]`` is enough to embed, index, search and run every night."""
    asked_for = {"pipeline", "pipeline.service.remote"}  # imported for ``--url`` only
    reached, todo = set(), {"jobs.embed", "jobs.index", "jobs.search", "jobs.nightly"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= {n for n in list_imports(MODULES[module]) if n in MODULES} - reached - asked_for
    assert {module for module in reached if module.startswith("pipeline.service")} == set()


def test_every_module_of_the_flow_is_in_a_layer():
    """A new module of the embed job takes its place in the table above."""
    reached, todo = set(), {"pipeline.run"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= {n for n in list_imports(MODULES[module]) if n in MODULES} - reached - {"pipeline"}
    assert {module for module in reached if find_layer(module) is None} == set()


def test_the_public_names_are_these():
    assert sorted(pipeline.__all__) == [
        "Client",
        "EmbedConfig",
        "IndexConfig",
        "SearchIndex",
        "build_index",
        "create_backbone",
        "create_transform",
        "embed",
        "list_backbones",
        "read_embeddings",
        "resolve_data_config",
    ]
    assert dir(pipeline) == pipeline.__all__


@pytest.mark.parametrize("name", sorted(pipeline.__all__))
def test_a_public_name_can_be_imported(name: str):
    assert callable(getattr(pipeline, name))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'embedd'"):
        _ = pipeline.embedd


def test_importing_the_package_does_no_work():
    code = (
        "import sys, pipeline; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'faiss')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def list_flags(settings_class: type) -> list[str]:
    hints = get_type_hints(settings_class)
    flags: list[str] = []
    for item in fields(settings_class):
        nested = is_dataclass(hints[item.name])
        flags += list_flags(hints[item.name]) if nested else [item.name.replace("_", "-")]
    return flags


STORAGE_FLAGS = [
    "endpoint-url",
    "profile",
    "anonymous",
    "requester-pays",
    "storage-attempts",
    "storage-timeout-s",
]
EMBED_FLAGS = [
    "input",
    "output",
    "model",
    "weights",
    "image-size",
    "precision",
    "engine",
    "decode",
    "decode-stage",
    "exif",
    "input-kind",
    "image-column",
    "key-column",
    "carry",
    "embedding-dtype",
    "top-k-classes",
    "chunk-images",
    "chunk-bytes",
    "batch-size",
    "actors",
    "cpus-per-actor",
    "gpus-per-actor",
    "max-pixels",
    "max-image-bytes",
    "image-timeout-s",
    "max-failures",
    "retry-failed",
    "retry-failed-once",
    "verify",
    "prune",
    "dry-run",
    "ray-address",
    "log-level",
    *STORAGE_FLAGS,
]


def test_the_flags_of_the_embed_job_are_these():
    assert list_flags(import_module("pipeline.config").EmbedConfig) == EMBED_FLAGS


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("IndexConfig", {"embeddings", "index", "kind", "target-recall", "memory-budget", "full"}),
        ("SearchConfig", {"index", "image", "key", "vector", "k", "json", "html"}),
        ("ServeConfig", {"index", "host", "port", "replicas", "api-key-file"}),
    ],
)
def test_the_promised_flags_of_the_other_jobs_are_there(name: str, wanted: set[str]):
    flags = set(list_flags(getattr(import_module("pipeline.config"), name)))
    assert wanted - flags == set()
    assert set(STORAGE_FLAGS) - flags == set()


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.count(".") == 1 and "jobs" in m))
def test_a_job_is_settings_one_call_and_an_exit_code(module: str):
    if module == "jobs.baselines":
        pytest.skip("what the benchmark compares with, not a job")
    source = MODULES[module].read_text()
    assert len(source.splitlines()) <= 80
    assert "run_job(" in source
    assert callable(import_module(module).main)
