"""Crops as Arrow rows, for decoding on other nodes than those with GPUs."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.embed_job.wire import Load
from pipeline.images.host import Crop
from pipeline.records import Chunk, Embedding

CROPS_SCHEMA = pa.schema([pa.field("header", pa.binary()), pa.field("pixels", pa.large_binary())])


def pack_crops(load: Load, outcomes: Sequence[Crop | Embedding]) -> pa.Table:
    """Return a load whose images have become crops, as a table of one row.

    Args:
        load: What the crops were made from.
        outcomes: A crop for each of its records, in order, or what became of it instead.
    """
    crops = [outcome for outcome in outcomes if isinstance(outcome, Crop)]
    empty = np.zeros((0, 0, 3), np.uint8)
    pixels = np.stack([crop.pixels for crop in crops]) if crops else empty
    bare = [replace(o, pixels=empty) if isinstance(o, Crop) else o for o in outcomes]
    chunks = [(shard, _leave_behind(chunk)) for shard, chunk in load.chunks]
    header = pickle.dumps((replace(load, chunks=chunks), bare, pixels.shape))
    buffer = pa.py_buffer(pixels.reshape(-1))
    offsets = pa.py_buffer(np.array([0, pixels.size], np.int64))
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])
    return pa.table([pa.array([header], pa.binary()), column], schema=CROPS_SCHEMA)


def _leave_behind(chunk: Chunk) -> Chunk:
    records = [replace(r, data=b"", left_behind_bytes=len(r.data)) for r in chunk.records]
    return replace(chunk, records=records)


def unpack_crops(table: pa.Table) -> Iterator[tuple[Load, list[Crop | Embedding]]]:
    """Yield what ``pack_crops`` packed; the pixels stay where the table holds them."""
    for row, header in enumerate(table.column("header").to_pylist()):
        load, bare, shape = pickle.loads(header)
        buffer = table.column("pixels")[row].as_buffer()
        pixels = iter(np.frombuffer(buffer, np.uint8).reshape(shape))
        outcomes = [replace(o, pixels=next(pixels)) if isinstance(o, Crop) else o for o in bare]
        yield load, outcomes
