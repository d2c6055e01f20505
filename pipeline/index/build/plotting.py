"""The map of a generation: taken over without what is gone, or drawn anew from its live rows."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.index.build.draft import Build, Draft
from pipeline.index.faiss.codes import Floats
from pipeline.index.files import FileStore
from pipeline.index.manifest import FileInfo, Manifest, SegmentInfo
from pipeline.index.map import MAX_POINTS, MapPoints, draw_map, read_map, write_map
from pipeline.index.search.keys import Keys
from pipeline.index.vectors import Flags, open_vectors

LOG = logging.getLogger("pipeline.index")

MIN_POINTS_SHARE = 0.9
"""A map with fewer points than this share of what there could be is drawn anew."""


def take_over_map(
    files: FileStore, parent: Manifest, dead: Mapping[str, Flags]
) -> FileInfo | MapPoints | None:
    """Return the parent's map without the points whose rows are gone; None where it has none.

    A point goes with its row: an image that was replaced has another vector, and lies elsewhere.

    Args:
        files: The index.
        parent: The generation that the map belongs to.
        dead: Rows of its segments that are deleted, those of this run included.
    """
    points = read_map(parent.map, files)
    if points is None:
        return None
    live = np.zeros(len(points.keys), bool)
    for segment in parent.segments:
        keys, bits = Keys(segment, files), dead.get(segment.id)
        rows = [keys.find_row(key) for key in points.keys]
        live |= [row is not None and (bits is None or not bits[row]) for row in rows]
    return parent.map if live.all() else points.keep(live)


def settle_map(build: Build, draft: Draft, generation: str) -> FileInfo | None:
    """Return the map of a draft, written if it is new; None, and a warning, if that fails.

    The map is only to look at, so nothing that is wrong with it stops a build.
    """
    path = f"generations/{generation}/map.json"
    try:
        if isinstance(draft.map, FileInfo):
            return draft.map
        enough = MIN_POINTS_SHARE * min(MAX_POINTS, draft.rows)
        if draft.map is not None and len(draft.map.keys) >= enough:
            return write_map(draft.map, path, build.files)
        vectors, keys = sample_rows(build.files, draft.segments, draft.dead, dim=build.source.dim)
        return draw_map(vectors, keys, path=path, files=build.files)
    except Exception as error:
        LOG.warning("going on without a map of the collection: %s: %s", type(error).__name__, error)
        return None


def sample_rows(
    files: FileStore, segments: Sequence[SegmentInfo], dead: Mapping[str, Flags], *, dim: int
) -> tuple[Floats, list[str]]:
    """Return vectors (n, dim) and keys of up to ``MAX_POINTS`` live rows, drawn at random."""
    live = [np.flatnonzero(~dead.get(s.id, np.zeros(s.rows, bool))) for s in segments]
    ends = np.cumsum([len(rows) for rows in live])
    random = np.random.default_rng(0)
    drawn = np.sort(random.choice(ends[-1], min(MAX_POINTS, int(ends[-1])), replace=False))
    vectors, keys = [np.zeros((0, dim), np.float32)], []
    for segment, rows, end in zip(segments, live, ends, strict=True):
        own = drawn[(drawn >= end - len(rows)) & (drawn < end)]
        picked = rows[own - (end - len(rows))]
        stored = open_vectors(files.fetch(segment.files["vectors"]), segment, dim)
        vectors.append(np.asarray(stored[picked], np.float32))
        column = pq.ParquetFile(files.fetch(segment.files["keys"])).read(["key"]).column("key")
        keys += column.cast(pa.large_string()).take(pa.array(picked)).to_pylist()
    return np.concatenate(vectors), keys
