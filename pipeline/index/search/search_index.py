"""Nearest neighbours: open an index, search it from any number of threads, keep it fresh."""

import threading
from pathlib import Path
from typing import overload

import numpy.typing as npt

from pipeline.errors import CorruptionError, NothingThereError, QueryError, describe_no_index
from pipeline.index.cache import DEFAULT_BYTES
from pipeline.index.faiss.codes import Floats
from pipeline.index.files import FileStore, default_cache_dir
from pipeline.index.manifest import Manifest, SearchParams
from pipeline.index.pointer import (
    Pointer,
    manifest_path,
    parse_manifest,
    read_manifest,
    read_pointer,
)
from pipeline.index.search.generation import Generation, Snapshot
from pipeline.index.search.neighbour import IndexInfo, Neighbour
from pipeline.index.search.pictures import Picture, PictureEmbedder
from pipeline.index.search.where import Where
from pipeline.storage import Storage, join_uri, normalise_uri

__all__ = ["IndexInfo", "Neighbour", "SearchIndex", "Snapshot"]


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
        self._pictures = PictureEmbedder(files.storage)
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
        cache_bytes: int = DEFAULT_BYTES,
        threads: int = 1,
    ) -> "SearchIndex":
        """Open an index; every file is verified before anything parses it.

        Args:
            uri: The index: a path, ``s3://…``, or any other URI that storage knows.
            storage: How to reach it; credentials from the environment otherwise.
            generation: A generation to stay with, instead of the newest.
            cache_dir: Where files of a remote index are kept; the user's cache folder otherwise.
            cache_bytes: Size that all copies there may have; those unused longest are deleted.
            threads: Threads of one search. Many searches at once want 1.

        Raises:
            NothingThereError: There is no index at ``uri``, or no such generation.
            CorruptionError: A file is damaged or missing.
        """
        cache = Path(cache_dir) if cache_dir else default_cache_dir()
        files = FileStore(normalise_uri(uri), storage or Storage(), cache, cache_bytes=cache_bytes)
        return cls(files, threads=threads, pinned=generation)

    @property
    def snapshot(self) -> Snapshot:
        """The generation that is open now; hold it to ask it several things."""
        return self._snapshot

    @property
    def storage(self) -> Storage:
        """How the index, and what lies beside it, is reached."""
        return self._files.storage

    @property
    def info(self) -> IndexInfo:
        """What describes the generation that is open now."""
        return self._snapshot.info

    @overload
    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        where: Where | None = None,
        *,
        exact: bool = False,
        params: SearchParams | None = None,
    ) -> list[list[Neighbour]]: ...

    @overload
    def search(
        self,
        vectors: None = None,
        k: int = 10,
        where: Where | None = None,
        *,
        image: Picture,
        exact: bool = False,
        params: SearchParams | None = None,
    ) -> list[Neighbour]: ...

    def search(
        self,
        vectors: npt.ArrayLike | None = None,
        k: int = 10,
        where: Where | None = None,
        *,
        image: Picture | None = None,
        exact: bool = False,
        params: SearchParams | None = None,
    ) -> list[list[Neighbour]] | list[Neighbour]:
        """Return the nearest rows, best first; see ``Snapshot.search``.

        Args:
            vectors: float (N, dim), or one vector (dim,); a list of neighbours for each.
            k: How many neighbours.
            where: Only images that fulfil this condition on carried columns.
            image: A picture to search with instead: a path, a URI, or its encoded bytes. The answer
                is one list.
            exact: Compare with every vector.
            params: How thoroughly to search; as measured when the index was built otherwise.

        Raises:
            QueryError: There is nothing to search with, or too much; the picture cannot be
                embedded; the condition is wrong.
        """
        if (vectors is None) == (image is None):
            raise QueryError("pass either vectors or image to search with")
        if image is None:
            assert vectors is not None
            return self._snapshot.search(vectors, k, where, exact=exact, params=params)
        snapshot = self._snapshot  # its space and its vectors, whatever is published meanwhile
        vector = self._pictures.embed(image, snapshot.info)
        return snapshot.search(vector[None], k, where, exact=exact, params=params)[0]

    def embed(self, image: Picture, *, name: str | None = None) -> Floats:
        """Return the vector of a picture in the space of the index, float32 (dim,).

        Args:
            image: A path, a URI, or its encoded bytes.
            name: What messages call it; its path or URI otherwise.

        Raises:
            QueryError: The picture cannot be decoded.
        """
        return self._pictures.embed(image, self.info, name=name)

    def neighbours_of(self, key: str, k: int = 10, where: Where | None = None) -> list[Neighbour]:
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
            self._files.release(manifest.list_files())
            return True

    def _read_manifest(self) -> Manifest:
        storage = self._files.storage
        if self._pinned is not None:
            uri = join_uri(self.uri, manifest_path(self._pinned))
            return parse_manifest(storage.read(uri), uri)
        found = read_pointer(self.uri, storage)
        if found is None:
            raise NothingThereError(describe_no_index(self.uri))
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
