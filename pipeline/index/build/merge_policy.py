"""When segments are merged, and when everything is trained anew: the rules, pure functions.

Drift costs latency before it costs recall: lists that have grown uneven are long to scan.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.index.build.changes import Owner, Range
from pipeline.index.manifest import CodecInfo, SegmentInfo
from pipeline.index.vectors import Flags

MAX_DELTAS = 8
MAX_DELTA_SHARE = 0.1
MAX_DEAD_SHARE = 0.2
MAX_REPLACED_SHARE = 0.3
MAX_GROWTH = 4.0
MAX_IMBALANCE_GROWTH = 2.0
MAX_COSINE_DROP = 0.02
MIN_COSINE_ROWS = 512
"""The mean cosine of fewer new rows says little."""


def choose_merges(
    segments: Sequence[SegmentInfo], live: Mapping[str, int], new_rows: int
) -> tuple[SegmentInfo, ...]:
    """Return the segments that the new rows are to be merged with; none for a plain delta.

    Args:
        segments: The segments there are.
        live: Live rows by segment id; segments without any are dropped anyway.
        new_rows: Rows that are added.
    """
    alive = [segment for segment in segments if live[segment.id]]
    deltas = [segment for segment in alive if segment.delta]
    delta_rows = sum(live[segment.id] for segment in deltas) + new_rows
    total = sum(live.values()) + new_rows
    chosen = [s for s in alive if s.rows - live[s.id] > MAX_DEAD_SHARE * s.rows]
    if len(deltas) + bool(new_rows) > MAX_DELTAS or delta_rows > MAX_DELTA_SHARE * total:
        chosen += [segment for segment in deltas if segment not in chosen]
    if not chosen and delta_rows <= MAX_DELTA_SHARE * total:
        return ()
    # Segments no larger than what is rewritten anyway go along, so that few remain.
    mass = sum(live[segment.id] for segment in chosen) + new_rows
    for segment in sorted(alive, key=lambda s: live[s.id]):
        if segment not in chosen and live[segment.id] <= mass:
            chosen.append(segment)
            mass += live[segment.id]
    return tuple(segment for segment in segments if segment in chosen)


def explain_drift(
    codec: CodecInfo, *, rows: int, imbalance: float | None, new: Sequence[SegmentInfo]
) -> str | None:
    """Return why everything should be trained anew, or None.

    Args:
        codec: What was trained, and how things were then.
        rows: Live rows now.
        imbalance: Imbalance of the lists now, if there are lists.
        new: Segments of new rows.
    """
    if codec.file is None:
        return None
    if rows > MAX_GROWTH * codec.trained_rows:
        return f"rows grew from {codec.trained_rows:,} at training to {rows:,}"
    if imbalance and codec.imbalance and imbalance > MAX_IMBALANCE_GROWTH * codec.imbalance:
        return (
            f"the lists' imbalance grew from {codec.imbalance:.2f} at training to {imbalance:.2f}"
        )
    for segment in new:
        cosine, trained = segment.mean_cosine, codec.mean_cosine
        if cosine is None or trained is None or segment.rows < MIN_COSINE_ROWS:
            continue
        if cosine < trained - MAX_COSINE_DROP:
            return (
                f"new rows lie further from the centroids: mean cosine {cosine:.3f}, "
                f"{trained:.3f} at training"
            )
    return None


def compute_imbalance(sizes: Sequence[np.ndarray]) -> float | None:
    """Return how uneven the lists of some segments are together: 1 is even; None without lists."""
    sizes = [item for item in sizes if len(item)]
    if not sizes:
        return None
    total = np.stack(sizes).sum(axis=0, dtype=np.float64)
    return float(len(total) * np.square(total).sum() / max(1.0, total.sum()) ** 2)


class Relocation:
    """Where the rows of merged segments have gone."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, np.ndarray]] = {}

    def move(self, segment: str, target: str, *, base: int, dead: Flags) -> int:
        """Note that the live rows of ``segment`` are in ``target`` from row ``base`` on.

        Returns:
            The row after the last of them.
        """
        starts = base + np.concatenate([[0], np.cumsum(~dead)])
        self._places[segment] = (target, starts)
        return int(starts[-1])

    def apply(self, owner: Owner) -> Owner:
        """Return an owner with its ranges where they are now."""
        ranges = [moved for item in owner.ranges for moved in self._apply_range(item)]
        return Owner(owner.shards, tuple(ranges), owner.skipped)

    def _apply_range(self, item: Range) -> list[Range]:
        if item.segment not in self._places:
            return [item]
        target, starts = self._places[item.segment]
        first, end = int(starts[item.first]), int(starts[item.first + item.rows])
        return [Range(target, first, end - first)] if end > first else []
