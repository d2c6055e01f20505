"""Peak memory of the embed job's processes, over inputs chosen to need a lot of it.

Each case is one run of the real job, started as a user would start it. Sizes are chosen so that
anything that grows with the number of images, the size of a shard or the number of shards shows.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from pipeline.benchmark.commands import run_program
from pipeline.benchmark.samples import draw_photograph, write_shard
from pipeline.benchmark.setting import JOBS
from pipeline.errors import AbortError
from pipeline.log import LOG

_COMMAND = (
    *("--model", "ese_vovnet19b_dw.ra_in1k", "--weights", "random:0", "--image-size", "32"),
    *("--actors", "1", "--log-level", "warning"),
)
_STORE_BYTES = 80 * 2**20  # hardly more than the least that Ray accepts
_LARGE_SHARD_BYTES = 300 * 2**20
_SMALL, _TINY, _PHOTO = (160, 120), (32, 24), (1600, 1200)
_HUGE = (20_000, 10_000)


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """One input, and how the job is run over it.

    Attributes:
        name: What is hard about it.
        images: Number of images.
        write: Writes the shards into an empty folder.
        flags: What the job is given besides the input.
        object_store_bytes: Size of Ray's object store; 0 leaves the choice to Ray.
    """

    name: str
    images: int
    write: Callable[[Path], None]
    flags: tuple[str, ...] = ()
    object_store_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryFindings:
    """What one run held in memory.

    Attributes:
        case: Name of the case.
        images: Number of images of the input.
        shards: Number of shards of the input.
        input_bytes: Size of all shards.
        rows: Rows of the output by status.
        seconds: Time of the whole run.
        peak_bytes: Largest anonymous memory of one process by kind: ``driver``, ``actor``,
            ``task`` (those that read) and ``other`` (Ray's own). Without the object store, which
            all processes share.
        object_store_bytes: Size of the object store where it was set; 0 was Ray's choice.
    """

    case: str
    images: int
    shards: int
    input_bytes: int
    rows: Mapping[str, int]
    seconds: float
    peak_bytes: Mapping[str, int]
    object_store_bytes: int = 0


def measure_memory(
    folder: Path, *, scale: float = 1.0, names: Collection[str] | None = None
) -> list[MemoryFindings]:
    """Run the embed job over every case, one after the other.

    Args:
        folder: An existing folder with room for 500 MB; what is written there is deleted again.
        scale: Size of the inputs; at 1 they take some minutes on one core.
        names: Cases to run; all of them otherwise.

    Raises:
        AbortError: A run failed, or has not one row for each image.
    """
    cases = [case for case in list_cases(scale) if names is None or case.name in names]
    return [_measure_case(case, folder / f"case-{i}") for i, case in enumerate(cases)]


def list_cases(scale: float) -> tuple[MemoryCase, ...]:
    """Return the cases; sizes are in proportion to ``scale``, numbers at least a handful."""
    return (
        *(_make_plain_case(times, 800 * scale) for times in (1, 4, 16)),
        _make_large_shard_case(_LARGE_SHARD_BYTES * scale),
        _make_long_shard_case(max(16, round(50_000 * scale))),
        _make_many_shards_case(max(16, round(20_000 * scale))),
        _make_huge_image_case(scale),
    )


def _make_plain_case(times: int, number: float) -> MemoryCase:
    images = times * max(16, round(number))
    write = partial(_write_shards, size=_SMALL, images=images, per_shard=min(100, images // 4))
    return MemoryCase(f"{times}x", images, write)


def _make_large_shard_case(nbytes: float) -> MemoryCase:
    images = max(8, round(nbytes / len(draw_photograph(0, _PHOTO))))
    write = partial(_write_shards, size=_PHOTO, images=images, per_shard=images)
    name = "shard larger than the object store"
    return MemoryCase(name, images, write, _cut_small(images), _STORE_BYTES)


def _make_long_shard_case(images: int) -> MemoryCase:
    write = partial(_write_shards, size=_TINY, images=images, per_shard=images)
    name = f"one shard of {images:,} tiny images"
    return MemoryCase(name, images, write, _cut_small(images))


def _make_many_shards_case(shards: int) -> MemoryCase:
    write = partial(_write_shards, size=_TINY, images=shards, per_shard=1)
    return MemoryCase(f"{shards:,} shards of one image", shards, write)


def _make_huge_image_case(scale: float) -> MemoryCase:
    """One image of as many pixels as are allowed, and one with a single row more."""
    side = max(0.01, scale**0.5)
    width, height = (round(length * side) for length in _HUGE)
    limit = ("--max-pixels", str(width * height)) if scale < 1 else ()  # otherwise the default
    write = partial(_write_huge, sizes=((width, height), (width, height + 1)), small=62)
    name = f"one image of {width * height / 1e6:,.0f} megapixels among small ones"
    return MemoryCase(name, 64, write, (*limit, "--chunk-images", "16"))


def _cut_small(images: int) -> tuple[str, ...]:
    """Return flags for several parts, which a rate needs, where one would hold all images."""
    return ("--chunk-images", "4") if images <= 256 else ()


def _write_shards(folder: Path, *, size: tuple[int, int], images: int, per_shard: int) -> None:
    drawn = itertools.cycle([draw_photograph(seed, size) for seed in range(4)])
    for start in range(0, images, per_shard):
        names = (f"{i:06}.jpg" for i in range(start, min(start + per_shard, images)))
        write_shard(folder / f"{start:06}.tar", zip(names, drawn, strict=False))


def _write_huge(folder: Path, *, sizes: Collection[tuple[int, int]], small: int) -> None:
    write_shard(folder / "0.tar", _draw_huge_and_small(sizes, small))


def _draw_huge_and_small(
    sizes: Collection[tuple[int, int]], small: int
) -> Iterator[tuple[str, bytes]]:
    data = draw_photograph(0, _SMALL)
    yield from ((f"a{i}.jpg", data) for i in range(small // 2))
    for size in sizes:
        file = BytesIO()
        Image.new("RGB", size, (200, 30, 30)).save(file, "JPEG")
        yield f"huge-{size[0]}x{size[1]}.jpg", file.getvalue()
    yield from ((f"b{i}.jpg", data) for i in range(small - small // 2))


def _measure_case(case: MemoryCase, folder: Path) -> MemoryFindings:
    shards = folder / "shards"
    shards.mkdir(parents=True)
    try:
        case.write(shards)
        sizes = [path.stat().st_size for path in shards.iterdir()]
        found = _run_case(case, shards, sizes, folder / "output")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    LOG.info(
        "memory case=%r seconds=%.1f peak_bytes=%s", case.name, found.seconds, found.peak_bytes
    )
    return found


def _run_case(
    case: MemoryCase, shards: Path, sizes: Collection[int], output: Path
) -> MemoryFindings:
    environment = {"RAY_ADDRESS": ""}  # a Ray of its own, whose processes can be told apart
    if case.object_store_bytes:
        store_bytes = str(case.object_store_bytes)
        environment["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"] = store_bytes
    command = [str(JOBS / "embed.py"), "--input", str(shards), *_COMMAND, *case.flags]
    run = run_program(command, images=case.images, output=output, environment=environment)
    report = json.loads(run.output.splitlines()[-1])
    if sum(report["rows"].values()) != case.images:
        raise AbortError(f"{case.name}: {case.images} images have become {report['rows']} rows")
    return MemoryFindings(
        case=case.name,
        images=case.images,
        shards=len(sizes),
        input_bytes=sum(sizes),
        rows=report["rows"],
        seconds=report["seconds"],
        peak_bytes=run.peak_bytes,
        object_store_bytes=case.object_store_bytes,
    )
