"""One self-contained page that shows queries and their neighbours as pictures."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_HIDDEN = {"key", "shard", "row", "offset", "nbytes", "sha256", "norm", "width", "height"}
_MAX_VALUE = 80


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
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        short = text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"
        rows.append(f"<dt>{html.escape(name)}</dt><dd>{html.escape(short)}</dd>")
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


_STYLE = """
:root{color-scheme:light dark;--bg:#f6f5f2;--card:#fff;--ink:#1c1b19;--soft:#6d6a63;--line:#e2dfd8;
--accent:#2f6f5e;--frame:#ebe8e1}
@media (prefers-color-scheme:dark){:root{--bg:#161614;--card:#201f1d;--ink:#efece5;--soft:#a29d92;
--line:#33312d;--accent:#7cc4ac;--frame:#2a2926}}
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
