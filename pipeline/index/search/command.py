"""A search from the command line: a picture, a key or vectors in; a table, JSON or a page out."""

import base64
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import SearchConfig
from pipeline.errors import PipelineError, QueryError
from pipeline.images.decode import ImageLimits
from pipeline.images.thumbnails import make_thumbnail
from pipeline.index.faiss.codes import Floats
from pipeline.index.search.search_index import IndexInfo, Neighbour, SearchIndex
from pipeline.index.search.values import to_json
from pipeline.input.reader import read_record_bytes
from pipeline.records import describe_job
from pipeline.storage import Storage

THUMBNAIL_PX = 256

_HIDDEN = {"key", "shard", "row", "offset", "nbytes", "sha256", "norm", "width", "height"}
_MAX_VALUE = 80

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f8;--card:#ffffff;--ink:#16191b;--soft:#57606a;
--line:#d9dee2;--accent:#0f766e;--frame:#eceff1}
@media (prefers-color-scheme:dark){
:root{--bg:#101314;--card:#191d1f;--ink:#eceff0;--soft:#9aa4ab;
--line:#2c3236;--accent:#2dd4bf;--frame:#0b0d0e}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 24px 64px}
header{border-bottom:1px solid var(--line);padding-bottom:16px;margin-bottom:28px}
h1{font-size:22px;font-weight:600;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
header p{margin:0;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
section{display:grid;grid-template-columns:minmax(180px,240px) 1fr;gap:28px;padding:8px 0 36px}
section+section{border-top:1px solid var(--line);padding-top:28px}
.query{position:sticky;top:24px;align-self:start}
.query .card{outline:2px solid var(--accent);outline-offset:-1px}
ol{list-style:none;margin:0;padding:0;display:grid;gap:16px;
grid-template-columns:repeat(auto-fill,minmax(170px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden;
padding-bottom:12px}
.frame{aspect-ratio:1;background:var(--frame);display:grid;place-items:center;overflow:hidden}
.frame img{width:100%;height:100%;object-fit:contain;display:block}
.problem{color:var(--soft);font-size:12px;padding:12px;margin:0;text-align:center;
overflow-wrap:anywhere}
.line{display:flex;align-items:center;gap:8px;padding:10px 12px 2px;font-size:12px;
color:var(--soft);font-variant-numeric:tabular-nums}
.bar{flex:1;height:4px;border-radius:2px;background:var(--frame);overflow:hidden}
.bar i{display:block;height:100%;background:var(--accent)}
.score{color:var(--ink);font-weight:600}
.key{padding:2px 12px 0;font-size:13px;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 8px;margin:6px 12px 0;font-size:12px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.none{color:var(--soft)}
@media (max-width:720px){section{grid-template-columns:1fr}.query{position:static;max-width:240px}}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p>{index} · {generation} · {facts}</p></header>
{body}
</main>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a search: its name, vector and picture.

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
    """The report of a search.

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
        head = describe_job("search") | {"index": self.index, "generation": self.generation}
        body = results[0] if len(results) == 1 else {"results": results}
        return head | {"seconds": round(self.seconds, 6)} | body


@dataclass(frozen=True, slots=True)
class Card:
    """One picture with what is known of it.

    Attributes:
        title: Its key, or the path of a query.
        thumbnail: A JPEG; None where the picture could not be read.
        problem: Why there is no thumbnail.
        score: Cosine to the query; None for the query itself.
        columns: Stored columns; the carried ones are shown.
        source: Where the picture lies, shown as a tooltip.
    """

    title: str
    thumbnail: bytes | None
    problem: str = ""
    score: float | None = None
    columns: Mapping[str, Any] | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One query and what was found.

    Attributes:
        query: What was searched with.
        found: The neighbours, best first.
    """

    query: Card
    found: Sequence[Card]


def _to_dict(neighbour: Neighbour) -> dict[str, Any]:
    values = {name: to_json(value) for name, value in neighbour.columns.items()}
    return {"key": neighbour.key, "score": neighbour.score} | values


def find_neighbours(config: SearchConfig) -> SearchReport:
    """Search as ``config`` says; what ``jobs/search.py`` calls.

    Raises:
        QueryError: The query or the filter does not fit the index.
        UnknownKeyError: The index does not hold the key.
        ObjectMissingError: There is no index, picture or file at that URI.
        CorruptionError: A file of the index is damaged.
    """
    storage = Storage(config.storage)
    index = SearchIndex.open(
        config.index,
        storage,
        generation=config.generation,
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_size.nbytes,
    )
    queries = read_queries(config, index, storage)
    started = time.perf_counter()
    if config.key is not None and not config.exact:
        found = [index.neighbours_of(config.key, config.k, config.where)]
    else:
        vectors = np.stack([query.vector for query in queries])
        extra = 1 if config.key is not None else 0
        lines = index.search(vectors, config.k + extra, config.where, exact=config.exact)
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
        return [Query(config.image, index.embed(data, name=config.image), data)]
    assert config.vector is not None
    name = Path(config.vector).name
    vectors = read_vector_file(config.vector, storage)
    if len(vectors) == 1:
        return [Query(name, vectors[0])]
    return [Query(f"{name}[{row}]", vector) for row, vector in enumerate(vectors)]


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
    recall = info.measured.get("recall")
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
            sha256=neighbour.columns["sha256"],
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


def render_page(answers: Sequence[Answer], *, index: str, generation: str, facts: str) -> str:
    """Return the page as HTML; nothing in it is fetched from anywhere.

    Args:
        answers: What to show.
        index: URI of the index.
        generation: The generation that answered.
        facts: One line about it: rows, kind, recall.
    """
    body = "\n".join(map(_render_answer, answers))
    title = f"Neighbours of {answers[0].query.title}" if len(answers) == 1 else "Neighbours"
    return _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        index=html.escape(index),
        generation=html.escape(generation),
        facts=html.escape(facts),
        body=body,
    )


def _render_answer(answer: Answer) -> str:
    found = "\n".join(_render_card(card, rank) for rank, card in enumerate(answer.found, 1))
    nothing = "" if answer.found else '<p class="none">Nothing found.</p>'
    return (
        f'<section>\n<div class="query">{_render_card(answer.query, 0)}</div>\n'
        f"<ol>{found}</ol>{nothing}\n</section>"
    )


def _render_card(card: Card, rank: int) -> str:
    title = html.escape(card.title)
    tag = "li" if rank else "div"
    label = f'<span class="rank">{rank}</span>' if rank else '<span class="rank">query</span>'
    score = "" if card.score is None else _render_score(card.score)
    return (
        f'<{tag} class="card" title="{html.escape(card.source or card.title)}">'
        f'<div class="frame">{_render_picture(card)}</div>'
        f'<div class="line">{label}{score}</div>'
        f'<div class="key">{title}</div>{_render_columns(card.columns or {})}</{tag}>'
    )


def _render_picture(card: Card) -> str:
    if card.thumbnail is None:
        return f'<p class="problem">{html.escape(card.problem or "no picture")}</p>'
    data = base64.b64encode(card.thumbnail).decode()
    return f'<img alt="{html.escape(card.title)}" src="data:image/jpeg;base64,{data}">'


def _render_score(score: float) -> str:
    width = max(0.0, min(1.0, score)) * 100
    return (
        f'<span class="bar"><i style="width:{width:.1f}%"></i></span>'
        f'<span class="score">{score:.4f}</span>'
    )


def _render_columns(columns: Mapping[str, Any]) -> str:
    rows = []
    for name, value in columns.items():
        if name in _HIDDEN or value is None:
            continue
        printed = to_json(value)
        text = printed if isinstance(printed, str) else json.dumps(printed)
        short = text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"
        rows.append(f"<dt>{html.escape(name)}</dt><dd>{html.escape(short)}</dd>")
    return f"<dl>{''.join(rows)}</dl>" if rows else ""
