"""Which kind of index: by rows, width, memory and recall, explained in one line.

The simplest kind that answers a query within ``AIM_MS`` on one core is taken; what each would take
is estimated from what was measured on vectors of 1024 dimensions that resemble embeddings:

- comparing with every vector takes 22 ms at 100,000 rows, so ``flat``, which is exact, serves up to
  about 9,700 rows;
- comparing every 1-bit code takes 1.8 ms there and 17 ms at a million, so ``rabitq``, which needs
  no k-means, serves up to about 111,000 rows;
- beyond, inverted lists look at a small share of the codes: 0.6 ms at 100,000 as at a million rows,
  with the same recall, for a build of 450 CPU seconds a million rows instead of 180.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import SettingsError
from pipeline.index.faiss.codec import KINDS

AIM_MS = 2.0
SCAN_NS: Mapping[str, float] = {"flat": 0.205, "rabitq": 0.0175}
"""What comparing one value of one row takes, everything included, for kinds that compare all."""

MIN_SCAN_DIM = 256
"""Narrower rows cost no less: each has a fixed part."""

SEGMENT_ROWS = 20_000_000
LONG_LIST_ROWS = 128
"""Mean list length from which the blocked code layout is faster."""

HNSW_LISTS = 4096
"""Number of lists from which the nearest ones are looked up in a graph rather than scanned."""

MAX_LISTS = 65_536
POINTS_PER_LIST = 32
MAX_PADDING = 1.1
"""Widest padding, as a share, that a fast rotation may cost."""

CODEC_SAMPLE_ROWS = 20_000
TABLE_ROWS = (1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
TABLE_DIMS = (1024, 1984, 2048, 2152)
TABLE_MEMORY_BYTES = (10**9, 8 * 10**9, 256 * 10**9)

_WORDS: Mapping[str, str] = {
    "flat": "compare with every vector",
    "rabitq": "1-bit codes, the best ranked again by stored vectors",
    "ivf-rabitq": "inverted lists of 1-bit codes, the best ranked again by stored vectors",
    "ivf-sq8": "inverted lists of 8-bit codes, the best ranked again by stored vectors",
    "hnsw": "a graph over full vectors",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows are going to be indexed.

    Attributes:
        rows: How many.
        kind: One of ``KINDS``.
        factory: FAISS factory string.
        lists: Number of inverted lists; 0 for kinds without.
        segments: Number of segments to build.
        packed: Whether codes are laid out in blocks.
        memory_bytes: What a process that searches it holds in memory.
        disk_bytes: What all its files take, keys apart.
        sample_rows: Rows to train on.
        reason: Why, in one line.
    """

    rows: int
    kind: str
    factory: str
    lists: int
    segments: int
    packed: bool
    memory_bytes: int
    disk_bytes: int
    sample_rows: int
    reason: str


