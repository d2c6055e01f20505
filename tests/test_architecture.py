"""Ratchets: who imports whom, the public names, the flags of each job."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import pipeline
from pipeline.records import describe_job

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# A heavy library is imported behind its door only; ``a.*`` is a whole subpackage.
DOORS = {
    "ray": {
        "pipeline.embed_job.dataflow",
        "pipeline.embed_job.metrics",
        "pipeline.index.workers",
        "pipeline.service.cluster",
        "pipeline.benchmark.simulation",
        "jobs.baselines.*",
    },
    "faiss": {"pipeline.index.faiss.*"},
    "fsspec": {"pipeline.storage.*"},
    "s3fs": {"pipeline.storage.*"},
    "botocore": {"pipeline.storage.*"},
    "aiohttp": {"pipeline.storage.*"},
    "fastapi": {"pipeline.service.*"},
    "starlette": {"pipeline.service.*"},
    "uvicorn": {"pipeline.service.*"},
    "pydantic": {"pipeline.settings", "pipeline.service.*"},
    "timm": {"jobs.baselines.*", "pipeline.benchmark.*"},
    "torchvision": {"pipeline.images.gpu"},
    "triton": {"pipeline.images.ragged_triton"},
    "simplejpeg": {"pipeline.images.jpeg"},
}

# Layers, low to high: a module imports from its own layer or a lower one; folders of one layer are
# siblings, which do not import each other.
LAYERS = (
    ("pipeline.errors", "pipeline.log", "pipeline.program", "pipeline.shortages"),
    (
        "pipeline.records",
        "pipeline.carried",
        "pipeline.settings",
        "pipeline.joining",
        "pipeline.summary",
    ),
    ("pipeline.config", "pipeline.cli"),
    ("pipeline.storage.*",),
    ("pipeline.backbones.*", "pipeline.input.*", "pipeline.output.*"),
    ("pipeline.images.*",),
    ("pipeline.inference.*",),
    ("pipeline.embed_job.*", "pipeline.index.*"),
    ("pipeline.service.*", "pipeline.nightly"),
    ("pipeline.benchmark.*",),
    ("jobs.*", "pipeline"),
)

# The same inside the index, where the folders are stages: what is read and written, then searched,
# exported, built.
INDEX_LAYERS = (
    ("pipeline.index", "pipeline.index.manifest", "pipeline.index.workers", "pipeline.index.cache"),
    ("pipeline.index.faiss.*",),
    ("pipeline.index.files", "pipeline.index.pointer", "pipeline.index.report"),
    (
        "pipeline.index.vectors",
        "pipeline.index.map",
        "pipeline.index.health",
        "pipeline.index.publish",
        "pipeline.index.garbage",
    ),
    ("pipeline.index.search.*",),
    ("pipeline.index.export.*",),
    ("pipeline.index.build.*",),
    ("pipeline.index.job",),
)


def fits(module: str, patterns: Iterable[str]) -> bool:
    return any(
        module == p or (p.endswith(".*") and f"{module}.".startswith(p[:-1])) for p in patterns
    )


@cache
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


def list_own_imports(module: str) -> set[str]:
    """Return the modules of this project that a module imports."""
    return {name for name in list_imports(MODULES[module]) if name in MODULES} - {"pipeline"}


def find_place(module: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """Return a module's layer and the entry of the table that it falls under."""
    for level, patterns in enumerate(layers):
        for pattern in patterns:
            if fits(module, [pattern]):
                return level, pattern
    raise AssertionError(f"{module} has no place in the table of layers")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str):
    own = find_place(module, LAYERS)
    for name in list_own_imports(module):
        level, folder = find_place(name, LAYERS)
        assert level < own[0] or folder == own[1], name


@pytest.mark.parametrize("module", sorted(m for m in MODULES if fits(m, ["pipeline.index.*"])))
def test_imports_point_downwards_inside_the_index(module: str):
    own = find_place(module, INDEX_LAYERS)
    for name in list_own_imports(module):
        if fits(name, ["pipeline.index.*"]):
            assert find_place(name, INDEX_LAYERS)[0] <= own[0], name


def test_no_module_imports_itself_by_way_of_others():
    """Raises with the circle where there is one."""
    TopologicalSorter({module: list_own_imports(module) for module in MODULES}).prepare()


def test_no_job_but_the_service_needs_the_extra_of_the_service():
    """``pip install .[cpu]`` is enough to embed, index, search and run every night."""
    asked_for = {"pipeline", "pipeline.service.remote"}  # imported for ``--url`` only
    reached, todo = set(), {"jobs.embed", "jobs.index", "jobs.search", "jobs.nightly"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= {n for n in list_imports(MODULES[module]) if n in MODULES} - reached - asked_for
    assert {module for module in reached if module.startswith("pipeline.service")} == set()


def test_the_public_names_are_these():
    assert sorted(pipeline.__all__) == [
        "Client",
        "EmbedConfig",
        "Embedder",
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
    assert set(dir(pipeline)) == {*pipeline.__all__, "__version__"}


@pytest.mark.parametrize("name", sorted(pipeline.__all__))
def test_a_public_name_can_be_imported(name: str):
    assert callable(getattr(pipeline, name))


def test_no_folder_takes_the_place_of_a_public_name():
    """Importing ``pipeline.x.y`` sets ``pipeline.x``, so no folder may have a public name."""
    folders = {path.parent.name for path in MODULES.values() if path.name == "__init__.py"}
    assert folders & set(pipeline.__all__) == set()


def test_every_report_says_which_version_wrote_it():
    assert describe_job("embed") == {"job": "embed", "version": pipeline.__version__}
    by_hand = {name for name, path in MODULES.items() if '"job":' in path.read_text()}
    assert by_hand == {"pipeline.records"}


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'embedd'"):
        _ = pipeline.embedd


def test_importing_the_package_does_no_work():
    code = (
        "import sys, pipeline; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'faiss')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pipeline.images.decoder", ("torch", "pyarrow", "ray")),  # decode processes
        ("pipeline.input.reader", ("torch",)),  # read tasks
    ],
)
def test_what_runs_in_many_processes_imports_nothing_heavy(module: str, heavy: tuple[str, ...]):
    code = f"import sys, {module}; sys.exit(' '.join({{*sys.modules}} & {{*{heavy}}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


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
    "max-removed",
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
