"""The embed job in a simulated world: the product's own code, with Ray's place taken by a loop.

What is replaced is what surrounds the protocol: the standard library's time, chance and threads
(``stdlib``), the store (``store``), Ray Data, the backbone and its weights, Ray's metrics, and the
page of the report. Everything else is the product: listing, reader, plan, lease, actor, ledger,
commits, pruning, verification.
"""

import hashlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

import pipeline.storage
from pipeline.config import EmbedConfig, StorageOptions
from pipeline.embed_job import actors, lease, ledger, prepare, run
from pipeline.embed_job.actors import EmbedActor, FlowSettings
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.wire import LoadBounds, Receipt, group_shards, read_loads, unpack_receipts
from pipeline.inference.embedder import EmbeddedBatch
from pipeline.input import footers, listing, reader
from pipeline.output import commits, parts
from pipeline.records import Embedding, Record, Shard
from pipeline.storage import Storage, conditional, local
from simulation.stdlib import SimulatedPool, SimulatedThreading, SimulatedTime, SimulatedUuid
from simulation.store import S3, SimulatedDisk, SimulatedStore, lock_file
from simulation.world import WORLDS, current_process

DIM = 4
STORAGE = Storage(StorageOptions(storage_attempts=4))


class StandIn:
    """Takes the embedder's place: a vector is a function of the image's bytes."""

    options = SimpleNamespace(device="cpu")
    batch_size = 8

    def embed(self, records: Sequence[Record]) -> EmbeddedBatch:
        """Embed as the seed has it: an image named ``slow`` fails now and then."""
        return EmbeddedBatch([_embed(record) for record in records], {})


def _embed(record: Record) -> Embedding:
    data = bytes(record.data)
    digest = hashlib.sha256(data).digest()[:16]
    if data.startswith(b"bad") or (data.startswith(b"slow") and WORLDS[-1].dice.random() < 0.5):
        return Embedding("unreadable", "it took too long", digest=digest)
    vector = np.frombuffer(digest, np.uint8)[:DIM].astype(np.float32)
    return Embedding("ok", width=1, height=1, digest=digest, vector=vector)


class Flow:
    """Takes the place of ``dataflow``; the order of its receipts is drawn from the seed."""

    def cluster(self, _address: str | None) -> Any:
        """Be part of no cluster."""
        return nullcontext()

    def choose_resources(self, _config: EmbedConfig) -> Resources:
        """Return one actor."""
        return Resources(1, 1.0, 0.0)

    def run_flow(
        self, shards: Sequence[Shard], settings: FlowSettings, _resources: Resources, **_: object
    ) -> Iterator[Receipt]:
        """Embed shards; receipts come in another order than parts, and some come twice."""
        dice = WORLDS[-1].dice
        actor = EmbedActor(settings, make=lambda _: StandIn())  # type: ignore[arg-type, return-value]
        bounds = LoadBounds(settings.read.chunk_images, settings.read.chunk_bytes)
        groups = group_shards(shards, num_groups=2)
        dice.shuffle(groups)
        held: list[Receipt] = []
        for group in groups:
            loads = read_loads(
                group, storage=settings.storage, options=settings.read, bounds=bounds
            )
            for load in loads:
                for _ in range(1 + (dice.random() < 0.1)):  # a task that is run again
                    held += unpack_receipts(actor(load))
                while held and dice.random() < 0.6:
                    yield self._deliver(held.pop(dice.randrange(len(held))))
        while held:
            yield self._deliver(held.pop(dice.randrange(len(held))))

    def _deliver(self, receipt: Receipt) -> Receipt:
        if receipt.fatal is not None:
            raise receipt.fatal
        return receipt


class _NoMetrics:
    def __init__(self, _run_id: str) -> None: ...
    def __enter__(self) -> "_NoMetrics":
        return self

    def __exit__(self, *_: object) -> None: ...
    def start(self, _planned_bytes: int) -> None: ...
    def count_commit(self) -> None: ...
    def record(self, _sample: object) -> None: ...


