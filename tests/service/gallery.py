"""A real collection: a tar of pictures, its embeddings as the embed job commits them, an index."""

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.benchmark import synthetic
from pipeline.config import IndexConfig
from pipeline.images.decode import image_digest
from pipeline.index.job import build_index
from pipeline.index.search.search_index import SearchIndex
from pipeline.output.info import OutputInfo, claim_output
from pipeline.records import Layout, Space
from pipeline.storage import Storage

DIM = 16
COLOURS = ("crimson", "orange", "seagreen", "teal", "navy", "purple")
STORAGE = Storage()
CARRIED = pa.schema([("colour", pa.string()), ("price", pa.float64()), ("cls", pa.string())])


AWKWARD_KEYS = (
    *("./dot.jpg", "../up.jpg", ".", "a//b.jpg", "trail/", "x", "x/image", "image"),
    *("line\nbreak.jpg", "end\n", "what?.jpg", "tag#1.jpg", "100%.jpg", "%2e%2e/p.jpg", "%00"),
    *("sp ace+plus&and=1.jpg", "ünï 😀.jpg", "back\\slash.jpg", "<b>&\"'.jpg"),
)
"""Ends of keys that paths, browsers and servers tidy up, cut off or read as something else."""


def make_space(dim: int = DIM) -> Space:
    return synthetic.make_space(dim, backbone="resnetv2_50.a1h_in1k", image_size=32)


def make_image(number: int, *, format: str = "JPEG") -> bytes:  # noqa: A002
    """Return a picture that shows its number on its colour."""
    image = Image.new("RGB", (240, 160 + 20 * (number % 5)), COLOURS[number % len(COLOURS)])
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 20, 210, 150), outline="white", width=6)
    draw.text((90, 50), str(number), fill="white", font_size=60)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def make_vectors(numbers: range, *, dim: int = DIM) -> np.ndarray:
    """Return a vector per picture; those of one colour lie together."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(len(COLOURS), dim))
    noise = np.stack([np.random.default_rng(100 + n).normal(size=dim) for n in numbers])
    return (centres[[n % len(COLOURS) for n in numbers]] + 0.3 * noise).astype(np.float32)


@dataclass
class Gallery:
    """Pictures under a folder; shards are added, and then indexed."""

    folder: Path
    images: int = 0
    shards: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        layout = Layout(chunk_images=100, chunk_bytes=1 << 26, carry=tuple(CARRIED.names))
        info = OutputInfo(make_space(), layout, CARRIED, "weights.safetensors", "random:0")
        self.info = claim_output(self.output, info, STORAGE)
        (self.folder / "photos").mkdir(parents=True, exist_ok=True)

    @property
    def output(self) -> str:
        return str(self.folder / "embeddings")

    @property
    def index(self) -> str:
        return str(self.folder / "index")

    def add_shard(
        self, number_of_images: int, *, keys: list[str] | None = None, broken: tuple[int, ...] = ()
    ) -> str:
        """Write a tar of new pictures and commit its embeddings; rows in ``broken`` failed."""
        name = f"photos/{len(self.shards):03d}.tar"
        numbers = range(self.images, self.images + number_of_images)
        table = self._write_tar(name, numbers, keys or [f"{n:05d}.jpg" for n in numbers])
        table = break_rows(table, broken)
        shard_id = f"{len(self.shards):016x}"
        commit = synthetic.make_commit(
            name,
            self.info.space.id,
            shard_id=shard_id,
            source=str(self.folder / name),
            root=str(self.folder),
            sequence=len(self.shards) + 1,
            modified_s=1.79e9,
        )
        synthetic.commit_table(
            self.output, table, commit=commit, part_rows=number_of_images, storage=STORAGE
        )
        self.shards.append(name)
        self.images += number_of_images
        return name

    def remove_shard(self, number: int) -> None:
        """Take the commit of a shard away, as a run does whose source is gone."""
        STORAGE.delete([f"{self.output}/commits/{number:016x}.json"])

    def build(self) -> None:
        build_index(IndexConfig(index=self.index, embeddings=self.output, workers="local"))

    def open(self) -> SearchIndex:
        return SearchIndex.open(self.index)

    def _write_tar(self, name: str, numbers: range, keys: list[str]) -> pa.Table:
        rng = np.random.default_rng(5)
        rows = []
        path = self.folder / name
        with tarfile.open(path, "w") as tar:
            for row, number in enumerate(numbers):
                data = make_image(number)
                member = tarfile.TarInfo(f"{number:05d}.jpg")
                member.size = len(data)
                offset = tar.offset + 512
                tar.addfile(member, io.BytesIO(data))
                rows.append(
                    {
                        "key": f"{name}/{keys[row]}",
                        "shard": str(path),
                        "row": row,
                        "status": "ok",
                        "error": None,
                        "width": 240,
                        "height": 160 + 20 * (number % 5),
                        "offset": offset,
                        "nbytes": len(data),
                        "sha256": image_digest(data),
                        "embedding": make_vectors(range(number, number + 1))[0],
                        "colour": COLOURS[number % len(COLOURS)],
                        "price": None if number % 7 == 0 else float(rng.integers(1, 100)),
                        "cls": str(number % 3),
                    }
                )
        return pa.Table.from_pylist(rows, schema=self.info.schema)


def break_rows(table: pa.Table, broken: tuple[int, ...]) -> pa.Table:
    """Return rows as they are where some images could not be decoded."""
    rows = table.to_pylist()
    for row in broken:
        rows[row] |= {"status": "truncated", "error": "cut off", "embedding": None}
    return pa.Table.from_pylist(rows, schema=table.schema)
