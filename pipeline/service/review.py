"""What there is to look through: facets, near duplicates, failures.

Each is worked out once for a generation, in a thread, and kept until the next one opens.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embed_job.report_page import FailureSample, sample_failures
from pipeline.errors import CorruptionError, ObjectMissingError
from pipeline.index.search.facets import Facets, count_facets, read_live_rows
from pipeline.index.search.generation import Snapshot
from pipeline.output.commits import list_commits
from pipeline.service.results import list_public_columns
from pipeline.storage import Storage, join_uri

Made = TypeVar("Made")

MAX_GROUPS = 10_000
MAX_COMMITS_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Groups:
    """Near duplicates, the largest group first.

    Attributes:
        threshold: Cosine from which two images count; None where files are equal byte for byte.
        groups: Keys and the cosine to the nearest other image of the group.
    """

    threshold: float | None
    groups: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Failures:
    """Rows without an embedding.

    Attributes:
        counts: How many there are, by status.
        rows: Some of them, newest runs first.
    """

    counts: dict[str, int]
    rows: tuple[FailureSample, ...]


class Review:
    """Works out and keeps what there is to look through in a generation."""

    def __init__(self, storage: Storage) -> None:
        """Read exports and embeddings through ``storage``."""
        self._storage = storage
        self._generation = ""
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def count_facets(self, snapshot: Snapshot) -> Facets:
        """Return what the columns hold."""
        names = [item.name for item in list_public_columns(snapshot.info) if item.name != "key"]
        return self._keep(snapshot, "facets", lambda: count_facets(snapshot.opened, names))

    def find_groups(self, snapshot: Snapshot) -> Groups:
        """Return the near duplicates that the index job exported, or else the equal files."""
        return self._keep(snapshot, "groups", lambda: find_groups(snapshot, self._storage))

    def find_failures(self, snapshot: Snapshot) -> Failures:
        """Return the rows of the embeddings that failed."""
        uri = snapshot.info.embeddings
        return self._keep(snapshot, "failures", lambda: find_failures(uri, self._storage))

    def _keep(self, snapshot: Snapshot, name: str, make: Callable[[], Made]) -> Made:
        # One at a time: visitors who come together wait for one count instead of making several.
        with self._lock:
            if self._generation != snapshot.info.generation:
                self._generation, self._made = snapshot.info.generation, {}
            if name not in self._made:
                self._made[name] = make()
            made: Made = self._made[name]
            return made


def find_groups(snapshot: Snapshot, storage: Storage) -> Groups:
    """Return the near duplicates of the lowest threshold exported, or else the equal files."""
    folder = join_uri(snapshot.info.uri, "exports", snapshot.info.generation)
    start = "near-duplicates-"
    exported = {
        float(name.removeprefix(start).removesuffix(".parquet")): info.uri
        for info in storage.list_objects(folder)
        if (name := info.uri.rsplit("/", 1)[-1]).startswith(start)
    }
    if not exported:
        return Groups(None, order_groups(*find_equal_files(snapshot)))
    threshold = min(exported)
    with storage.open_random(exported[threshold]) as file:
        table = pq.read_table(file)
    scores = table.column("score").to_numpy().tolist()
    return Groups(
        threshold, order_groups(table.column("group").to_numpy(), table.column("key"), scores)
    )


def find_equal_files(snapshot: Snapshot) -> tuple[np.ndarray, pa.ChunkedArray, Sequence[float]]:
    """Return group, key and score of the images whose file is also that of another."""
    table = read_live_rows(snapshot.opened, ["key", "sha256"])
    codes = table.column("sha256").combine_chunks().dictionary_encode().indices.to_numpy(False)
    codes = np.nan_to_num(codes, nan=-1).astype(np.int64)
    counts = np.bincount(codes[codes >= 0], minlength=1)
    chosen = (codes >= 0) & (counts[codes] > 1)
    keys = table.column("key").filter(pa.array(chosen))
    return codes[chosen], keys, [1.0] * len(keys)


def order_groups(
    labels: np.ndarray, keys: pa.ChunkedArray, scores: Sequence[float]
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return the groups as keys with scores, the largest first, at most ``MAX_GROUPS``."""
    found: dict[int, list[tuple[str, float]]] = {}
    for label, key, score in zip(labels.tolist(), keys.to_pylist(), scores, strict=True):
        found.setdefault(label, []).append((key, score))
    largest = sorted(found.values(), key=len, reverse=True)[:MAX_GROUPS]
    return tuple(map(tuple, largest))


def find_failures(output: str, storage: Storage) -> Failures:
    """Return the rows of an embeddings output that failed; none where the output is gone."""
    try:
        commits = list(list_commits(output, storage).values())
    except (ObjectMissingError, CorruptionError):
        return Failures({}, ())
    counts: dict[str, int] = {}
    for commit in commits:
        for part in commit.parts:
            for status, rows in part.statuses.items():
                counts[status] = counts.get(status, 0) + rows
    counts.pop("ok", None)
    bad = [c for c in commits if any(set(part.statuses) - {"ok"} for part in c.parts)]
    newest = sorted(bad, key=lambda commit: commit.sequence, reverse=True)[:MAX_COMMITS_SHOWN]
    return Failures(counts, tuple(sample_failures(output, newest, storage)))
