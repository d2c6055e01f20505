"""From what a lookup found to what an answer shows."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.index.search.generation import Snapshot
from pipeline.index.search.search_index import IndexInfo, Neighbour
from pipeline.index.search.values import to_json
from pipeline.records import Classes
from pipeline.service.schema import ClassScore, Part, Result, encode_vector

HIDDEN_COLUMNS = frozenset({"shard", "row", "offset", "nbytes", "sha256", "norm"})
"""Columns that answers leave out: where the data lies is nobody's business outside."""


def list_public_columns(info: IndexInfo) -> pa.Schema:
    """Return the columns that answers show and filters may name; JSON has no place for bytes."""
    return pa.schema(
        [
            item
            for item in info.columns
            if item.name not in HIDDEN_COLUMNS and not _is_binary(item.type)
        ]
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def show_columns(hit: Neighbour) -> dict[str, Any]:
    """Return the metadata that an answer shows of a row."""
    hidden = HIDDEN_COLUMNS | {"key"}
    return {
        name: to_json(value)
        for name, value in hit.columns.items()
        if name not in hidden and not isinstance(value, bytes)
    }


def make_results(
    hits: Sequence[Neighbour], snapshot: Snapshot, include: Sequence[Part]
) -> list[Result]:
    """Return what an answer shows of neighbours; reads the vectors if they are included."""
    vectors = [snapshot.vector(hit.key) if "vector" in include else None for hit in hits]
    return [
        Result(
            key=hit.key,
            score=hit.score,
            metadata=show_columns(hit) if "metadata" in include else None,
            vector_base64=None if vector is None else encode_vector(vector),
        )
        for hit, vector in zip(hits, vectors, strict=True)
    ]


def make_classes(classes: Classes | None) -> list[ClassScore] | None:
    """Return what an answer shows of the classes of an image."""
    if classes is None:
        return None
    pairs = zip(classes[0].tolist(), classes[1].tolist(), strict=True)
    return [ClassScore(index=i, probability=round(p, 6)) for i, p in pairs]
