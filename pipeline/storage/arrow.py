"""Arrow's view of storage, so that datasets read with the same retries and settings."""

from collections.abc import Iterable
from typing import Any, BinaryIO, NoReturn, Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import ObjectMissingError
from pipeline.records import ObjectInfo


class Readable(Protocol):
    """The methods of ``Storage`` that the Arrow file system calls."""

    def list_objects(self, uri: str) -> list[ObjectInfo]: ...  # noqa: D102
    def stat(self, uri: str) -> ObjectInfo: ...  # noqa: D102
    def open_stream(self, uri: str) -> BinaryIO: ...  # noqa: D102
    def open_random(self, uri: str) -> BinaryIO: ...  # noqa: D102


class ArrowHandler(pafs.FileSystemHandler):  # type: ignore[misc]
    """A read-only file system whose paths are URIs."""

    def __init__(self, storage: Readable) -> None:
        self._storage = storage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrowHandler) and self._storage == other._storage

    def __hash__(self) -> int:
        return hash(self._storage)

    def get_type_name(self) -> str:
        """Return a name for Arrow's messages."""
        return "storage"

    def normalize_path(self, path: str) -> str:
        """Return the path as it is."""
        return path

    def get_file_info(self, paths: Iterable[str]) -> list[Any]:
        """Describe objects and prefixes."""
        return [self._describe(path) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        """Describe all objects under a prefix."""
        found = self._storage.list_objects(selector.base_dir)
        if not found and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        depth = selector.base_dir.rstrip("/").count("/") + 1
        return [
            _to_file_info(info)
            for info in found
            if selector.recursive or info.uri.count("/") == depth
        ]

    def open_input_file(self, path: str) -> Any:
        """Open for random access."""
        return pa.PythonFile(self._storage.open_random(path), mode="r")

    def open_input_stream(self, path: str) -> Any:
        """Open for sequential access."""
        return pa.PythonFile(self._storage.open_stream(path), mode="r")

    def _describe(self, path: str) -> Any:
        try:
            return _to_file_info(self._storage.stat(path))
        except ObjectMissingError:
            is_folder = bool(self._storage.list_objects(path))
            return pafs.FileInfo(
                path, type=pafs.FileType.Directory if is_folder else pafs.FileType.NotFound
            )

    def _refuse(self, *_: object) -> NoReturn:
        raise NotImplementedError("this file system is read-only; write through Storage")

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = _refuse
    delete_root_dir_contents = move = open_append_stream = open_output_stream = _refuse


def _to_file_info(info: ObjectInfo) -> Any:
    return pafs.FileInfo(
        info.uri, type=pafs.FileType.File, size=info.size_bytes, mtime=info.modified_s
    )
