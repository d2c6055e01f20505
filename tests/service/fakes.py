"""A collection in memory, behind the same seam as the real one; and a server to ask over HTTP."""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import uvicorn
from PIL import Image, ImageDraw

from pipeline.images import ImageLimits, image_digest
from pipeline.records import Embedding, Space
from pipeline.service.app import Access, create_app
from pipeline.service.collection import GenerationInfo, Hit, MapPoints
from pipeline.service.guard import GuardLimits
from pipeline.service.keys import ApiKeys
from pipeline.service.lookups import LookupLimits, Lookups
from pipeline.service.metrics import Metrics

DIM = 8
COLOURS = ("red", "orange", "green", "teal", "navy", "purple")


def make_space(dim: int = DIM) -> Space:
    return Space(
        backbone="resnetv2_50.a1h_in1k",
        weights_sha256="0" * 64,
        image_size=32,
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        exif="apply",
        decode="exact",
        precision="fp32",
        dim=dim,
    )


def make_image(number: int, *, format: str = "JPEG") -> bytes:  # noqa: A002
    """Return a picture that shows its number on its colour."""
    image = Image.new("RGB", (240, 160 + 20 * (number % 5)), COLOURS[number % len(COLOURS)])
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 20, 210, 150), outline="white", width=6)
    draw.text((90, 50), str(number), fill="white", font_size=60)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def make_rows(number_of_rows: int) -> pa.Table:
    rng = np.random.default_rng(5)
    rows = []
    for number in range(number_of_rows):
        data = make_image(number)
        rows.append(
            {
                "key": f"photos/{number // 100:03d}.tar/{number:05d}.jpg",
                "shard": "/secret/place/photos.tar",
                "row": number,
                "width": 240,
                "height": 160 + 20 * (number % 5),
                "offset": number,
                "nbytes": len(data),
                "sha256": image_digest(data),
                "colour": COLOURS[number % len(COLOURS)],
                "price": None if number % 7 == 0 else float(rng.integers(1, 100)),
                "cls": str(number % 3),
            }
        )
    return pa.Table.from_pylist(rows)


@dataclass
class FakeSnapshot:
    """Exact search over arrays."""

    info: GenerationInfo
    table: pa.Table
    vectors: np.ndarray
    with_map: bool = True
    searched: list[int] = field(default_factory=list)
    hold: threading.Event | None = None

    def search(self, vectors, k, *, where, exact):
        if self.hold is not None:
            self.hold.wait(20)
        self.searched.append(len(vectors))
        table = self.table.append_column("_position", pa.array(range(len(self.table))))
        kept = table if where is None else table.filter(where)
        positions = np.array(kept.column("_position").to_pylist(), dtype=np.int64)
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        scores = units @ self.vectors[positions].T
        order = np.argsort(-scores, axis=1)[:, :k]
        return [
            [self._hit(positions[i], scores[q, i]) for i in order[q]] for q in range(len(vectors))
        ]

    def _hit(self, position, score):
        row = self.table.slice(int(position), 1).to_pylist()[0]
        return Hit(row["key"], float(score), row)

    def _find(self, key):
        keys = self.table.column("key").to_pylist()
        return keys.index(key) if key in keys else None

    def vector(self, key):
        position = self._find(key)
        return None if position is None else self.vectors[position]

    def find(self, key):
        position = self._find(key)
        return None if position is None else self._hit(position, 1.0)

    def sample(self, n):
        positions = np.random.default_rng().permutation(len(self.table))[:n]
        return [self._hit(position, 1.0) for position in positions]

    def read_map(self):
        if not self.with_map:
            return None
        low, high = self.vectors[:, :2].min(axis=0), self.vectors[:, :2].max(axis=0)
        xy = ((self.vectors[:, :2] - low) / (high - low)).astype(np.float32)
        return MapPoints("pca", self.table.column("key").to_pylist(), xy)


class FakeCollection:
    """Holds a snapshot, and the next one until somebody refreshes."""

    def __init__(self, snapshot: FakeSnapshot) -> None:
        self.snapshot = snapshot
        self.next: FakeSnapshot | Exception | None = None
        self.closed = False

    def current(self) -> FakeSnapshot:
        return self.snapshot

    def refresh(self) -> bool:
        if isinstance(self.next, Exception):
            raise self.next
        if self.next is None:
            return False
        self.snapshot, self.next = self.next, None
        return True

    def close(self) -> None:
        self.closed = True


def make_snapshot(number_of_rows: int = 60, *, generation: str = "1-abc") -> FakeSnapshot:
    table = make_rows(number_of_rows)
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(len(COLOURS), DIM))
    vectors = centres[np.arange(number_of_rows) % len(COLOURS)]
    vectors = vectors + 0.3 * rng.normal(size=vectors.shape)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    info = GenerationInfo(
        generation=generation,
        rows=number_of_rows,
        space=make_space(),
        kind="flat",
        recall=1.0,
        created_s=1_790_000_000.0,
        newest_image_s=1_789_000_000.0,
        schema=table.schema,
    )
    return FakeSnapshot(info, table, vectors)


class FakeEmbedder:
    """Embeds a picture by its mean colour; looks at real bytes, so hostile ones fail as usual."""

    def __init__(self, *, top_k_classes: int = 0) -> None:
        self.space = make_space()
        self.options = SimpleNamespace(top_k_classes=top_k_classes)
        self.batches: list[int] = []
        self.closed = False

    def embed_images(self, images: Sequence[bytes]) -> list[Embedding]:
        self.batches.append(len(images))
        return [self._embed(data) for data in images]

    def _embed(self, data: bytes) -> Embedding:
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:
            return Embedding("unsupported", "no known image format")
        mean = np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) / 255
        vector = np.resize(mean, DIM).astype(np.float32) + 0.01
        count = self.options.top_k_classes
        classes = (np.arange(count, dtype=np.int16), np.full(count, 0.1, np.float32))
        return Embedding("ok", vector=vector, classes=classes if count else None)

    def close(self) -> None:
        self.closed = True


@dataclass
class Service:
    """A running service and what it is made of."""

    url: str
    collection: FakeCollection
    lookups: Lookups
    server: uvicorn.Server
    images_read: list[int]


def make_access(**changes) -> Access:
    limits = GuardLimits(max_body_bytes=2_000_000, timeout_s=20.0)
    known = {name: changes.pop(name) for name in list(changes) if name in ("keys", "cors_origins")}
    return Access(
        known.get("keys", ApiKeys()),
        replace(limits, **changes),
        **{k: v for k, v in known.items() if k != "keys"},
    )


@contextlib.contextmanager
def run_service(
    *,
    snapshot: FakeSnapshot | None = None,
    embedder: FakeEmbedder | None = None,
    access: Access | None = None,
    limits: LookupLimits | None = None,
    read_image=None,
) -> Iterator[Service]:
    """Serve on a free loopback port until the block ends."""
    images_read: list[int] = []

    def read(row):
        images_read.append(row["row"])
        return make_image(row["row"])

    collection = FakeCollection(snapshot or make_snapshot())
    metrics = Metrics()
    lookups = Lookups(
        collection,
        embedder=embedder,
        read_image=read_image or read,
        limits=limits or LookupLimits(refresh_s=0, images=ImageLimits(max_pixels=1_000_000)),
        metrics=metrics,
    )
    app = create_app(lookups, metrics, access or make_access())
    with serve_app(app) as (url, server):
        yield Service(url, collection, lookups, server, images_read)


@contextlib.contextmanager
def serve_app(app) -> Iterator[tuple[str, uvicorn.Server]]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
