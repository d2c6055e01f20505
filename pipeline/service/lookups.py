"""Lookups: from a request to its neighbours, whatever the transport."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import AbortError, ObjectMissingError, PipelineError, QueryError, RecordError
from pipeline.images import ImageLimits, image_digest
from pipeline.index.search import IndexInfo, Neighbour, SearchIndex, Snapshot
from pipeline.index.where import compile_where
from pipeline.records import Classes, Embedding, Space
from pipeline.service.batching import MicroBatcher
from pipeline.service.metrics import Metrics
from pipeline.service.models import (
    ClassScore,
    Query,
    Result,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    Took,
    decode_base64,
    decode_vector,
    encode_vector,
)
from pipeline.service.pictures import Picture, PictureCache, render_picture
from pipeline.service.problems import Problem

if TYPE_CHECKING:  # torch comes with it, and a service without image queries needs none
    from pipeline.embedder import EmbedderOptions

log = logging.getLogger(__name__)

ReadImage = Callable[[Neighbour], bytes]
"""Returns the encoded image of a row; the row says where it lies."""

HIDDEN_COLUMNS = frozenset({"shard", "row", "offset", "nbytes", "sha256", "norm"})
"""Columns that answers leave out: where the data lies is nobody's business outside."""


class ImageEmbedder(Protocol):
    """Turns images into vectors of one space; ``pipeline.embedder.Embedder`` is one."""

    space: Space
    options: "EmbedderOptions"

    def embed_images(self, images: Sequence[bytes]) -> list[Embedding]:
        """Return what became of each image."""
        ...

    def close(self) -> None:
        """Let threads end."""
        ...


