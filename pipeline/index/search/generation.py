"""An opened generation: its segments searched as one, safe for many threads."""

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.errors import (
    CorruptionError,
    QueryError,
    UnknownKeyError,
)
from pipeline.index.faiss.codec import Codec
from pipeline.index.faiss.codes import Doubles, Floats, Rows
from pipeline.index.faiss.package import set_threads
from pipeline.index.files import REMEDY, FileStore
from pipeline.index.manifest import Manifest, SearchParams
from pipeline.index.map import MapPoints, read_map
from pipeline.index.search.keys import choose_similar
from pipeline.index.search.neighbour import IndexInfo, Neighbour, check_vectors, make_neighbour
from pipeline.index.search.segment import DEPTHS, Mask, Request, Segment, open_codec, widen
from pipeline.index.search.where import Where, compile_where, serialise_where
from pipeline.index.vectors import read_bits

MAX_CANDIDATES = 32
"""Keys that an unknown one is compared with, letter by letter."""

MAX_K = DEPTHS[-1]

KEPT_MASKS = 16
SUGGESTIONS = 3

_ROW_BITS = 40

Line = tuple[Doubles, Rows, Rows]
"""Cosines, segment numbers and rows of one query, each (k,)."""

Found = tuple[Doubles, Rows, Rows]
"""The same of several queries, each (n, k)."""


