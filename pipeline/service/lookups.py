"""Lookups: from a request to its neighbours, whatever the transport."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import PipelineError
from pipeline.index.search.generation import Snapshot
from pipeline.index.search.search_index import Neighbour, SearchIndex
from pipeline.records import Classes, Embedding, Space
from pipeline.service.batching import MicroBatcher, Search, run_searches
from pipeline.service.metrics import Metrics
from pipeline.service.pictures import Picture, PictureLoader
from pipeline.service.problems import Problem
from pipeline.service.queries import check_vector, compile_options, read_vector
from pipeline.service.results import make_classes, make_results
from pipeline.service.review import Review
from pipeline.service.schema import (
    Query,
    Result,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    Took,
    decode_base64,
)

if TYPE_CHECKING:  # torch comes with it, and a service without image queries needs none
    from pipeline.inference.embedder import EmbedderOptions

log = logging.getLogger(__name__)


class ImageEmbedder(Protocol):
    """Turns images into vectors of one space; ``pipeline.inference.embedder.Embedder`` is one."""

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
        refresh_s: Time between two looks for a newer generation; 0 never looks.
    """

    max_waiting: int = 256
    search_workers: int = 2
    picture_workers: int = 4
    max_batch: int = 32
    refresh_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Target:
    """A query that has become a vector.

    Attributes:
        vector: float32, shape (dim,).
        own_keys: Keys of the indexed images it was made of, left out of the answer.
        classes: Classes of the query image, where known.
    """

    vector: np.ndarray
    own_keys: frozenset[str] = frozenset()
    classes: Classes | None = None


def mix_examples(like: Sequence[str], unlike: Sequence[str], snapshot: Snapshot) -> Target:
    """Return the direction of some images, turned away from others: Rocchio's, with a half.

    Raises:
        UnknownKeyError: The index does not hold one of them.
        Problem: 422, they cancel each other out.
    """
    mean = np.mean([snapshot.vector(key) for key in like], axis=0)
    if unlike:
        mean = mean - np.mean([snapshot.vector(key) for key in unlike], axis=0) / 2
    vector = np.asarray(mean, np.float32)
    check_vector(vector, snapshot.info.dim, where="query.like")
    return Target(vector, own_keys=frozenset([*like, *unlike]))


class Lookups:
    """Answers requests from the newest generation; belongs to one event loop."""

    def __init__(
        self,
        index: SearchIndex,
        *,
        embedder: ImageEmbedder | None,
        pictures: PictureLoader | None,
        limits: LookupLimits,
        metrics: Metrics,
    ) -> None:
        """Answer from ``index``.

        Args:
            index: The index, open.
            embedder: Makes vectors of query images; None turns image queries off.
            pictures: Loads indexed images; None shows none.
            limits: How much work is taken on.
            metrics: Where times and sizes are counted.
        """
        self.index = index
        self.embedder = embedder
        self.pictures = pictures
        self.limits = limits
        self.metrics = metrics
        self.review = Review(index.storage)
        self.is_open = True
        self._refresher: asyncio.Task[None] | None = None
        few = max(4, limits.max_waiting // 4)
        search, batch = partial(run_searches, metrics=metrics), limits.max_batch
        self._searches = MicroBatcher(
            "searches",
            search,
            max_batch=batch,
            max_waiting=limits.max_waiting,
            workers=limits.search_workers,
        )
        # Scans get one thread of their own: they must not hold up the quick searches.
        self._scans = MicroBatcher("exact searches", search, max_batch=batch, max_waiting=few)
        self._embeds = MicroBatcher("images", self._run_embed, max_batch=batch, max_waiting=few)
        self._shows = MicroBatcher(
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
        if self.pictures is not None:
            cache = self.pictures.cache
            watch("pipeline_image_cache_bytes", "Cached pictures.", lambda: cache.size_bytes)
        for batcher in (self._searches, self._scans, self._embeds, self._shows):
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
        for batcher in (self._embeds, self._searches, self._scans, self._shows):
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
        where = await asyncio.to_thread(compile_options, request, snapshot)
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
        where = await asyncio.to_thread(compile_options, options, snapshot)
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
        k = wanted + len(target.own_keys)
        batcher = self._scans if options.exact else self._searches
        hits = await batcher.submit(Search(snapshot, target.vector, k, where, options.exact))
        hits = [hit for hit in hits if hit.key not in target.own_keys][options.offset : wanted]
        floor = -2.0 if options.score_threshold is None else options.score_threshold
        hits = [hit for hit in hits if hit.score >= floor]
        found_s = time.perf_counter()
        return SearchResponse(
            generation=snapshot.info.generation,
            results=await self._make_results(hits, snapshot, options),
            classes=make_classes(target.classes) if "classes" in options.include else None,
            took=Took(
                embed_ms=round(1000 * (embedded_s - (started_s or embedded_s)), 3),
                search_ms=round(1000 * (found_s - embedded_s), 3),
            ),
        )

    async def _make_results(
        self, hits: Sequence[Neighbour], snapshot: Snapshot, options: SearchOptions
    ) -> list[Result]:
        if "vector" in options.include:  # read from disk
            return await asyncio.to_thread(make_results, hits, snapshot, options.include)
        return make_results(hits, snapshot, options.include)

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
        if self.pictures is None:
            raise Problem(404, "images_off", detail="this service does not show images")
        return await self._shows.submit((hit, size))

    async def _resolve(self, query: Query, snapshot: Snapshot) -> Target:
        if query.key:
            vector = await asyncio.to_thread(snapshot.vector, query.key)
            return Target(vector, own_keys=frozenset([query.key]))
        if query.like:
            return await asyncio.to_thread(mix_examples, query.like, query.unlike, snapshot)
        if query.image_base64:
            where = "query.image_base64"
            image = decode_base64(query.image_base64, where=where)
            return await self._embed_query(image, snapshot, where=where)
        return Target(read_vector(query, snapshot.info.dim))

    async def _embed_query(self, image: bytes, snapshot: Snapshot, *, where: str) -> Target:
        embedding = await self.embed(image, where=where)
        vector = cast(np.ndarray, embedding.vector)
        if self.embedder is None or self.embedder.space.id != snapshot.info.space.id:
            detail = "the index has moved to another space; the service has to be restarted"
            raise Problem(503, "backbone_outdated", detail=detail)
        check_vector(vector, snapshot.info.dim, where=where)
        return Target(vector, classes=embedding.classes)

    def _run_embed(self, images: list[bytes]) -> list[Embedding]:
        if self.embedder is None:
            raise RuntimeError("no embedder")
        self.metrics.batch_size.labels("embed").observe(len(images))
        with self.metrics.stage_s.labels("embed").time():
            return self.embedder.embed_images(images)

    def _run_pictures(
        self, wanted: list[tuple[Neighbour, int | None]]
    ) -> list[Picture | Exception]:
        if self.pictures is None:
            raise RuntimeError("no pictures")
        return [self.pictures.load(hit, size) for hit, size in wanted]
