"""Pictures as queries: embedded exactly as the index's images were."""

import os
import threading
from typing import TYPE_CHECKING

from pipeline.errors import QueryError
from pipeline.index.faiss.codes import Floats
from pipeline.index.search.neighbour import IndexInfo
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.inference.embedder import Embedder

Picture = str | os.PathLike[str] | bytes
"""A path, a URI, or an encoded image."""


class PictureEmbedder:
    """Embeds pictures into the space of an index; loads the backbone when it is first asked."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._loaded: tuple[str, Embedder] | None = None

    def embed(self, picture: Picture, info: IndexInfo, *, name: str | None = None) -> Floats:
        """Return the vector of a picture, float32 (dim,).

        Args:
            picture: The picture.
            info: Says the space, and where its weights lie.
            name: What messages call it; its path or URI otherwise.

        Raises:
            QueryError: The picture cannot be decoded.
            StorageError: It cannot be read.
        """
        data = picture if isinstance(picture, bytes) else self._storage.read(os.fspath(picture))
        with self._lock:
            [embedding] = self._load(info).embed_images([data])
        if embedding.vector is None:
            name = name or ("a picture" if isinstance(picture, bytes) else os.fspath(picture))
            raise QueryError(f"cannot embed {name!r}: {embedding.status}: {embedding.error}")
        return embedding.vector

    def _load(self, info: IndexInfo) -> "Embedder":
        if self._loaded is None or self._loaded[0] != info.space.id:
            from pipeline.inference.embedder import (  # torch takes seconds to import
                Embedder,
                EmbedderOptions,
            )

            options = EmbedderOptions(decode_processes=0, any_precision=True)
            embedder = Embedder.load(
                info.space, weights=info.weights, options=options, storage=self._storage
            )
            self._loaded = (info.space.id, embedder)
        return self._loaded[1]
