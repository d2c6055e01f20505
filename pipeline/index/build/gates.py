"""The gates: conditions that a generation has to meet before it is published."""

import contextlib
import logging
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ObjectMissingError, PublishError
from pipeline.index.build.measure import GATED_RANKS, Measured
from pipeline.index.files import FileStore
from pipeline.index.manifest import SegmentInfo, Tombstones
from pipeline.index.vectors import read_bits
from pipeline.storage import join_uri

LOG = logging.getLogger("pipeline.index")

MIN_SELF_HITS = 0.99
COMPARED_ROWS = 2_000_000
"""Keys of each of two segments that are held at once, which takes about 200 MB."""

MAX_READ_ROWS = 500_000_000
"""Keys that are read to compare segments, some several times; these take minutes."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition for publishing.

    Attributes:
        name: What is checked.
        passed: Whether it holds.
        detail: The value, and what it has to be.
        mendable: Whether building everything anew may make it hold.
    """

    name: str
    passed: bool
    detail: str
    mendable: bool = True


def check_gates(gates: Sequence[Gate], *, force: bool) -> None:
    """Let a generation pass, or not.

    Raises:
        PublishError: A gate did not hold; names all that did not.
    """
    failed = [f"{gate.name}: {gate.detail}" for gate in gates if not gate.passed]
    if failed and not force:
        raise PublishError(
            f"not published: {'; '.join(failed)}; what served before goes on serving; "
            "--force publishes all the same"
        )


def check_recall(measured: Measured, target: float) -> Gate:
    """Recall on queries that are no rows reaches the target at ten neighbours and at a hundred."""
    found = {rank: measured.recall[rank] for rank in GATED_RANKS}
    shown = [
        f"recall@{rank} is {v:.4f} ({low:.4f} to {high:.4f})"
        for rank, (v, low, high) in found.items()
    ]
    detail = f"{', '.join(shown)}, the target {target:g}"
    return Gate("recall", min(value for value, _, _ in found.values()) >= target, detail)


def check_self_hits(measured: Measured) -> Gate:
    """Stored rows find themselves."""
    share = 1.0 if measured.self_hits is None else measured.self_hits
    detail = f"{share:.3f} of sampled rows find themselves, at least {MIN_SELF_HITS} should"
    return Gate("self-hits", share >= MIN_SELF_HITS, detail)


def check_rows(live: int, skipped: int, expected: int) -> Gate:
    """Every committed vector is in the index once, or counted as unusable."""
    detail = f"{live:,} live and {skipped:,} unusable rows for {expected:,} committed vectors"
    return Gate("rows", live + skipped == expected, detail)


def check_row_drop(before: int, after: int, max_drop: float) -> Gate:
    """No more rows disappear than are allowed to."""
    drop = 0.0 if not before else max(0.0, 1 - after / before)
    detail = f"rows go from {before:,} to {after:,}, by {drop:.1%}; max_row_drop is {max_drop:.1%}"
    return Gate("row drop", drop <= max_drop, detail, mendable=False)


def check_files(files: FileStore, segments: Sequence[SegmentInfo]) -> Gate:
    """Files that are taken over from older generations are still there, as long as they were."""
    needed = [file for segment in segments for file in segment.files.values()]
    sizes: dict[str, int] = {}
    for uri in {join_uri(files.index, file.path) for file in needed}:
        with contextlib.suppress(ObjectMissingError):
            sizes[uri] = files.storage.stat(uri).size_bytes
    damage = files.find_damage(needed, sizes=sizes)
    return Gate("files", damage is None, damage or f"{len(segments)} segments are whole")


def check_keys(
    files: FileStore,
    segments: Sequence[SegmentInfo],
    tombstones: Mapping[str, Tombstones],
    *,
    new: Container[str],
) -> Gate:
    """No key of a new segment is live in another; those taken over were compared when new.

    Within one segment, building it has made sure. Memory is bounded, whatever the rows; where
    reading them would take too long, nothing is compared, and the log says so.
    """
    pairs = [
        (one, other)
        for number, one in enumerate(segments)
        for place, other in enumerate(segments)
        if one.id in new and (other.id not in new or place < number) and _overlap(one, other)
    ]
    rows = sum(math.ceil(one.rows / COMPARED_ROWS) * other.rows for one, other in pairs)
    if rows > MAX_READ_ROWS:
        detail = f"not compared between segments: {rows:,} keys would have to be read"
        LOG.warning("keys %s; the limit is %d", detail, MAX_READ_ROWS)
        return Gate("keys", True, detail)
    for one, other in pairs:
        key = _find_common(files, one, other, tombstones=tombstones)
        if key is not None:
            detail = f"the key {key!r} is there twice; is one input given twice?"
            return Gate("keys", False, detail, mendable=False)
    return Gate("keys", True, "all keys are different")


def _overlap(one: SegmentInfo, other: SegmentInfo) -> bool:
    return one.first_key <= other.last_key and other.first_key <= one.last_key


def _find_common(
    files: FileStore,
    one: SegmentInfo,
    other: SegmentInfo,
    *,
    tombstones: Mapping[str, Tombstones],
) -> str | None:
    for mine in _iter_live_keys(files, one, tombstones.get(one.id)):
        for theirs in _iter_live_keys(files, other, tombstones.get(other.id)):
            common = theirs.filter(pc.is_in(theirs, value_set=mine))
            if len(common):
                return str(common[0])
    return None


def _iter_live_keys(
    files: FileStore, segment: SegmentInfo, tombstones: Tombstones | None
) -> Iterator[pa.ChunkedArray]:
    """Yield the live keys of a segment, ``COMPARED_ROWS`` at a time."""
    live = ~read_bits(files, tombstones.file if tombstones else None, segment.rows)
    reader = pq.ParquetFile(files.fetch(segment.files["keys"]))
    waiting: list[pa.Array] = []
    first = 0
    for batch in reader.iter_batches(columns=["key"]):
        keep = live[first : first + len(batch)]
        first += len(batch)
        waiting.append(batch.column(0).cast(pa.large_string()).filter(pa.array(keep)))
        if sum(map(len, waiting)) >= COMPARED_ROWS or first == segment.rows:
            yield pa.chunked_array(waiting)
            waiting = []
