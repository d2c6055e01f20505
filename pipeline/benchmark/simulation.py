"""How the driver, the commits and the listing behave with many shards and many actors.

A cluster of nodes with eight GPUs each, in name, runs on this machine, and actors that wait as long
as a GPU would take stand in for embedders. Everything else is real: tar shards, read tasks, loads,
parts, receipts, commits, the plan of the next run. Processes of the stand-ins do not import torch.

    python -m pipeline.benchmark.simulation '{"shards": 1000, "actors": 16, "chunk_s": 0.1}'
"""

import io
import json
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from pipeline.benchmark.samples import draw_photograph
from pipeline.config import EmbedConfig
from pipeline.embed_job.report import EmbedReport
from pipeline.embed_job.run import embed
from pipeline.embed_job.wire import Load, Receipt, pack_receipts, unpack_loads
from pipeline.output.info import OutputInfo, read_output_info
from pipeline.output.parts import build_part, write_part
from pipeline.records import Embedding
from pipeline.storage import Storage

_GPUS_PER_NODE = 8
_MODEL = "ese_vovnet19b_dw.ra_in1k"
_NODE_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Simulation:
    """Settings of a simulation.

    Attributes:
        shards: Number of shards, of one chunk each.
        actors: Number of embedder actors, of one GPU each.
        chunk_s: How long a GPU takes for a chunk.
    """

    shards: int
    actors: int
    chunk_s: float


@dataclass(frozen=True, slots=True)
class SimulationFindings:
    """How it went.

    Attributes:
        chunks_per_s: Chunks a second between the first tenth of the run and the last.
        reached: The same as a share of what the GPUs could do.
        late_over_early: Rate of the second half over that of the first; 1 when nothing piles up.
        list_s: Time to list the input.
        startup_s: Time until the first load was in an actor.
        seconds: Time of the whole run.
        driver_cpu_ms: CPU time of the driver for one shard, commit included, between the same.
        rerun_s: Time of a second run, which lists, reads all commits, and finds nothing to do.
        rows: Live rows afterwards; one for each shard when all is well.
    """

    chunks_per_s: float
    reached: float
    late_over_early: float
    list_s: float
    startup_s: float
    seconds: float
    driver_cpu_ms: float
    rerun_s: float
    rows: int


def simulate(simulation: Simulation, folder: Path) -> SimulationFindings:
    """Run the embed job with stand-ins, twice, in an empty folder."""
    config = EmbedConfig(
        input=(str(folder / "shards"),),
        output=str(folder / "output"),
        model=_MODEL,
        weights="random:0",
        chunk_images=1,
        actors=simulation.actors,
    )
    write_tiny_shards(folder / "shards", simulation.shards)
    stand_in = make_stand_in(simulation.chunk_s, config.output)
    with _run_cluster(simulation.actors), _CpuClock() as clock:
        report = _embed(config, stand_in)
    start_s = time.perf_counter()
    again = _embed(config, stand_in)
    rerun_s = time.perf_counter() - start_s
    early, middle, late = (_find_mark(report.timeline, share) for share in (0.1, 0.5, 0.9))
    ended_s = report.started_s + report.startup_seconds + report.embed_seconds
    cpu_s = clock.measure(*(ended_s - report.timeline[-1][0] + mark[0] for mark in (early, late)))
    return SimulationFindings(
        chunks_per_s=_rate(early, late),
        reached=_rate(early, late) * simulation.chunk_s / simulation.actors,
        late_over_early=_rate(middle, late) / max(1e-9, _rate(early, middle)),
        list_s=report.stage_seconds["list"],
        startup_s=report.startup_seconds,
        seconds=report.seconds,
        driver_cpu_ms=1e3 * cpu_s / (late[1] - early[1]),
        rerun_s=rerun_s,
        rows=sum(again.rows.values()),
    )


def _embed(config: EmbedConfig, stand_in: type) -> EmbedReport:
    report = embed(config, stand_in=stand_in)
    assert isinstance(report, EmbedReport)
    return report


def _find_mark(timeline: Sequence[tuple[float, int]], share: float) -> tuple[float, int]:
    """Return when that share of all rows was done, and how many were done then."""
    return next(mark for mark in timeline if mark[1] >= share * timeline[-1][1])


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    return (last[1] - first[1]) / max(1e-9, last[0] - first[0])


class _CpuClock:
    """Notes this process's CPU time ten times a second."""

    def __init__(self) -> None:
        self._notes = [(time.time(), time.process_time())]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._note, daemon=True)

    def __enter__(self) -> "_CpuClock":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def measure(self, start_s: float, end_s: float) -> float:
        """Return the CPU time between two moments, seconds since 1970."""
        times, cpu_s = zip(*self._notes, strict=True)
        return float(np.interp(end_s, times, cpu_s) - np.interp(start_s, times, cpu_s))

    def _note(self) -> None:
        while not self._ended.wait(0.1):
            self._notes.append((time.time(), time.process_time()))


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


def make_stand_in(chunk_s: float, output: str) -> type:
    """Return a class that takes ``chunk_s`` for a chunk and writes parts of zero vectors."""

    class StandIn:
        def __init__(self) -> None:
            self._storage = Storage()
            info = read_output_info(output, self._storage)
            assert info is not None
            self._info = info
            self._gpu = threading.Lock()

        def __call__(self, batch: pa.Table) -> pa.Table:
            receipts: list[Receipt] = []
            start_s = time.perf_counter()
            for load in unpack_loads(batch):
                with self._gpu:
                    time.sleep(chunk_s * len(load.chunks))
                receipts += _write_parts(load, output, self._info, self._storage)
            receipts[0] = replace(receipts[0], load_s=time.perf_counter() - start_s)
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
    """Run a head without cores and nodes of eight cores and GPUs each, on this machine."""
    memory = {"object_store_memory": _NODE_STORE_BYTES}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory}
    )
    try:
        for _ in range(-(-actors // _GPUS_PER_NODE)):
            cluster.add_node(num_cpus=_GPUS_PER_NODE, num_gpus=_GPUS_PER_NODE, **memory)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Run the simulation on the command line; print its findings as JSON on the last line."""
    with tempfile.TemporaryDirectory() as folder:
        found = simulate(Simulation(**json.loads(sys.argv[1])), Path(folder))
    print(json.dumps(asdict(found)))  # noqa: T201


if __name__ == "__main__":
    main()
