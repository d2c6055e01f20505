"""Whether decoding, forward passes and writing go on at once: a profile of one embedder actor.

A device that waits as long as a GPU would take stands in for the GPU; the actor, its decode
processes, the images and the parts are real. Where the cores could decode faster than the device
computes, the device should never have to wait for them.

    python -m pipeline.benchmark.overlap '{"model": …}'
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from pipeline.benchmark.commands import run_module
from pipeline.benchmark.setting import Setting
from pipeline.config import EmbedConfig
from pipeline.embed_job.actors import EmbedActor, FlowSettings, make_flow_settings
from pipeline.embed_job.plan import plan_shards
from pipeline.embed_job.prepare import describe_output, make_output
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.wire import LoadBounds, read_loads, unpack_receipts
from pipeline.inference.embedder import Embedder
from pipeline.inference.engines import Forwarded, Pixels
from pipeline.input.listing import list_sources
from pipeline.records import Space
from pipeline.storage import Storage

_CALLS = 2  # as many loads are in an actor with a GPU at once
_SLOWER = 1.25  # the device takes so much longer for an image than all cores together


@dataclass(frozen=True, slots=True)
class OverlapFindings:
    """The profile of one actor; times are of one image.

    Attributes:
        images: Number of images.
        host_ms: CPU time to decode and transform, shared by ``cores``.
        device_ms: Time that the device takes.
        write_ms: Time to write its row.
        actor_ms: CPU time of the actor's own process, its decode processes apart: more than it
            can have held the interpreter's lock.
        wall_ms: Time that all of it took.
        one_after_another_ms: What it would take if nothing overlapped.
        device_busy: Share of the time between its first batch and its last in which it computed.
    """

    images: int
    host_ms: float
    device_ms: float
    write_ms: float
    actor_ms: float
    wall_ms: float
    one_after_another_ms: float
    device_busy: float


class _Device:
    """An engine that computes nothing, on time; takes one batch after the other, as a GPU does."""

    depth = 1

    def __init__(self, space: Space, batch_size: int) -> None:
        self.batch_size = batch_size
        self._shape = (batch_size, space.image_size, space.image_size, 3)
        self._dim = space.dim
        self._queue = ThreadPoolExecutor(1, "device")
        self.restart(image_s=0.0)

    def restart(self, *, image_s: float) -> None:
        """Take that long for an image from now on, and count from zero."""
        self.busy_s = 0.0
        self.span_s = (math.inf, 0.0)
        self._image_s = image_s

    def allocate(self) -> Pixels:
        return np.zeros(self._shape, np.uint8)

    def submit(self, pixels: Pixels | Tensor) -> Callable[[], Forwarded]:
        return self._queue.submit(self._compute, len(pixels)).result

    def shrink(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def _compute(self, images: int) -> Forwarded:
        seconds = images * self._image_s
        start_s = time.perf_counter()
        time.sleep(seconds)
        self.busy_s += seconds
        self.span_s = (min(self.span_s[0], start_s), time.perf_counter())
        return Forwarded(np.ones((images, self._dim), np.float32), seconds=seconds)


def profile_overlap(setting: Setting) -> Mapping[str, Any]:
    """Measure in a process of its own, over the images of a long run; return the findings."""
    spec = {
        "model": setting.model,
        "weights": setting.weights,
        "shards": setting.samples.shards,
        "cores": setting.cores,
    }
    found: Mapping[str, Any] = run_module("pipeline.benchmark.overlap", spec)
    return found


def measure_overlap(spec: Mapping[str, Any], folder: Path) -> OverlapFindings:
    """Embed the images of ``spec["shards"]`` twice: to time the host's share, then with a device.

    Args:
        spec: ``model``, ``weights``, ``shards``, ``cores``.
        folder: An empty folder.
    """
    settings, loads = _prepare(spec, folder)
    space = settings.info.space
    device = _Device(space, settings.embedder.batch_size)
    with closing(Embedder(space, device, options=settings.embedder)) as embedder:
        actor = EmbedActor(settings, make=lambda _: embedder)
        alone = _run(actor, loads, device)
        image_s = _SLOWER * alone.host_s / alone.images / spec["cores"]
        device.restart(image_s=image_s)
        found = _run(actor, loads, device)
    ms = 1e3 / found.images
    return OverlapFindings(
        images=found.images,
        host_ms=ms * found.host_s,
        device_ms=1e3 * image_s,
        write_ms=ms * found.write_s,
        actor_ms=ms * found.actor_s,
        wall_ms=ms * found.wall_s,
        one_after_another_ms=ms * (found.host_s / spec["cores"] + found.write_s) + 1e3 * image_s,
        device_busy=found.busy,
    )


def _prepare(spec: Mapping[str, Any], folder: Path) -> tuple[FlowSettings, list[pa.Table]]:
    config = EmbedConfig(
        input=(spec["shards"],),
        output=str(folder / "output"),
        model=spec["model"],
        weights=spec["weights"],
        batch_size=32,
        chunk_images=64,
    )
    storage = Storage()
    listing = list_sources(config.input, "auto", storage)
    info = make_output(config, *describe_output(config, storage), storage)
    plan = plan_shards(listing, space_id=info.space.id, layout=info.layout, commits={}, retired={})
    resources = Resources(actors=1, cpus=spec["cores"], gpus=0.0)
    settings = make_flow_settings(config, info, resources, run_id="overlap")
    bounds = LoadBounds(config.chunk_images, 2**30)
    loads = read_loads(plan.embed, storage=storage, options=settings.read, bounds=bounds)
    return settings, list(loads)


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of one run over all images, and the share of time the device was busy."""

    images: int
    host_s: float
    write_s: float
    actor_s: float
    wall_s: float
    busy: float


def _run(actor: EmbedActor, loads: list[pa.Table], device: _Device) -> _Times:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(_CALLS) as calls:
        receipts = [r for batch in calls.map(actor, loads) for r in unpack_receipts(batch)]
    wall_s, actor_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    seconds = [receipt.seconds for receipt in receipts]
    return _Times(
        images=sum(r.num_records for r in receipts),
        host_s=sum(s.get("decode", 0.0) + s.get("transform", 0.0) for s in seconds),
        write_s=sum(s.get("write", 0.0) for s in seconds),
        actor_s=actor_s,
        wall_s=wall_s,
        busy=device.busy_s / (device.span_s[1] - device.span_s[0]),
    )


def main() -> None:
    """Measure what the command line specifies; print the findings as JSON on the last line."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure_overlap(json.loads(sys.argv[1]), Path(folder))
    print(json.dumps(asdict(found)))  # noqa: T201


if __name__ == "__main__":
    main()
