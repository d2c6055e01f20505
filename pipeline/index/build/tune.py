"""The smallest search parameters that meet the target recall."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.index.build.measure import GATED_RANKS, Measured
from pipeline.index.manifest import SearchParams

CANDIDATES = (512, 1024, 2048, 4096, 8192, 16_384)

FIRST_CANDIDATES = 3
WIDE_CANDIDATES = 4096

EFS = (128, 192, 256, 512, 1024)

FEW_LISTS, QUICK_SHARE = 16, 8
"""More lists than a few, and then than an eighth of all, are tried only if fewer do not suffice."""

NEAR_SHARES = (0.625, 0.75, 1.0, 1.5)
"""Numbers of lists, as shares of the power of two that suffices, that are tried precisely."""

RANKING_CODES = 50
"""Codes that are compared in the time that one candidate takes to be ranked again."""

Measure = Callable[[Sequence[SearchParams], bool], list[Measured]]
"""Measures settings; the flag asks for latency and self-hits too."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """Outcome of tuning.

    Attributes:
        chosen: The smallest setting whose recall is at least the target with 97.5 % confidence, or
            the best there is.
        curve: All that was measured.
    """

    chosen: Measured
    curve: tuple[Measured, ...]


def tune(kind: str, *, lists: int, rows: int, target: float, measure: Measure) -> Tuned:
    """Find the smallest parameters that meet ``target`` at ten neighbours and at a hundred.

    With lists: first the power of two that meets it with plenty of candidates, then, around it,
    the cheapest number of lists and candidates together.

    Args:
        kind: Kind of index.
        lists: Number of its inverted lists.
        rows: Number of its rows.
        target: Recall to reach.
        measure: Measures settings over the whole index.
    """
    if kind == "flat":
        curve = measure([SearchParams()], True)
    elif kind == "hnsw":
        curve = measure([SearchParams(ef=ef) for ef in EFS], True)
    elif not lists:
        curve = _widen(SearchParams(), rows, target=target, measure=measure)
    else:
        return _tune_lists(lists, rows, target=target, measure=measure)
    return Tuned(choose(curve, target), tuple(curve))


def _widen(params: SearchParams, rows: int, *, target: float, measure: Measure) -> list[Measured]:
    """Measure with more and more candidates until the target is met."""
    curve: list[Measured] = []
    candidates = limit_candidates(rows)
    for some in (candidates[:FIRST_CANDIDATES], candidates[FIRST_CANDIDATES:]):
        settings = [replace(params, candidates=number) for number in some]
        curve += measure(settings, True) if settings else []
        if meets(choose(curve, target), target):
            break
    return curve


def _tune_lists(lists: int, rows: int, *, target: float, measure: Measure) -> Tuned:
    curve: list[Measured] = []
    doubled = [1 << power for power in range(lists.bit_length())]
    candidates = limit_candidates(rows)
    wide = min(WIDE_CANDIDATES, max(candidates))
    edges = (0, FEW_LISTS, max(64, lists // QUICK_SHARE), lists)
    for low, high in pairwise(edges):
        settings = [SearchParams(nprobe, wide) for nprobe in doubled if low < nprobe <= high]
        curve += measure(settings, False) if settings else []
        if meets(choose(curve, target), target):
            break
    enough = choose(curve, target).params.nprobe
    near = sorted({min(lists, max(1, int(share * enough))) for share in NEAR_SHARES})
    timed = measure(order_by_cost(near, candidates[:FIRST_CANDIDATES], rows / lists), True)
    if not meets(choose(timed, target), target) and candidates[FIRST_CANDIDATES:]:
        rest = order_by_cost([enough], candidates[FIRST_CANDIDATES:], rows / lists)
        timed += measure(rest, True)
    return Tuned(choose(timed, target), (*curve, *timed))


def order_by_cost(
    nprobes: Sequence[int], candidates: Sequence[int], list_rows: float
) -> list[SearchParams]:
    """Return all combinations, the cheapest first; by counting, so that every run chooses alike."""
    settings = [SearchParams(nprobe, number) for nprobe in nprobes for number in candidates]
    return sorted(settings, key=lambda p: p.nprobe * list_rows + p.candidates * RANKING_CODES)


def limit_candidates(rows: int) -> list[int]:
    """Return the numbers of candidates worth trying with so many rows."""
    return [c for c in CANDIDATES if c < rows] or [CANDIDATES[0]]


def meets(measured: Measured, target: float) -> bool:
    """Tell whether recall is at least the target at all ranks, sampling error allowed for."""
    values = [measured.recall[rank] for rank in GATED_RANKS]
    return all(low >= target or value == 1.0 for value, low, _ in values)


def choose(curve: Sequence[Measured], target: float) -> Measured:
    """Return the first setting of those given, smallest first, that meets the target, or the best.

    Recall that misses the bound but not the target itself is better than nothing.
    """
    for measured in curve:
        if meets(measured, target):
            return measured
    return max(curve, key=lambda measured: min(measured.recall[rank][0] for rank in GATED_RANKS))
