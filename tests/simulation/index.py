"""The index job in a simulated world, with real FAISS: build, publish, roll back, collect.

Wherever ``CURRENT`` points, its manifest and all the files that one needs have to be there, as they
were published, after every single operation.
"""

import os
import random
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any
from unittest.mock import patch

from index.corpus import Corpus, draw_vectors

from pipeline.config import IndexConfig
from pipeline.errors import CorruptionError, PublishError, SettingsError, StorageError
from pipeline.index import files as index_files
from pipeline.index import garbage, publish
from pipeline.index.build import draft, rows, seal, segment_writer, training
from pipeline.index.job import build_index
from pipeline.index.manifest import Manifest, digest_bytes
from pipeline.index.pointer import Pointer, manifest_path
from pipeline.index.search.search_index import SearchIndex
from simulation.histories import Objects
from simulation.machine import STORAGE
from simulation.schedules import playing
from simulation.stdlib import SimulatedPool, SimulatedTime, SimulatedUuid
from simulation.store import DISK, S3, Blob
from simulation.world import FAULTS, FaultKind, Process, World

DIM = 8
CACHE = Path(tempfile.gettempdir()) / f"simulated-index-cache-{os.getpid()}"
COLLECT = {"collect_garbage": "delete", "keep_generations": 1, "min_age_hours": 0}

JOBS: Mapping[str, Mapping[str, Any]] = {
    "first": {},
    "unchanged": {},
    "increment": {},
    "full": {"full": True},
    "roll back": {"roll_back": "previous"},
    "unpin": {"unpin": True},
    "collect": COLLECT,
}


def run_index(place: str, **settings: Any) -> Any:
    """Run the index job."""
    values: dict[str, Any] = {"kind": "flat", "queries": 5} | settings
    if "roll_back" not in values and "collect_garbage" not in values:
        values["embeddings"] = f"{place}/out"
    config = IndexConfig(
        index=f"{place}/index", cache_dir=str(CACHE), storage=STORAGE.options, **values
    )
    return build_index(config)


class indexing(playing):  # noqa: N801
    """Like ``playing``, for the modules of the index job as well."""

    def __init__(self, world: World, script: object) -> None:
        super().__init__(world, script)
        chance, clock = SimulatedUuid(), SimulatedTime()
        self._warnings = warnings.catch_warnings()
        self._patches = [
            *(
                patch.object(module, "uuid", chance)
                for module in (publish, garbage, draft, segment_writer, training)
            ),
            *(patch.object(module, "time", clock) for module in (garbage, seal)),
            patch.object(rows, "ThreadPoolExecutor", SimulatedPool),
            patch.object(index_files.FileStore, "fetch", _fetch_fresh),
        ]

    def __enter__(self) -> None:
        super().__enter__()
        self._warnings.__enter__()
        warnings.simplefilter("ignore", ResourceWarning)  # who is killed closes no files
        for change in self._patches:
            change.start()

    def __exit__(self, *error: Any) -> None:
        for change in reversed(self._patches):
            change.stop()
        self._warnings.__exit__(*error)
        super().__exit__(*error)


_fetch = index_files.FileStore.fetch


def _fetch_fresh(files: index_files.FileStore, info: Any) -> Path:
    """Fetch a file as if nothing of it were in the cache: what is gone must show."""
    (files.cache_dir / info.sha256[:2] / info.sha256).unlink(missing_ok=True)
    return _fetch(files, info)


@dataclass
class Watch:
    """Looks at what serves after every write and deletion."""

    world: World
    place: str
    seen: list[str] = field(default_factory=list)

    def __call__(self, uri: str) -> None:
        """Check the state after a write to ``uri``."""
        if "/index/" not in uri:
            return
        objects, index = self.world.objects, f"{self.place}/index"
        current = objects.get(f"{index}/CURRENT")
        if current is None:
            assert not self.seen, "CURRENT is gone"
            return
        pointer = Pointer.from_json(current.data)
        manifest = objects.get(f"{index}/{manifest_path(pointer.generation)}")
        assert manifest is not None, f"the manifest of {pointer.generation}, which serves, is gone"
        assert digest_bytes(manifest.data) == pointer.manifest_sha256, "it is another manifest"
        for file in _list_needed(manifest.data):
            blob = objects.get(f"{index}/{file.path}")
            assert blob is not None, f"{file.path}, which serves, is gone"
            assert digest_bytes(blob.data) == file.sha256, f"{file.path} is not what was published"
        if self.seen[-1:] != [pointer.generation]:
            self.seen.append(pointer.generation)


@cache
def _list_needed(data: bytes) -> tuple[Any, ...]:
    return tuple(Manifest.from_json(data).list_needed())


def _make_corpus(place: str) -> Corpus:
    corpus = Corpus(f"{place}/out", DIM, storage=STORAGE, carry=("cls",))
    for number in range(2):
        corpus.add_shard(f"{number}.tar", draw_vectors(6, DIM, seed=number))
    return corpus


