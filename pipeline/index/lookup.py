"""A search from the command line: a picture, a key or vectors in; a table, JSON or a page out."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.config import SearchConfig
from pipeline.errors import PipelineError, QueryError
from pipeline.images import ImageLimits
from pipeline.index.engine import Floats
from pipeline.index.page import Answer, Card, render_page
from pipeline.index.search import IndexInfo, Neighbour, SearchIndex
from pipeline.readers import read_record_bytes
from pipeline.storage import Storage
from pipeline.thumbnails import make_thumbnail

THUMBNAIL_PX = 256


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched with.

    Attributes:
        name: Key, path, or row of a file.
        vector: The vector, (dim,).
        picture: The encoded query picture, if there is one.
    """

    name: str
    vector: Floats
    picture: bytes | None = None


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What a search found.

    Attributes:
        index: URI of the index.
        generation: The generation that answered.
        queries: What was searched with.
        found: The neighbours of each query, best first.
        seconds: Time of the search itself.
        info: What describes the generation.
    """

    index: str
    generation: str
    queries: Sequence[Query]
    found: Sequence[Sequence[Neighbour]]
    seconds: float
    info: IndexInfo

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values; one query has ``neighbours``, several results."""
        results = [
            {"query": query.name, "neighbours": [_to_dict(item) for item in found]}
            for query, found in zip(self.queries, self.found, strict=True)
        ]
        head = {"job": "search", "index": self.index, "generation": self.generation}
        body = results[0] if len(results) == 1 else {"results": results}
        return head | {"seconds": round(self.seconds, 6)} | body


def _to_dict(neighbour: Neighbour) -> dict[str, Any]:
    values = {name: _to_json(value) for name, value in neighbour.columns.items()}
    return {"key": neighbour.key, "score": round(neighbour.score, 6)} | values


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, (str, int, float, list, type(None))) else str(value)


def find_neighbours(config: SearchConfig, where: pc.Expression | None = None) -> SearchReport:
    """Search as ``config`` says; what ``jobs/search.py`` calls.

    Args:
        config: The settings.
        where: ``config.where`` as an expression.

    Raises:
        QueryError: The query does not fit the index.
        UnknownKeyError: The index does not hold the key.
        ObjectMissingError: There is no index, picture or file at that URI.
        CorruptionError: A file of the index is damaged.
    """
    storage = Storage(config.storage)
    index = SearchIndex.open(
        config.index, storage, generation=config.generation, cache_dir=config.cache_dir
    )
    queries = read_queries(config, index, storage)
    started = time.perf_counter()
    if config.key is not None and not config.exact:
        found = [index.neighbours_of(config.key, config.k, where)]
    else:
        vectors = np.stack([query.vector for query in queries])
        extra = 1 if config.key is not None else 0
        lines = index.search(vectors, config.k + extra, where, exact=config.exact)
        found = [[n for n in line if n.key != config.key][: config.k] for line in lines]
    seconds = time.perf_counter() - started
    return SearchReport(index.uri, index.info.generation, queries, found, seconds, index.info)


def read_queries(config: SearchConfig, index: SearchIndex, storage: Storage) -> list[Query]:
    """Return what to search with.

    Raises:
        QueryError: The picture cannot be embedded, or the file holds no vectors.
        UnknownKeyError: The index does not hold the key.
    """
    if config.key is not None:
        row = index.snapshot.find(config.key)
        return [Query(config.key, index.vector(config.key), _read_picture(row, storage)[0])]
    if config.image is not None:
        data = storage.read(config.image)
        return [
            Query(
                config.image,
                embed_query(data, config.image, info=index.info, storage=storage),
                data,
            )
        ]
    assert config.vector is not None
    name = Path(config.vector).name
    vectors = read_vector_file(config.vector, storage)
    if len(vectors) == 1:
        return [Query(name, vectors[0])]
    return [Query(f"{name}[{row}]", vector) for row, vector in enumerate(vectors)]


def embed_query(data: bytes, name: str, *, info: IndexInfo, storage: Storage) -> Floats:
    """Embed a picture exactly as the index's images were embedded.

    Raises:
        QueryError: The picture cannot be decoded.
    """
    from pipeline.embedder import Embedder, EmbedderOptions  # torch takes seconds to import

    options = EmbedderOptions(decode_threads=0)
    embedder = Embedder(info.space, weights=info.weights, options=options, storage=storage)
    [embedding] = embedder.embed_images([data])
    embedder.close()
    if embedding.vector is None:
        raise QueryError(f"cannot embed {name!r}: {embedding.status}: {embedding.error}")
    return embedding.vector


def read_vector_file(uri: str, storage: Storage) -> Floats:
    """Read a ``.npy`` file with one vector, or several as rows; never unpickles.

    Raises:
        QueryError: It is no such file.
    """
    data = storage.read(uri)
    try:
        vectors = np.atleast_2d(np.load(io.BytesIO(data), allow_pickle=False))
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(f"its shape is {vectors.shape}")
        return np.asarray(vectors, dtype=np.float32)
    except (ValueError, EOFError, OSError) as error:
        raise QueryError(f"{uri!r} is no .npy file of vectors: {error}") from error


def render_report(report: SearchReport, storage: Storage) -> str:
    """Return a page with the pictures, each read from its shard by range."""
    answers = []
    for query, found in zip(report.queries, report.found, strict=True):
        shown = Card(query.name, *_make_thumbnail(query.picture, "no picture: a bare vector"))
        answers.append(Answer(shown, [_make_card(item, storage) for item in found]))
    info = report.info
    recall = info.measured.get("recall@10")
    facts = f"{info.rows:,} images · {info.kind}" + (f" · recall@10 {recall:.3f}" if recall else "")
    return render_page(answers, index=report.index, generation=report.generation, facts=facts)


def _make_card(neighbour: Neighbour, storage: Storage) -> Card:
    data, problem = _read_picture(neighbour, storage)
    thumbnail, reason = _make_thumbnail(data, problem)
    return Card(
        neighbour.key,
        thumbnail,
        reason,
        neighbour.score,
        neighbour.columns,
        f"{neighbour.shard} row {neighbour.row}",
    )


def _read_picture(neighbour: Neighbour, storage: Storage) -> tuple[bytes | None, str]:
    try:
        data = read_record_bytes(
            neighbour.shard,
            row=neighbour.row,
            offset=neighbour.offset,
            nbytes=neighbour.nbytes,
            storage=storage,
        )
    except PipelineError as error:  # a page without one picture is better than no page
        return None, str(error)
    return data, ""


def _make_thumbnail(data: bytes | None, problem: str) -> tuple[bytes | None, str]:
    if data is None:
        return None, problem
    try:
        return make_thumbnail(data, THUMBNAIL_PX, limits=ImageLimits()), ""
    except PipelineError as error:
        return None, str(error)
