"""A running service over real HTTP on a free loopback port, and an embedder at our own seam."""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import uvicorn
from PIL import Image

from pipeline.config import ServeConfig
from pipeline.images.decode import ImageLimits
from pipeline.index.search.search_index import SearchIndex
from pipeline.inference.embedder import EmbedderOptions
from pipeline.input.reader import read_record_bytes
from pipeline.records import Embedding
from pipeline.service.access import ApiKeys
from pipeline.service.app import Access, create_app
from pipeline.service.guard import GuardLimits
from pipeline.service.lookups import LookupLimits, Lookups
from pipeline.service.metrics import Metrics
from pipeline.service.pictures import PictureLoader
from pipeline.service.server import make_server
from service.gallery import DIM, STORAGE, make_space

LIMITS = LookupLimits(refresh_s=0)
GUARD = GuardLimits(max_body_bytes=2_000_000, max_concurrent=500, timeout_s=20.0)


class ColourEmbedder:
    """Embeds a picture by its mean colour: no backbone, but real bytes, so broken ones fail."""

    def __init__(self, *, top_k_classes: int = 0, hold: threading.Event | None = None) -> None:
        self.space = make_space()
        self.options = EmbedderOptions(top_k_classes=top_k_classes)
        self.hold = hold
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.closed = False

    def embed_images(self, images: Sequence[bytes]) -> list[Embedding]:
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(30)
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
    index: SearchIndex
    lookups: Lookups
    server: uvicorn.Server
    images_read: list[str]


def read_image(hit):
    return read_record_bytes(
        hit.shard, row=hit.row, offset=hit.offset, nbytes=hit.nbytes, sha256=None, storage=STORAGE
    )


@contextlib.contextmanager
def run_service(
    index: SearchIndex,
    *,
    embedder: ColourEmbedder | None = None,
    limits: LookupLimits = LIMITS,
    keys: ApiKeys = ApiKeys(),  # noqa: B008  # frozen
    read=read_image,
    **guard,
) -> Iterator[Service]:
    """Serve ``index`` until the block ends; ``guard`` changes what a request may cost."""
    images_read: list[str] = []

    def note_read(hit):
        images_read.append(hit.key)
        return read(hit)

    metrics = Metrics()
    pictures = PictureLoader(
        note_read, limits=ImageLimits(), cache_bytes=1_000_000, metrics=metrics
    )
    lookups = Lookups(
        index,
        embedder=embedder,
        pictures=pictures if read else None,
        limits=limits,
        metrics=metrics,
    )
    access = Access(keys, replace(GUARD, **guard))
    with serve_app(create_app(lookups, metrics, access)) as (url, server):
        yield Service(url, index, lookups, server, images_read)


@contextlib.contextmanager
def serve_app(app, **settings) -> Iterator[tuple[str, uvicorn.Server]]:
    """Run the server of ``jobs/serve.py --local`` in a thread; it ends with the block."""
    server = make_server(app, ServeConfig(index="unused", port=0, **settings))
    sock = server.config.bind_socket()
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