@cache
def _prepare(job: str, place: str) -> tuple[tuple[tuple[str, Blob], ...], tuple[str, ...]]:
    """Return the store before a job, and the keys that its index should hold after it."""
    world, keys = World(), []

    def work() -> None:
        corpus = _make_corpus(place)
        if job != "first":
            run_index(place)
        if job in ("increment", "full", "roll back", "unpin", "collect"):
            before = sorted(corpus.vectors)
            corpus.extend("night.tar", rows=3, seed=9)
        if job in ("roll back", "unpin", "collect"):
            run_index(place, full=True)
        if job == "unpin":
            run_index(place, roll_back="previous")
        keys.extend(before if job == "roll back" else sorted(corpus.vectors))

    with indexing(world, ("preparing", job)):
        process = world.start("prepare", work)
        world.run()
        if process.error is not None:
            raise process.error
    return tuple(world.objects.items()), tuple(keys)


def prepare(job: str, place: str) -> tuple[Objects, list[str]]:
    """Return the store before a job, and the keys that its index should hold after it."""
    objects, keys = _prepare(job, place)
    return dict(objects), list(keys)


@dataclass(frozen=True)
class IndexCrash:
    """An index job that meets one fault, and is started again, alone or with another at once.

    Attributes:
        job: What it does, one of ``JOBS``.
        fault: What goes wrong; None for nothing.
        number: At which operation.
        beside: Another job that is started with it again; none where empty.
        seed: Decides the order of everything else.
        place: Where, and so the kind of store.
    """

    job: str
    fault: FaultKind | None = None
    number: int = 0
    beside: str = ""
    seed: int = 0
    place: str = S3

    def faults(self, process: Process, _kind: str, _uri: str) -> FaultKind | None:
        """Give the fault at its operation."""
        hit = (process.name, process.operations) == ("job", self.number)
        return self.fault if hit else None


def play_index_crash(crash: IndexCrash) -> World:
    """Play a crash and what follows; return the world.

    Raises:
        ScheduleError: Something does not hold.
    """
    objects, keys = prepare(crash.job, crash.place)
    world, settings = World(crash.seed, objects=objects, faults=crash.faults), JOBS[crash.job]
    with indexing(world, crash):
        world.watch = Watch(world, crash.place)
        first = world.start("job", lambda: run_index(crash.place, **settings))
        world.run(until=lambda: first.paused_until_s > world.now_s)
        if first.result is None and crash.job != "roll back":
            world.start("again", lambda: run_index(crash.place, **settings))
        if crash.beside:
            other = JOBS[crash.beside]
            world.start("beside", lambda: run_index(crash.place, **other))
        world.run()
        world.settle()
        _check_errors(world, _list_tolerated(crash))
        check_index(world, crash.place, None if crash.beside or crash.job == "roll back" else keys)
    return world


def _list_tolerated(crash: IndexCrash) -> tuple[type[Exception], ...]:
    """Return what jobs may end with that run beside others."""
    if not crash.beside and crash.fault not in ("pause", "late"):
        return ()
    # Two roll back, or there is nothing to roll back to; a collection that spares nothing young
    # takes away what a build has just written.
    jobs = (crash.job, crash.beside)
    return (
        PublishError,
        StorageError,
        *([SettingsError] if "roll back" in jobs else []),
        *([CorruptionError] if "collect" in jobs else []),
    )


def _check_errors(world: World, tolerated: tuple[type[Exception], ...]) -> None:
    for process in world.processes:
        if not isinstance(process.error, (*tolerated, NoneType)):
            raise process.error  # type: ignore[misc]


def check_index(world: World, place: str, keys: list[str] | None) -> None:
    """Let a reader open what serves, after one more build where ``keys`` is None; compare keys."""
    found: list[str] = []

    def read() -> None:
        if keys is None:
            run_index(place, unpin=True)
        index = SearchIndex.open(f"{place}/index", STORAGE, cache_dir=str(CACHE))
        found.extend(sorted(item.key for item in index.snapshot.sample(100)))

    world.faults = lambda *_: None
    reader = world.start("reader", read)
    world.run()
    if reader.error is not None:
        raise reader.error
    expected = keys if keys is not None else _prepare("collect", place)[1]
    assert len(found) == len(set(found)), "a key has two rows"
    if keys is not None:
        assert found == sorted(expected), f"{found} are found, not {sorted(expected)}"


@cache
def count_index_operations(job: str, place: str) -> int:
    """Return how many operations a job makes when nothing goes wrong."""
    world = play_index_crash(IndexCrash(job, place=place))
    return sum(step.process == "job" for step in world.trace)


def draw_index_crash(seed: int) -> IndexCrash:
    """Return one of all, drawn from a seed."""
    dice = random.Random(seed)
    job, place = dice.choice(list(JOBS)), dice.choice([S3, DISK])
    number = dice.randint(1, count_index_operations(job, place))
    beside = dice.choice(["", "increment", "full", "roll back", "collect"])
    return IndexCrash(job, dice.choice(FAULTS), number, beside, seed, place)