class _Machine:
    """Takes the place of ``os`` and ``Path`` for the lease: who is alive on which machine."""

    def getpid(self) -> int:
        return current_process().pid

    def kill(self, pid: int, _signal: int) -> None:
        if not any(process.pid == pid and process.alive for process in WORLDS[-1].processes):
            raise ProcessLookupError(pid)

    def __call__(self, path: str) -> "_File":
        return _File(path)


class _File:
    def __init__(self, path: str) -> None:
        self._path = path

    def read_text(self) -> str:
        if self._path.endswith("boot_id"):
            return current_process().boot
        return "1 (x) S " + "0 " * 40  # a start time of 0 for every process

    def readlink(self) -> str:
        return "pid:[1]"


_encode_part = parts.encode_part
_ENCODED: dict[tuple[bytes, str], bytes] = {}


def _encode_cached(table: pa.Table, *, metadata: Mapping[str, str]) -> bytes:
    """Encode each table once; the same rows are written over and over."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    known = (sink.getvalue(), repr(sorted(metadata.items())))
    if known not in _ENCODED:
        _ENCODED[known] = _encode_part(table, metadata=metadata)
    return _ENCODED[known]


@contextmanager
def simulating() -> Iterator[None]:
    """Let the product live in the current world."""
    clock, machine = SimulatedTime(), _Machine()
    stores = {"sim": SimulatedStore(), "disk": SimulatedDisk()}
    retrying = sys.modules["pipeline.storage.retry"]  # the package has a function of that name
    weights = SimpleNamespace(state_dict={}, revision=None)
    changes: list[tuple[Any, dict[str, Any]]] = [
        (pipeline.storage, {"connect_other": stores.__getitem__, "uuid": SimulatedUuid()}),
        (retrying, {"time": clock, "FIRST_WAIT_S": 0.0, "LONGEST_WAIT_S": 0.0}),
        (conditional, {"time": clock}),
        (local, {"_lock": lock_file}),
        (lease, {"time": clock, "threading": SimulatedThreading, "os": machine, "Path": machine}),
        (ledger, {"time": clock}),
        (commits, {"time": clock, "uuid": SimulatedUuid(), "ThreadPoolExecutor": SimulatedPool}),
        (parts, {"encode_part": _encode_cached}),
        (listing, {"ThreadPoolExecutor": SimulatedPool}),
        (footers, {"ThreadPoolExecutor": SimulatedPool}),
        (reader, {"ThreadPoolExecutor": SimulatedPool}),
        (
            actors,
            {
                "ThreadPoolExecutor": SimulatedPool,
                "ActorMetrics": _NoMetrics,
                "count_deaths": lambda *_: nullcontext(),
            },
        ),
        (
            prepare,
            {
                "load_weights": lambda *_, **__: weights,
                "save_weights": lambda _, uri, storage: storage.put(uri, b"weights"),
                "weights_digest": lambda _: "ab" * 32,
                "create_backbone": lambda *_, **__: SimpleNamespace(embedding_dim=DIM),
            },
        ),
        (
            run,
            {
                "time": clock,
                "uuid": SimulatedUuid(),
                "ThreadPoolExecutor": SimulatedPool,
                "dataflow": Flow(),
                "DriverMetrics": _NoMetrics,
                "render_report": lambda *_, **__: "",
            },
        ),
    ]
    patches = [
        patch.object(place, name, new) for place, news in changes for name, new in news.items()
    ]
    for change in patches:
        change.start()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for change in reversed(patches):
            change.stop()


def make_config(place: str = S3, **changes: Any) -> EmbedConfig:
    """Return the settings of a simulated run over ``<place>/in`` to ``<place>/out``."""
    settings = {
        "model": "fbnetv3_b.ra2_in1k",
        "weights": "random:0",
        "chunk_images": 2,
        "max_removed": 1.0,
        "storage": STORAGE.options,
    }
    return EmbedConfig(input=(f"{place}/in",), output=f"{place}/out", **settings | changes)
