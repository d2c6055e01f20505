"""How the driver, the commits and the listing behave with many shards and many actors.

A cluster of many nodes runs on this machine, and actors that wait as long as embedding would take
stand in for embedders. Everything else is real: tar shards, read tasks, loads, parts, receipts,
commits, the plan of the next run. Processes of the stand-ins do not import torch.
"""

import io
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from pipeline.benchmark.samples import draw_photograph
from pipeline.config import EmbedConfig
from pipeline.loads import Load, unpack_loads
from pipeline.parts import OutputInfo, build_part, read_output_info, write_part
from pipeline.receipts import Receipt, pack_receipts
from pipeline.records import Embedding
from pipeline.report import EmbedReport
from pipeline.run import embed
from pipeline.storage import Storage

_ACTORS_PER_NODE = 8
_NODE_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Simulation:
    """What to simulate.

    Attributes:
        shards: Number of shards, of one load each.
        actors: Number of embedder actors.
        load_s: How long embedding a load takes.
    """

    shards: int
    actors: int
    load_s: float


@dataclass(frozen=True, slots=True)
class SimulationFindings:
    """How it went.

    Attributes:
        loads_per_s: Loads a second between the first tenth of the run and the last.
        reached: The same as a share of what the actors could do.
        late_over_early: Rate of the second half over that of the first; 1 when nothing piles up.
        list_s: Time to list the input.
        startup_s: Time until the first load was in an actor.
        seconds: Time of the whole run.
        driver_cpu_ms: CPU time of the driver for one shard, receipts and commits included.
        rerun_s: Time of a second run, which lists, reads all commits, and finds nothing to do.
        rows: Live rows afterwards; one for each shard when all is well.
    """

    loads_per_s: float
    reached: float
    late_over_early: float
    list_s: float
    startup_s: float
    seconds: float
    driver_cpu_ms: float
    rerun_s: float
    rows: int


def simulate(simulation: Simulation, config: EmbedConfig, folder: Path) -> SimulationFindings:
    """Run the embed job with stand-ins, twice.

    Args:
        simulation: What to simulate.
        config: Settings of the job; input and output are ``folder``'s ``shards`` and ``output``.
        folder: An empty folder.
    """
    write_tiny_shards(folder / "shards", simulation.shards)
    stand_in = make_stand_in(simulation.load_s, config.output)
    with _run_cluster(simulation.actors):
        cpu_s = time.process_time()
        report = _embed(config, stand_in)
        cpu_s = time.process_time() - cpu_s
    start_s = time.perf_counter()
    again = _embed(config, stand_in)
    rerun_s = time.perf_counter() - start_s
    rates = [_rate(report.timeline, *span) for span in ((0.1, 0.9), (0.1, 0.5), (0.5, 0.9))]
    return SimulationFindings(
        loads_per_s=rates[0],
        reached=rates[0] * simulation.load_s / simulation.actors,
        late_over_early=rates[2] / rates[1],
        list_s=report.stage_seconds["list"],
        startup_s=report.startup_seconds,
        seconds=report.seconds,
        driver_cpu_ms=1e3 * cpu_s / simulation.shards,
        rerun_s=rerun_s,
        rows=sum(again.rows.values()),
    )


def _embed(config: EmbedConfig, stand_in: type) -> EmbedReport:
    report = embed(config, stand_in=stand_in)
    assert isinstance(report, EmbedReport)
    return report


def _rate(timeline: Sequence[tuple[float, int]], start: float, stop: float) -> float:
    """Return rows a second between two shares of all rows."""
    total = timeline[-1][1]
    first, last = (
        next(mark for mark in timeline if mark[1] >= share * total) for share in (start, stop)
    )
    return (last[1] - first[1]) / max(1e-9, last[0] - first[0])


def write_tiny_shards(folder: Path, number: int) -> None:
    """Write tar shards of one small image each."""
    folder.mkdir(parents=True)
    image = draw_photograph(0, (32, 32))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("0.jpg")
        member.size = len(image)
        archive.addfile(member, io.BytesIO(image))
    for index in range(number):
        (folder / f"{index:06d}.tar").write_bytes(buffer.getvalue())


def make_stand_in(load_s: float, output: str) -> type:
    """Return a class that takes ``load_s`` for a load and writes parts of zero vectors."""

    class StandIn:
        def __init__(self) -> None:
            self._storage = Storage()
            info = read_output_info(output, self._storage)
            assert info is not None
            self._info = info

        def __call__(self, batch: pa.Table) -> pa.Table:
            receipts: list[Receipt] = []
            for load in unpack_loads(batch):
                time.sleep(load_s)
                receipts += _write_parts(load, output, self._info, self._storage)
            receipts[0] = replace(receipts[0], load_s=load_s)
            return pack_receipts(receipts)

    return StandIn


def _write_parts(load: Load, output: str, info: OutputInfo, storage: Storage) -> Iterator[Receipt]:
    outcome = Embedding("ok", None, 32, 32, bytes(16), np.zeros(info.space.dim, np.float32))
    for shard, chunk in load.chunks:
        part = write_part(
            output,
            build_part(chunk.records, [outcome] * len(chunk.records), info.schema),
            folder=shard.folder,
            chunk=chunk.index,
            space_id=info.space.id,
            storage=storage,
        )
        yield Receipt(shard.id, chunk.index, chunk.last, len(chunk.records), part)


@contextmanager
def _run_cluster(actors: int) -> Iterator[None]:
    """Run a head without cores and nodes of eight cores each, on this machine."""
    memory = {"object_store_memory": _NODE_STORE_BYTES}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory}
    )
    try:
        for _ in range(-(-actors // _ACTORS_PER_NODE)):
            cluster.add_node(num_cpus=_ACTORS_PER_NODE, **memory)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