def make_plan(
    rows: int, dim: int, *, kind: str = "auto", memory_bytes: int, target_recall: float
) -> Plan:
    """Choose how to index ``rows`` vectors of width ``dim``.

    Args:
        rows: Number of vectors, at least 1.
        dim: Their width.
        kind: ``"auto"``, or one of ``KINDS``, which is then taken as it is.
        memory_bytes: What one process may hold, to build and to search.
        target_recall: Share of the true ten nearest neighbours that a search has to find.

    Raises:
        SettingsError: No kind fits into the memory, or an unknown kind.
    """
    if kind not in ("auto", *KINDS):
        raise SettingsError(f"kind is {kind!r}; use auto, {', '.join(KINDS)}")
    chosen = (
        kind
        if kind != "auto"
        else choose_kind(rows, dim, memory_bytes=memory_bytes, target_recall=target_recall)
    )
    lists = count_lists(rows) if chosen.startswith("ivf") else 0
    needed = estimate_memory(chosen, rows, dim)
    if kind == "auto" and needed > memory_bytes:
        raise SettingsError(
            f"{rows:,} rows of {dim} need {show_bytes(needed)} even as 1-bit codes; memory_budget "
            f"is {show_bytes(memory_bytes)}: raise it, or split the input into several indexes"
        )
    segments = count_segments(chosen, rows, dim=dim, memory_bytes=memory_bytes)
    sample = max(POINTS_PER_LIST * lists, CODEC_SAMPLE_ROWS if chosen != "flat" else 0)
    return Plan(
        rows=rows,
        kind=chosen,
        factory=make_factory(chosen, dim, lists),
        lists=lists,
        segments=segments,
        packed=not lists or rows / segments / lists >= LONG_LIST_ROWS,
        memory_bytes=needed,
        disk_bytes=rows * (code_bytes(chosen, dim) + 2 * dim),
        sample_rows=min(rows, sample, max(1, memory_bytes // 2 // (4 * dim))),
        reason=_explain(chosen, kind, rows=rows, dim=dim, memory_bytes=needed),
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """What ``--kind auto`` comes to for one collection.

    Attributes:
        rows: Number of vectors.
        dim: Their width.
        memory_budget_bytes: What one process may hold.
        kind: The kind; None where nothing fits.
        memory_bytes: What a process that searches it holds; 0 where nothing fits.
        reason: The line that users see, or the error.
    """

    rows: int
    dim: int
    memory_budget_bytes: int
    kind: str | None
    memory_bytes: int
    reason: str


def tabulate_selection(
    rows: Sequence[int] = TABLE_ROWS,
    dims: Sequence[int] = TABLE_DIMS,
    memory_budgets_bytes: Sequence[int] = TABLE_MEMORY_BYTES,
    *,
    target_recall: float = 0.95,
) -> list[Selection]:
    """Return what ``--kind auto`` comes to for every combination, in the order given."""
    return [
        _select(number, dim, memory_bytes=budget, target_recall=target_recall)
        for number in rows
        for dim in dims
        for budget in memory_budgets_bytes
    ]


def _select(rows: int, dim: int, *, memory_bytes: int, target_recall: float) -> Selection:
    try:
        plan = make_plan(rows, dim, memory_bytes=memory_bytes, target_recall=target_recall)
    except SettingsError as error:
        return Selection(rows, dim, memory_bytes, None, 0, str(error))
    return Selection(rows, dim, memory_bytes, plan.kind, plan.memory_bytes, plan.reason)


def choose_kind(rows: int, dim: int, *, memory_bytes: int, target_recall: float) -> str:
    """Return the simplest kind that is fast enough, fits, and can reach the target."""
    wants_flat = is_fast("flat", rows, dim) or target_recall >= 1
    if wants_flat and estimate_memory("flat", rows, dim) <= memory_bytes:
        return "flat"
    return "rabitq" if is_fast("rabitq", rows, dim) else "ivf-rabitq"


def is_fast(kind: str, rows: int, dim: int) -> bool:
    """Tell whether a kind that compares all rows answers within ``AIM_MS``."""
    return estimate_scan_ms(kind, rows, dim) <= AIM_MS


def estimate_scan_ms(kind: str, rows: int, dim: int) -> float:
    """Return about what a kind that compares all rows takes for one query on one core."""
    return rows * max(dim, MIN_SCAN_DIM) * SCAN_NS[kind] / 1e6


def count_lists(rows: int) -> int:
    """Return the number of inverted lists: the power of two nearest to 4 √rows."""
    lists = 1 << max(0, round(math.log2(4 * math.sqrt(max(1, rows)))))
    return max(1, min(lists, MAX_LISTS, rows // POINTS_PER_LIST))


def make_factory(kind: str, dim: int, lists: int) -> str:
    """Return the FAISS factory string of a kind."""
    if kind == "flat":
        return "Flat"
    if kind == "hnsw":
        return "HNSW32"
    coarse = f"IVF{lists}{'_HNSW32' if lists >= HNSW_LISTS else ''},"
    if kind == "ivf-sq8":
        return f"{coarse}SQ8"
    # Sparse non-negative embeddings gain from a rotation; it pads to a power of two.
    rotation = "HR," if padded_dim(dim) <= MAX_PADDING * dim else ""
    return f"{rotation}{coarse if lists else ''}RaBitQfs"


def padded_dim(dim: int) -> int:
    """Return the power of two that is not below ``dim``."""
    return 1 << (dim - 1).bit_length()


def code_bytes(kind: str, dim: int) -> int:
    """Return what one row takes in a segment's index file, in bytes."""
    width = padded_dim(dim) if padded_dim(dim) <= MAX_PADDING * dim else dim
    return {
        "flat": 4 * dim,
        "hnsw": 4 * dim + 272,
        "rabitq": width // 8 + 9,
        "ivf-rabitq": width // 8 + 28,
        "ivf-sq8": dim + 8,
    }[kind]


def estimate_memory(kind: str, rows: int, dim: int) -> int:
    """Return what a process that searches holds in memory; stored vectors and keys are mapped."""
    shared = 0
    if kind.startswith("ivf"):
        lists = count_lists(rows)
        shared = lists * (4 * dim + 272 * (lists >= HNSW_LISTS))
    return rows * code_bytes(kind, dim) + shared


def count_segments(kind: str, rows: int, *, dim: int, memory_bytes: int) -> int:
    """Return how many segments keep each build within half the memory, and below 20 M rows."""
    fit = max(1, memory_bytes // 2 // code_bytes(kind, dim))
    return max(1, math.ceil(rows / min(SEGMENT_ROWS, fit)))


def outgrew(kind: str, rows: int, dim: int, *, planned_kind: str) -> bool:
    """Tell whether rows have grown so far beyond a kind's limit that another one pays.

    A fifth of slack keeps an index at the limit from changing its kind every night.
    """
    if kind == planned_kind or kind not in SCAN_NS:
        return False
    return estimate_scan_ms(kind, rows, dim) > 1.2 * AIM_MS


def show_bytes(number: float) -> str:
    """Return a size for people, e.g. ``"1.5 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _explain(kind: str, asked: str, *, rows: int, dim: int, memory_bytes: int) -> str:
    cause = (
        "as asked" if asked != "auto" else f"for {rows:,} rows of {dim}{_exclude(kind, rows, dim)}"
    )
    return f"{kind}: {_WORDS[kind]}; {cause}; {show_bytes(memory_bytes)} in memory"


def _exclude(kind: str, rows: int, dim: int) -> str:
    """Return what the next simpler kind would take, if it is too slow."""
    simpler = {"rabitq": "flat", "ivf-rabitq": "rabitq"}.get(kind)
    if simpler is None or is_fast(simpler, rows, dim):
        return ""
    scan_ms = estimate_scan_ms(simpler, rows, dim)
    shown = f"{scan_ms:,.0f}" if scan_ms >= 10 else f"{scan_ms:.1f}"
    return f", where {simpler} takes about {shown} ms a query"