@dataclass(frozen=True, slots=True)
class LookupLimits:
    """How much work is taken on.

    Attributes:
        max_waiting: Searches that may wait; a quarter of it for images and embeddings.
        search_workers: Batches of searches that run at the same time.
        picture_workers: Pictures that are read and scaled at the same time.
        max_batch: Most queries in one batch.
        cache_bytes: Bound of the cached pictures.
        images: What is decoded at all.
        refresh_s: Time between two looks for a newer generation; 0 never looks.
    """

    max_waiting: int = 256
    search_workers: int = 2
    picture_workers: int = 4
    max_batch: int = 32
    cache_bytes: int = 256 * 2**20
    images: ImageLimits = field(default_factory=lambda: ImageLimits(max_pixels=50_000_000))
    refresh_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Search:
    """One vector to search for; searches of equal ``group`` run as one."""

    snapshot: Snapshot
    vector: np.ndarray
    k: int
    where: pc.Expression | None
    exact: bool

    @property
    def group(self) -> tuple[object, ...]:
        # The size of k takes part, so that one huge answer does not slow all others down.
        return id(self.snapshot), str(self.where), self.exact, (self.k - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Target:
    """A query that has become a vector.

    Attributes:
        vector: float32, shape (dim,).
        own_key: Key of the indexed image it is, left out of the answer; None for other vectors.
        classes: Classes of the query image, where known.
    """

    vector: np.ndarray
    own_key: str | None = None
    classes: Classes | None = None


class Lookups:
    """Answers requests from the newest generation; belongs to one event loop."""

    def __init__(
        self,
        index: SearchIndex,
        *,
        embedder: ImageEmbedder | None,
        read_image: ReadImage | None,
        limits: LookupLimits,
        metrics: Metrics,
    ) -> None:
        """Answer from ``index``.

        Args:
            index: The index, open.
            embedder: Makes vectors of query images; None turns image queries off.
            read_image: Fetches indexed images; None shows none.
            limits: How much work is taken on.
            metrics: Where times and sizes are counted.
        """
        self.index = index
        self.embedder = embedder
        self.limits = limits
        self.metrics = metrics
        self.shows_images = read_image is not None
        self.is_open = True
        self._read_image = read_image
        self._cache = PictureCache(limits.cache_bytes)
        self._refresher: asyncio.Task[None] | None = None
        few = max(4, limits.max_waiting // 4)
        self._searches = MicroBatcher(
            "searches",
            self._run_searches,
            max_batch=limits.max_batch,
            max_waiting=limits.max_waiting,
            workers=limits.search_workers,
        )
        # Scans get one thread of their own: they must not hold up the quick searches.
        self._scans = MicroBatcher(
            "exact searches", self._run_searches, max_batch=limits.max_batch, max_waiting=few
        )
        self._embeds = MicroBatcher(
            "images", self._run_embed, max_batch=limits.max_batch, max_waiting=few
        )
        self._pictures = MicroBatcher(
            "pictures",
            self._run_pictures,
            max_batch=1,
            max_waiting=limits.max_waiting,
            workers=limits.picture_workers,
        )
        self._watch()

    def _watch(self) -> None:
        watch = self.metrics.watch
        watch("pipeline_index_rows", "Live rows.", lambda: self.index.info.rows)
        watch(
            "pipeline_generation_created_seconds",
            "When the served generation was built, seconds since 1970.",
            lambda: self.index.info.created_s,
        )
        watch("pipeline_image_cache_bytes", "Cached pictures.", lambda: self._cache.size_bytes)
        for batcher in (self._searches, self._scans, self._embeds, self._pictures):
            name = f"pipeline_waiting_{batcher.name.replace(' ', '_')}"
            watch(name, "Items in the queue.", partial(len, batcher))

    def start(self) -> None:
        """Begin to look for newer generations."""
        if self.limits.refresh_s > 0:
            self._refresher = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Finish what waits, and take nothing new."""
        self.is_open = False
        if self._refresher is not None:
            self._refresher.cancel()
        for batcher in (self._embeds, self._searches, self._scans, self._pictures):
            await batcher.close()
        if self.embedder is not None:
            self.embedder.close()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self.limits.refresh_s)
            await self.refresh()

    async def refresh(self) -> bool:
        """Open a newer generation if there is one; a failure keeps the old one in service."""
        try:
            changed = await asyncio.to_thread(self.index.refresh)
        except PipelineError as error:
            log.warning("kept the open generation: %s", error)
            self.metrics.refreshes.labels("failed").inc()
            return False
        self.metrics.refreshes.labels("changed" if changed else "unchanged").inc()
        if changed:
            log.info("opened generation %s", self.index.info.generation)
        return changed

    async def search(self, request: SearchRequest, snapshot: Snapshot) -> SearchResponse:
        """Return the neighbours that ``request`` asks for.

        Raises:
            Problem: The request does not fit this index, or too much is waiting.
        """
        started_s = time.perf_counter()
        where = _check_options(request, snapshot)
        target = await self._resolve(request.query, snapshot)
        return await self.search_target(target, request, snapshot, where=where, started_s=started_s)

    async def search_image(
        self, image: bytes, options: SearchOptions, snapshot: Snapshot
    ) -> SearchResponse:
        """Return the neighbours of an encoded image.

        Raises:
            Problem: The image cannot be embedded, or as for ``search``.
        """
        started_s = time.perf_counter()
        where = _check_options(options, snapshot)
        target = await self._embed_query(image, snapshot, where="image")
        return await self.search_target(target, options, snapshot, where=where, started_s=started_s)

    async def search_target(
        self,
        target: Target,
        options: SearchOptions,
        snapshot: Snapshot,
        *,
        where: pc.Expression | None = None,
        started_s: float | None = None,
    ) -> SearchResponse:
        """Return the neighbours of a vector.

        Args:
            target: The vector.
            options: How to search and what to return.
            snapshot: Where to search.
            where: The filter of ``options``, compiled.
            started_s: When work on the request began, ``time.perf_counter()``.

        Raises:
            Problem: As for ``search``.
        """
        embedded_s = time.perf_counter()
        wanted = options.offset + options.k
        k = wanted + (target.own_key is not None)
        batcher = self._scans if options.exact else self._searches
        hits = await batcher.submit(_Search(snapshot, target.vector, k, where, options.exact))
        hits = [hit for hit in hits if hit.key != target.own_key][options.offset : wanted]
        floor = -2.0 if options.score_threshold is None else options.score_threshold
        shown = {name: name in options.include for name in ("metadata", "vector")}
        return SearchResponse(
            generation=snapshot.info.generation,
            results=[make_result(hit, snapshot, **shown) for hit in hits if hit.score >= floor],
            classes=make_classes(target.classes) if "classes" in options.include else None,
            took=Took(
                embed_ms=_milliseconds(embedded_s, started_s or embedded_s),
                search_ms=_milliseconds(time.perf_counter(), embedded_s),
            ),
        )

    async def embed(self, image: bytes, *, where: str) -> Embedding:
        """Return the embedding of an encoded image; its status is ``ok``.

        Args:
            image: The encoded image.
            where: Where it stood in the request, for messages.

        Raises:
            Problem: 422 the image cannot be decoded, 501 there is no embedder, 503 overloaded.
        """
        if self.embedder is None:
            raise Problem(
                501, "no_image_queries", detail="this service has no backbone loaded", where=where
            )
        embedding = await self._embeds.submit(image)
        if embedding.vector is None:
            detail = f"the image is {embedding.status.replace('_', ' ')}: {embedding.error}"
            raise Problem(422, "invalid_image", detail=detail, where=where)
        return embedding

    async def picture(self, hit: Neighbour, size: int | None) -> Picture:
        """Return an indexed image, or its thumbnail with a longest side of ``size`` pixels.

        Raises:
            Problem: 404 images are not shown, 410 the source has changed, 503 it cannot be read.
        """
        if self._read_image is None:
            raise Problem(404, "images_off", detail="this service does not show images")
        return await self._pictures.submit((hit, size))

    async def _resolve(self, query: Query, snapshot: Snapshot) -> Target:
        if query.key:
            vector = await asyncio.to_thread(snapshot.vector, query.key)
            return Target(vector, own_key=query.key)
        if query.image_base64:
            where = "query.image_base64"
            image = decode_base64(query.image_base64, where=where)
            return await self._embed_query(image, snapshot, where=where)
        if query.vector:
            where = "query.vector"
            with np.errstate(over="ignore"):  # becomes infinite, which is refused below
                vector = np.asarray(query.vector, dtype=np.float32)
        else:
            where = "query.vector_base64"
            vector = decode_vector(query.vector_base64, where=where)
        check_vector(vector, snapshot.info.dim, where=where)
        return Target(vector)

    async def _embed_query(self, image: bytes, snapshot: Snapshot, *, where: str) -> Target:
        embedding = await self.embed(image, where=where)
        vector = cast(np.ndarray, embedding.vector)
        if self.embedder is None or self.embedder.space.id != snapshot.info.space.id:
            detail = "the index has moved to another space; the service has to be restarted"
            raise Problem(503, "backbone_outdated", detail=detail)
        check_vector(vector, snapshot.info.dim, where=where)
        return Target(vector, classes=embedding.classes)

    def _run_searches(self, searches: list[_Search]) -> list[list[Neighbour] | Exception]:
        groups: dict[tuple[object, ...], list[int]] = {}
        for position, search in enumerate(searches):
            groups.setdefault(search.group, []).append(position)
        answers: list[list[Neighbour] | Exception] = [[] for _ in searches]
        self.metrics.batch_size.labels("search").observe(len(searches))
        for positions in groups.values():
            with self.metrics.stage_s.labels("search").time():
                found = _search_group([searches[p] for p in positions])
            for position, hits in zip(positions, found, strict=True):
                answers[position] = hits
        return answers

    def _run_embed(self, images: list[bytes]) -> list[Embedding]:
        if self.embedder is None:
            raise RuntimeError("no embedder")
        self.metrics.batch_size.labels("embed").observe(len(images))
        with self.metrics.stage_s.labels("embed").time():
            return self.embedder.embed_images(images)

    def _run_pictures(
        self, wanted: list[tuple[Neighbour, int | None]]
    ) -> list[Picture | Exception]:
        return [self._load_picture(hit, size) for hit, size in wanted]

    def _load_picture(self, hit: Neighbour, size: int | None) -> Picture | Exception:
        digest = bytes(hit.columns["sha256"])
        etag = digest.hex() if size is None else f"{digest.hex()}-{size}"
        cached = self._cache.get(f'"{etag}"')
        self.metrics.image_cache.labels("hit" if cached else "miss").inc()
        if cached is not None:
            return cached
        try:
            with self.metrics.stage_s.labels("image").time():
                picture = self._render(hit, size, digest)
        except (AbortError, RecordError, Problem) as error:
            return _explain_picture(error)
        self._cache.put(picture)
        return picture

    def _render(self, hit: Neighbour, size: int | None, digest: bytes) -> Picture:
        if self._read_image is None:
            raise RuntimeError("no reader of images")
        data = self._read_image(hit)
        if image_digest(data) != digest:
            raise Problem(410, "source_changed", detail="the source has changed since indexing")
        return render_picture(data, size, etag=digest.hex(), limits=self.limits.images)


def _search_group(searches: list[_Search]) -> list[list[Neighbour] | Exception]:
    first = searches[0]
    vectors = np.stack([search.vector for search in searches])  # (B, dim)
    k = max(search.k for search in searches)
    try:
        found = first.snapshot.search(vectors, k, first.where, exact=first.exact)
    except Exception as error:
        return [error] * len(searches)
    return [hits[: search.k] for hits, search in zip(found, searches, strict=True)]


def _explain_picture(error: Exception) -> Exception:
    """Say what went wrong with a picture without saying where it lies."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ObjectMissingError):
        return Problem(410, "source_gone", detail="the source of this image is gone")
    if isinstance(error, RecordError):
        return Problem(422, "invalid_image", detail=f"the indexed image is {error.status}")
    log.warning("cannot read an indexed image: %s", error)
    detail = "the source of this image cannot be read now"
    return Problem(503, "source_unreadable", detail=detail, retry_after_s=5)


def _milliseconds(end_s: float, start_s: float) -> float:
    return round(1000 * (end_s - start_s), 3)


def list_public_columns(info: IndexInfo) -> pa.Schema:
    """Return the columns that answers show and filters may name."""
    return pa.schema([item for item in info.columns if item.name not in HIDDEN_COLUMNS])


def show_columns(hit: Neighbour) -> dict[str, Any]:
    """Return the metadata that an answer shows of a row."""
    hidden = HIDDEN_COLUMNS | {"key"}
    return {name: value for name, value in hit.columns.items() if name not in hidden}


def check_vector(vector: np.ndarray, dim: int, *, where: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        Problem: 422, wrong length, values that are not finite, or no direction.
    """
    problem = None
    if len(vector) != dim:
        problem = f"the vector has {len(vector)} values; this index has {dim}"
    elif not np.isfinite(vector).all():
        problem = "the vector has values that are not finite as float32"
    elif not float(np.linalg.norm(vector.astype(np.float64))) > 1e-6:
        problem = "the vector is zero, and so has no direction"
    if problem is not None:
        raise Problem(422, "invalid_vector", detail=problem, where=where)


def _check_options(options: SearchOptions, snapshot: Snapshot) -> pc.Expression | None:
    """Return the compiled filter of ``options``, and refuse what does not fit the index."""
    expected = snapshot.info.space.id
    if options.space is not None and options.space != expected:
        detail = f"the index holds vectors of space {expected}; embed the query as it was"
        raise Problem(409, "other_space", detail=detail, where="space")
    if options.filter is None:
        return None
    try:
        return compile_where(options.filter, list_public_columns(snapshot.info))
    except QueryError as error:
        raise Problem(422, "invalid_filter", detail=str(error), where="filter") from error


def make_classes(classes: Classes | None) -> list[ClassScore] | None:
    """Return what an answer shows of the classes of an image."""
    if classes is None:
        return None
    pairs = zip(classes[0].tolist(), classes[1].tolist(), strict=True)
    return [ClassScore(index=i, probability=round(p, 6)) for i, p in pairs]


def make_result(hit: Neighbour, snapshot: Snapshot, *, metadata: bool, vector: bool) -> Result:
    """Return what an answer shows of a hit."""
    stored = snapshot.vector(hit.key) if vector else None
    return Result(
        key=hit.key,
        score=round(hit.score, 6),
        metadata=show_columns(hit) if metadata else None,
        vector_base64=None if stored is None else encode_vector(stored),
    )