class Generation:
    """One opened generation.

    Attributes:
        manifest: What was published.
        segments: Its segments, opened.
        live: Rows that are not deleted, by segment; None where all are live.
    """

    def __init__(self, manifest: Manifest, files: FileStore, *, known: Sequence[Segment] = ()):
        """Open a generation; segments in ``known`` that it still has are taken over.

        Raises:
            CorruptionError: A file is missing or damaged.
        """
        self.manifest = manifest
        self.codec, reusable = _pick_codec(manifest, files, known)
        self.segments = [
            reusable.get(info.id) or Segment(info, self.codec, files) for info in manifest.segments
        ]
        self.live = [self._read_live(segment, files) for segment in self.segments]
        self._points = read_map(manifest.map, files)

    @cached_property
    def map(self) -> MapPoints | None:
        """A sample of the live rows in two dimensions; None where there is none."""
        if self._points is None:
            return None
        return self._points.keep(
            np.array([self.find(key) is not None for key in self._points.keys], bool)
        )

    def _read_live(self, segment: Segment, files: FileStore) -> Mask | None:
        tombstones = self.manifest.tombstones.get(segment.info.id)
        if tombstones is None:
            return None
        dead = read_bits(files, tombstones.file, segment.info.rows)
        if int(dead.sum()) != tombstones.rows:
            raise CorruptionError(
                f"{tombstones.file.path} does not hold {tombstones.rows} rows; {REMEDY}"
            )
        return Mask.from_flags(~dead, chosen=False)

    @property
    def columns(self) -> pa.Schema:
        """Stored columns but the vector.

        A column that held nothing but nulls when a segment was written has the type ``null``
        there, and in later segments the type that it got.
        """
        return pa.unify_schemas([segment.keys.schema for segment in self.segments])

    def search(
        self,
        vectors: Floats,
        k: int,
        *,
        params: SearchParams | None = None,
        masks: Sequence[Mask | None] | None = None,
    ) -> Found:
        """Return cosines, segment numbers and rows of the nearest rows, best first.

        Equal cosines are ordered by segment and row, and the answer for a larger ``k`` begins with
        that for a smaller one: where looking further finds rows that should have come before, they
        are left out, or come last where there are no others.

        Args:
            vectors: Unit vectors, float32 (n, dim).
            k: Neighbours wanted, at least 1.
            params: How far to look; as tuned where None.
            masks: The rows that may be found, by segment; the live ones where None.

        Returns:
            (n, m) each with m at most ``k``; where a query has fewer, the score is -inf.
        """
        params = params or self.manifest.search
        masks = self.live if masks is None else masks
        wanted = min(k, self._count_allowed(masks))
        found = self._search_deep(vectors, wanted, depth=DEPTHS[0], params=params, masks=masks)
        for shallow, depth in pairwise(DEPTHS):
            if wanted <= shallow:
                break
            deeper = self._search_deep(
                vectors, depth + shallow, depth=depth + shallow, params=params, masks=masks
            )
            found = _extend(found, deeper, min(wanted, depth))
        return found

    def _count_allowed(self, masks: Sequence[Mask | None]) -> int:
        pairs = zip(self.segments, masks, strict=True)
        return sum(segment.info.rows if mask is None else mask.rows for segment, mask in pairs)

    def _search_deep(
        self,
        vectors: Floats,
        k: int,
        *,
        depth: int,
        params: SearchParams,
        masks: Sequence[Mask | None],
    ) -> Found:
        """Search for ``depth`` neighbours and return the best ``k``."""
        allowed = self._count_allowed(masks)
        k, total = min(k, depth, allowed), sum(segment.info.rows for segment in self.segments)
        params = widen(params, depth, share=max(1, allowed) / total)
        found = self._search_once(vectors, k, depth=depth, params=params, masks=masks)
        short = np.isneginf(found[0]).any(axis=1)
        if short.any() and self.codec.lists:  # few rows lie in the lists that were looked into
            params = replace(params, nprobe=self.codec.lists)
            again = self._search_once(vectors[short], k, depth=depth, params=params, masks=masks)
            for old, new in zip(found, again, strict=True):
                np.asarray(old)[short] = new
        return found

    def _search_once(
        self,
        vectors: Floats,
        k: int,
        *,
        depth: int,
        params: SearchParams,
        masks: Sequence[Mask | None],
    ) -> Found:
        rotated = self.codec.rotate(vectors)
        lists = self.codec.find_lists(rotated, params.nprobe)
        request = Request(vectors, rotated, k, depth, params, lists)
        pairs = zip(self.segments, masks, strict=True)
        return _merge([segment.search(request, mask) for segment, mask in pairs], k)

    def scan(self, vectors: Floats, k: int, *, masks: Sequence[Mask | None] | None = None) -> Found:
        """Return what ``search`` does, by comparing with every vector."""
        masks = self.live if masks is None else masks
        pairs = zip(self.segments, masks, strict=True)
        found = [segment.scan(vectors, k, mask) for segment, mask in pairs]
        return _merge(found, min(k, self._count_allowed(masks)))

    def sample(
        self,
        number: int,
        random: np.random.Generator,
        *,
        masks: Sequence[Mask | None] | None = None,
    ) -> tuple[Rows, Rows]:
        """Return segment numbers and rows of up to ``number`` live rows, without repetition.

        Args:
            number: Rows wanted.
            random: Draws them.
            masks: The rows to draw from, by segment; the live ones where None.
        """
        sizes = [segment.info.rows for segment in self.segments]
        offsets = np.cumsum([0, *sizes])
        if masks is not None:
            chosen = [
                offset + (np.arange(size) if mask is None else np.flatnonzero(mask.flags))
                for offset, size, mask in zip(offsets, sizes, masks, strict=False)
            ]
            kept = np.concatenate(chosen)
            drawn = random.choice(kept, min(len(kept), number), replace=False)
            numbers = np.searchsorted(offsets, drawn, side="right") - 1
            return numbers, drawn - offsets[numbers]
        extra = sum(tombstones.rows for tombstones in self.manifest.tombstones.values())
        drawn = random.choice(offsets[-1], min(offsets[-1], number + extra), replace=False)
        numbers = np.searchsorted(offsets, drawn, side="right") - 1
        rows = drawn - offsets[numbers]
        pairs = zip(numbers, rows, strict=True)
        live = [_is_live(self.live[n], r) for n, r in pairs]
        return numbers[live][:number], rows[live][:number]

    def make_masks(self, where: ds.Expression) -> list[Mask | None]:
        """Return the live rows that a filter keeps, by segment.

        Raises:
            QueryError: The filter does not fit the columns.
        """
        masks: list[Mask | None] = []
        columns = self.columns
        for segment, live in zip(self.segments, self.live, strict=True):
            kept = segment.keys.filter_rows(where, columns)
            flags = kept if live is None else kept & live.flags
            masks.append(Mask.from_flags(flags, chosen=True))
        return masks

    def find(self, key: str) -> tuple[int, int] | None:
        """Return segment number and row of a live key, or None."""
        for number, (segment, live) in enumerate(zip(self.segments, self.live, strict=True)):
            row = segment.keys.find_row(key)
            if row is not None and _is_live(live, row):
                return number, row
        return None

    def suggest(self, key: str) -> list[str]:
        """Return live keys that resemble an unknown one, the most similar first."""
        candidates = (
            segment.keys.read_key(row)
            for segment, live in zip(self.segments, self.live, strict=True)
            for row in segment.keys.find_similar(key)
            if _is_live(live, row)
        )
        return choose_similar(key, islice(candidates, MAX_CANDIDATES))


