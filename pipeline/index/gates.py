"""What has to hold before a generation may be published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PublishError
from pipeline.index.files import FileStore
from pipeline.index.manifest import SegmentInfo, Tombstones
from pipeline.index.measure import Measured
from pipeline.index.rows import read_bits
from pipeline.storage import join_uri

MIN_SELF_HITS = 0.99
MAX_COMPARED_ROWS = 5_000_000
"""Keys of more rows are compared within their segment only: this has to fit into one process."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition for publishing.

    Attributes:
        name: What is checked.
        passed: Whether it holds.
        detail: The value, and what it has to be.
    """

    name: str
    passed: bool
    detail: str


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
    """Recall at ten neighbours on held-out queries reaches the target."""
    value, low, high = measured.recall[10]
    detail = f"recall@10 is {value:.4f} ({low:.4f} to {high:.4f}), the target {target:g}"
    return Gate("recall", value >= target, detail)


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
    return Gate("row drop", drop <= max_drop, detail)


def check_files(files: FileStore, segments: Sequence[SegmentInfo]) -> Gate:
    """Files that are taken over from older generations are still there, as long as they were."""
    for segment in segments:
        for file in segment.files.values():
            uri = join_uri(files.index, file.path)
            if (
                not files.storage.exists(uri)
                or files.storage.stat(uri).size_bytes != file.size_bytes
            ):
                return Gate("files", False, f"{uri} is missing or of another size")
    return Gate("files", True, f"{len(segments)} segments are whole")


def check_keys(
    files: FileStore, segments: Sequence[SegmentInfo], tombstones: Mapping[str, Tombstones]
) -> Gate:
    """No key is live in two segments; within one, building it has made sure."""
    overlapping = [
        segment
        for segment in segments
        if any(_overlap(segment, other) for other in segments if other.id != segment.id)
    ]
    rows = sum(segment.rows for segment in overlapping)
    if rows > MAX_COMPARED_ROWS:
        return Gate("keys", True, f"not compared between segments: {rows:,} rows")
    live = [_read_live_keys(files, segment, tombstones.get(segment.id)) for segment in overlapping]
    keys = pa.chunked_array(live, pa.large_string()) if live else pa.chunked_array([[""]])
    in_order = keys.take(pc.sort_indices(keys)).combine_chunks()
    repeated = pc.equal(in_order[1:], in_order[:-1])
    if not pc.any(repeated).as_py():
        return Gate("keys", True, "all keys are different")
    key = in_order[pc.index(repeated, True).as_py()].as_py()
    return Gate("keys", False, f"the key {key!r} is there twice; is one input given twice?")


def _overlap(one: SegmentInfo, other: SegmentInfo) -> bool:
    return one.first_key <= other.last_key and other.first_key <= one.last_key


def _read_live_keys(
    files: FileStore, segment: SegmentInfo, tombstones: Tombstones | None
) -> pa.Array:
    path = files.fetch(segment.files["keys"])
    keys = pq.ParquetFile(path).read(["key"]).column("key").cast(pa.large_string())
    dead = read_bits(files, tombstones.file if tombstones else None, segment.rows)
    return keys.combine_chunks().filter(pa.array(~dead))
