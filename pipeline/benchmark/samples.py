"""The images that a benchmark runs on: taken from given inputs, or drawn."""

import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import StorageOptions
from pipeline.embed_job.plan import plan_shards
from pipeline.input.container import ReadOptions
from pipeline.input.listing import list_sources
from pipeline.input.reader import read_chunks
from pipeline.records import Layout
from pipeline.storage import Storage

_DRAWN_IMAGES = 64
_DRAWN_SIZE = (500, 375)  # the usual photograph of ImageNet


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The same images as tar shards and as loose files.

    Attributes:
        images: Number of images.
        shards: Folder of tar shards.
        files: Folder of loose files.
    """

    images: int
    shards: str
    files: str


def collect_images(inputs: Sequence[str], number: int, options: StorageOptions) -> list[bytes]:
    """Return up to ``number`` encoded images of the inputs; drawn ones without inputs."""
    if not inputs:
        return [draw_photograph(seed) for seed in range(min(number, _DRAWN_IMAGES))]
    return list(itertools.islice(_read_images(inputs, Storage(options)), number))


def _read_images(inputs: Sequence[str], storage: Storage) -> Iterator[bytes]:
    layout = Layout(chunk_images=256, chunk_bytes=1 << 26)
    listing = list_sources(inputs, "auto", storage)
    for shard in plan_shards(listing, space_id="", layout=layout, commits={}, retired={}).embed:
        for chunk in read_chunks(shard, storage=storage, options=ReadOptions()):
            yield from (bytes(record.data) for record in chunk.records if record.status == "ok")


def draw_photograph(seed: int, size: tuple[int, int] = _DRAWN_SIZE) -> bytes:
    """Return a JPEG with detail at every scale, about as large as a photograph of its size."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3))
    for cells in (3, 12, 48, 192):
        coarse = rng.normal(size=(cells, cells, 3)) * 160 / cells**0.5
        image = [
            Image.fromarray(coarse[..., c].astype(np.float32)).resize(
                size, Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        pixels += np.stack([np.asarray(channel) for channel in image], axis=-1)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_samples(
    images: Sequence[bytes], number: int, folder: Path, *, per_shard: int
) -> SampleSet:
    """Write ``number`` images, again from the first when there are fewer."""
    shards, files = folder / "shards", folder / "files"
    shards.mkdir(parents=True)
    files.mkdir()
    endless = itertools.cycle(images)
    for start in range(0, number, per_shard):
        names = [f"{index:07d}.jpg" for index in range(start, min(start + per_shard, number))]
        members = list(zip(names, endless, strict=False))
        write_shard(shards / f"{start:07d}.tar", members)
        for name, data in members:
            (files / name).write_bytes(data)
    return SampleSet(number, str(shards), str(files))


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar shard of named images."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