class Snapshot:
    """One open generation; stays usable while somebody holds it, whatever is published."""

    def __init__(self, uri: str, opened: Generation, *, threads: int) -> None:
        self.info = describe_generation(uri, opened)
        self.opened = opened
        self._threads = threads
        self._masks: dict[bytes, list[Mask | None]] = {}
        self._lock = threading.Lock()

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        where: Where | None = None,
        *,
        exact: bool = False,
        params: SearchParams | None = None,
    ) -> list[list[Neighbour]]:
        """Return the nearest rows of each vector, best first.

        Args:
            vectors: (n, dim) or one vector (dim,), of any positive length: cosine is what counts.
            k: Neighbours per vector, 1 to 10,000; where there are fewer rows, fewer come back.
            where: Only rows that fulfil it: ``"cls = dress and width >= 400"``,
                ``{"cls": "dress"}``, or an Arrow expression, ``pc.field("cls") == "dress"``, whose
                comparisons are Arrow's own.
            exact: Compare with every vector instead of looking them up.
            params: How far to look; as tuned where None.

        Raises:
            QueryError: The vectors have another width, or are not finite, or zero; ``k`` is out
                of range; the filter does not fit the columns.
        """
        queries = check_vectors(vectors, self.info)
        if not 1 <= k <= MAX_K:
            raise QueryError(f"k is {k}; ask for 1 to {MAX_K} neighbours")
        set_threads(self._threads)
        masks = None if where is None else self._find_masks(where)
        if exact:
            found = self.opened.scan(queries, k, masks=masks)
        else:
            found = self.opened.search(queries, k, params=params, masks=masks)
        return self._describe_rows(*found)

    def neighbours_of(self, key: str, k: int = 10, where: Where | None = None) -> list[Neighbour]:
        """Return the nearest rows of an image of the index, itself left out.

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        found = self.search(self.vector(key)[None], min(k + 1, MAX_K), where)[0]
        return [neighbour for neighbour in found if neighbour.key != key][:k]

    def vector(self, key: str) -> Floats:
        """Return the stored unit vector of an image, float32 (dim,).

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        number, row = self._locate(key)
        vectors = self.opened.segments[number].read_vectors(np.array([row]))
        return vectors.reshape(-1)

    def find(self, key: str) -> Neighbour:
        """Return the row of an image, with score 1.

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        number, row = self._locate(key)
        place = np.array([[number]]), np.array([[row]])
        return self._describe_rows(np.ones((1, 1)), *place)[0][0]

    def find_all(self, keys: Sequence[str]) -> list[Neighbour | None]:
        """Return the rows of images, with score 1, and None for each that the index lacks."""
        places = [self.opened.find(key) for key in keys]
        known = [place for place in places if place is not None]
        numbers, rows = np.array(known, np.int64).reshape(-1, 2).T
        found = iter(self._describe_rows(np.ones((1, len(known))), numbers[None], rows[None])[0])
        return [None if place is None else next(found) for place in places]

    def sample(
        self, n: int, *, seed: int | None = None, where: Where | None = None
    ) -> list[Neighbour]:
        """Return up to ``n`` rows drawn at random, without repetition, with score 1.

        Args:
            n: Rows wanted.
            seed: Makes the draw repeatable.
            where: Only rows that fulfil it.
        """
        masks = None if where is None else self._find_masks(where)
        numbers, rows = self.opened.sample(n, np.random.default_rng(seed), masks=masks)
        scores = np.ones((1, len(rows)))
        return self._describe_rows(scores, numbers[None], rows[None])[0]

    def list_fulfilling(self, keys: Sequence[str], where: Where) -> list[bool]:
        """Tell of each key whether its row fulfils a filter; False where there is no such row."""
        masks = self._find_masks(where)
        places = [self.opened.find(key) for key in keys]
        return [place is not None and _is_live(masks[place[0]], place[1]) for place in places]

    def _locate(self, key: str) -> tuple[int, int]:
        found = self.opened.find(key)
        if found is None:
            near = self.opened.suggest(key)[:SUGGESTIONS]
            hint = f"; similar keys: {', '.join(map(repr, near))}" if near else ""
            raise UnknownKeyError(f"no image with the key {key!r} in {self.info.uri!r}{hint}")
        return found

    def _find_masks(self, where: Where) -> list[Mask | None]:
        compiled = compile_where(where, self.info.columns)
        try:
            key = serialise_where(compiled)
        except pa.ArrowNotImplementedError:
            return self.opened.make_masks(compiled)
        with self._lock:
            masks = self._masks.get(key)
        if masks is None:
            masks = self.opened.make_masks(compiled)
            with self._lock:
                while len(self._masks) >= KEPT_MASKS:
                    del self._masks[next(iter(self._masks))]
                self._masks[key] = masks
        return masks

    def _describe_rows(self, scores: Doubles, numbers: Rows, rows: Rows) -> list[list[Neighbour]]:
        segments = self.opened.segments
        return [
            [
                make_neighbour(score, segments[number].keys.read_row(row))
                for score, number, row in zip(*line, strict=True)
                if math.isfinite(score)
            ]
            for line in zip(scores.tolist(), numbers.tolist(), rows.tolist(), strict=True)
        ]


def _is_live(mask: Mask | None, row: int) -> bool:
    return mask is None or bool(mask.flags[row])


def _merge(found: Sequence[tuple[Doubles, Rows]], k: int) -> Found:
    """Return the best of what each segment found; -inf where there are fewer than ``k``."""
    scores = np.concatenate([scores for scores, _ in found], axis=1)
    rows = np.concatenate([rows for _, rows in found], axis=1)
    widths = [rows.shape[1] for _, rows in found]
    numbers = np.broadcast_to(np.repeat(np.arange(len(found)), widths), rows.shape)
    # Stable: within a segment equal scores are in the order of rows already.
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best, owners, rows = (np.take_along_axis(v, order, axis=1) for v in (scores, numbers, rows))
    missing = ((0, 0), (0, k - best.shape[1]))
    return (
        np.pad(best, missing, constant_values=-np.inf),
        np.pad(owners, missing),
        np.pad(rows, missing, constant_values=-1),
    )


def _extend(found: Found, deeper: Found, k: int) -> Found:
    """Return ``found`` and after it what else a deeper search found, up to ``k`` of each query."""
    width = k - found[0].shape[1]
    lines = zip(zip(*found, strict=True), zip(*deeper, strict=True), strict=True)
    chosen = np.stack([_choose_next(known, more)[:width] for known, more in lines])
    scores, numbers, rows = (
        np.concatenate([old, np.take_along_axis(new, chosen, axis=1)], axis=1)
        for old, new in zip(found, deeper, strict=True)
    )
    return scores, numbers, rows


def _choose_next(known: Line, more: Line) -> Rows:
    """Return the places in ``more`` of unknown rows; those that rank after the known ones first."""
    [before, after] = [numbers << _ROW_BITS | rows for _, numbers, rows in (known, more)]
    new = ~np.isin(after, before)
    last = known[0][-1], before[-1]
    late = (more[0] > last[0]) | ((more[0] == last[0]) & (after < last[1]))
    return np.concatenate([np.flatnonzero(new & ~late), np.flatnonzero(new & late)])


def _pick_codec(
    manifest: Manifest, files: FileStore, known: Sequence[Segment]
) -> tuple[Codec, dict[str, Segment]]:
    # Not by id alone: a segment that was built again after damage lies in other files.
    reusable = {segment.info.id: segment for segment in known if segment.info in manifest.segments}
    for segment in reusable.values():  # a segment's id includes its codec's
        return segment.codec, reusable
    return open_codec(files, manifest.codec, manifest.dim), {}


def describe_generation(uri: str, opened: Generation) -> IndexInfo:
    """Return what describes an opened generation."""
    manifest = opened.manifest
    return IndexInfo(
        uri=uri,
        generation=manifest.generation,
        rows=manifest.rows,
        dim=manifest.dim,
        space=manifest.embeddings.space,
        embeddings=manifest.embeddings.uri,
        weights=manifest.embeddings.weights,
        kind=manifest.codec.kind,
        factory=manifest.codec.factory,
        search=manifest.search,
        measured=manifest.measured,
        created_s=manifest.created_s,
        newest_image_s=manifest.embeddings.newest_image_s,
        segments=len(manifest.segments),
        deleted=sum(item.rows for item in manifest.tombstones.values()),
        size_bytes=sum(file.size_bytes for file in manifest.list_files()),
        columns=opened.columns,
    )
