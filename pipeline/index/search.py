"""Nearest neighbours: open an index, search it from any number of threads, keep it fresh."""

import math
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pipeline.errors import (
    CorruptionError,
    ObjectMissingError,
    QueryError,
    SpaceMismatchError,
    UnknownKeyError,
)
from pipeline.index.current import (
    Pointer,
    manifest_path,
    parse_manifest,
    read_manifest,
    read_pointer,
)
from pipeline.index.engine import Floats, Rows
from pipeline.index.files import FileStore, default_cache_dir
from pipeline.index.generation import Generation
from pipeline.index.installed import set_threads
from pipeline.index.manifest import Manifest, SearchParams
from pipeline.index.neighbour import (
    IndexInfo,
    Neighbour,
    check_vectors,
    describe_generation,
    make_neighbour,
)
from pipeline.index.opened import Mask
from pipeline.records import Space
from pipeline.storage import Storage, join_uri, normalise_uri

__all__ = ["IndexInfo", "Neighbour", "SearchIndex", "Snapshot"]

MAX_K = 10_000
KEPT_MASKS = 16
SUGGESTIONS = 3


class Snapshot:
    """One open generation; stays usable while somebody holds it, whatever is published."""

    def __init__(self, uri: str, opened: Generation, *, threads: int) -> None:
        self.info = describe_generation(uri, opened)
        self.opened = opened
        self._threads = threads
        self._masks: dict[str, list[Mask | None]] = {}
        self._lock = threading.Lock()

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        where: pc.Expression | None = None,
        *,
        exact: bool = False,
        params: SearchParams | None = None,
    ) -> list[list[Neighbour]]:
        """Return the nearest rows of each vector, best first.

        Args:
            vectors: (n, dim) or one vector (dim,), of any positive length: cosine is what counts.
            k: Neighbours per vector, 1 to 10,000; where there are fewer rows, fewer come back.
            where: Only rows that fulfil it, e.g. ``pc.field("cls") == "dress"``.
            exact: Compare with every vector instead of looking them up.
            params: How far to look; as tuned where None.

        Raises:
            QueryError: The vectors have another width, or are not finite, or zero; ``k`` is out
                of range; the filter does not fit the columns.
        """
        queries = check_vectors(vectors, self.info)
        if not 1 <= k <= MAX_K:
            raise QueryError(f"k is {k}; ask for 1 to {MAX_K} neighbours")
        set_threads(self._threads)
        masks = None if where is None else self._find_masks(where)
        if exact:
            found = self.opened.scan(queries, k, masks=masks)
        else:
            found = self.opened.search(queries, k, params=params, masks=masks)
        return self._describe_rows(*found)

    def neighbours_of(
        self, key: str, k: int = 10, where: pc.Expression | None = None
    ) -> list[Neighbour]:
        """Return the nearest rows of an image of the index, itself left out.

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        found = self.search(self.vector(key)[None], min(k + 1, MAX_K), where)[0]
        return [neighbour for neighbour in found if neighbour.key != key][:k]

    def vector(self, key: str) -> Floats:
        """Return the stored unit vector of an image, float32 (dim,).

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        number, row = self._locate(key)
        vectors = self.opened.segments[number].read_vectors(np.array([row]))
        return vectors.reshape(-1)

    def find(self, key: str) -> Neighbour:
        """Return the row of an image, with score 1.

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        number, row = self._locate(key)
        place = np.array([[number]]), np.array([[row]])
        return self._describe_rows(np.ones((1, 1), np.float32), *place)[0][0]

    def sample(self, n: int, *, seed: int | None = None) -> list[Neighbour]:
        """Return up to ``n`` rows drawn at random, without repetition, with score 1."""
        numbers, rows = self.opened.sample(n, np.random.default_rng(seed))
        scores = np.ones((1, len(rows)), np.float32)
        return self._describe_rows(scores, numbers[None], rows[None])[0]

    def _locate(self, key: str) -> tuple[int, int]:
        found = self.opened.find(key)
        if found is None:
            near = self.opened.suggest(key)[:SUGGESTIONS]
            hint = f"; similar keys: {', '.join(map(repr, near))}" if near else ""
            raise UnknownKeyError(f"no image with the key {key!r} in {self.info.uri!r}{hint}")
        return found

    def _find_masks(self, where: pc.Expression) -> list[Mask | None]:
        text = str(where)
        with self._lock:
            masks = self._masks.get(text)
        if masks is None:
            masks = self.opened.make_masks(where)
            with self._lock:
                while len(self._masks) >= KEPT_MASKS:
                    del self._masks[next(iter(self._masks))]
                self._masks[text] = masks
        return masks

    def _describe_rows(self, scores: Floats, numbers: Rows, rows: Rows) -> list[list[Neighbour]]:
        segments = self.opened.segments
        return [
            [
                make_neighbour(score, segments[number].keys.read_row(row))
                for score, number, row in zip(*line, strict=True)
                if math.isfinite(score)
            ]
            for line in zip(scores.tolist(), numbers.tolist(), rows.tolist(), strict=True)
        ]


class SearchIndex:
    """An index, its newest generation open.

    Safe to search from many threads. ``refresh`` opens a newer generation beside the running
    searches, which end on the one they began with.
    """

    def __init__(self, files: FileStore, *, threads: int, pinned: str | None) -> None:
        """Use ``SearchIndex.open``."""
        self.uri = files.index
        self._files, self._threads, self._pinned = files, threads, pinned
        self._refreshing = threading.Lock()
        manifest = self._read_manifest()
        opened = Generation(manifest, files)
        self._snapshot = Snapshot(self.uri, opened, threads=threads)

    @classmethod
    def open(
        cls,
        uri: str,
        storage: Storage | None = None,
        *,
        generation: str | None = None,
        cache_dir: str | Path | None = None,
        threads: int = 1,
    ) -> "SearchIndex":
        """Open an index; every file is verified before anything parses it.

        Args:
            uri: The index: a path, ``s3://…``, or any other URI that storage knows.
            storage: How to reach it; credentials from the environment otherwise.
            generation: A generation to stay with, instead of the newest.
            cache_dir: Where files of a remote index are kept; the user's cache folder otherwise.
            threads: Threads of one search. Many searches at once want 1.

        Raises:
            ObjectMissingError: There is no index at ``uri``, or no such generation.
            CorruptionError: A file is damaged or missing.
        """
        cache = Path(cache_dir) if cache_dir else default_cache_dir()
        files = FileStore(normalise_uri(uri), storage or Storage(), cache)
        return cls(files, threads=threads, pinned=generation)

    @property
    def snapshot(self) -> Snapshot:
        """The generation that is open now; hold it to ask it several things."""
        return self._snapshot

    @property
    def info(self) -> IndexInfo:
        """What describes the generation that is open now."""
        return self._snapshot.info

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        where: pc.Expression | None = None,
        *,
        exact: bool = False,
        params: SearchParams | None = None,
    ) -> list[list[Neighbour]]:
        """Return the nearest rows of each vector, best first; see ``Snapshot.search``."""
        return self._snapshot.search(vectors, k, where, exact=exact, params=params)

    def neighbours_of(
        self, key: str, k: int = 10, where: pc.Expression | None = None
    ) -> list[Neighbour]:
        """Return the nearest rows of an image of the index, itself left out.

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        return self._snapshot.neighbours_of(key, k, where)

    def vector(self, key: str) -> Floats:
        """Return the stored unit vector of an image, float32 (dim,).

        Raises:
            UnknownKeyError: The index does not hold that key; the message names similar ones.
        """
        return self._snapshot.vector(key)

    def check_space(self, space: Space) -> None:
        """Refuse vectors of another space.

        Raises:
            SpaceMismatchError: The spaces differ; names the fields.
        """
        mine, other = self.info.space.to_dict(), space.to_dict()
        differing = [name for name in mine if mine[name] != other[name]]
        if differing:
            details = "; ".join(
                f"{name} is {mine[name]!r} there and {other[name]!r} here" for name in differing
            )
            raise SpaceMismatchError(f"{self.uri!r} holds vectors of another space: {details}")

    def refresh(self) -> bool:
        """Open the newest generation if it is not open yet; tell whether there was one.

        Searches go on meanwhile. If it fails, the old generation stays.

        Raises:
            CorruptionError: A file of the newer generation is damaged or missing.
            StorageError: The index cannot be reached.
        """
        with self._refreshing:
            manifest = self._read_manifest()
            if manifest.generation == self.info.generation:
                return False
            opened = Generation(manifest, self._files, known=self._snapshot.opened.segments)
            self._snapshot = Snapshot(self.uri, opened, threads=self._threads)
            return True

    def _read_manifest(self) -> Manifest:
        storage = self._files.storage
        if self._pinned is not None:
            uri = join_uri(self.uri, manifest_path(self._pinned))
            return parse_manifest(storage.read(uri), uri)
        found = read_pointer(self.uri, storage)
        if found is None:
            raise ObjectMissingError(
                f"no index at {self.uri!r}: CURRENT is missing; check the URI, or run index first"
            )
        return _read_stable(self.uri, found[0], storage)

    def __len__(self) -> int:
        return self.info.rows


def _read_stable(uri: str, pointer: Pointer, storage: Storage) -> Manifest:
    """Read the manifest, once more where a newer one was published and the old one collected."""
    try:
        return read_manifest(uri, pointer, storage)
    except CorruptionError:
        again = read_pointer(uri, storage)
        if again is None or again[0] == pointer:
            raise
        return read_manifest(uri, again[0], storage)
