"""One shard to chunks: tar archives, Parquet files, bundles of loose images.

Everything streams: one chunk, one image and the shard's names are in memory, whatever its size.
What is wrong with one image becomes its record's status; a container that cannot be read further
keeps what was read before and closes with one record of status ``bad_shard``.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

from pipeline.carried import UnfitValueError
from pipeline.errors import (
    CredentialsError,
    NoImagesError,
    RecordError,
    ShardError,
    StorageError,
    UnreachableError,
    describe_excess_bytes,
)
from pipeline.input.container import ABSENT, BrokenContainerError, FoundImage, ReadOptions
from pipeline.input.parquet import read_parquet, read_parquet_row
from pipeline.input.tar import Again, read_tar
from pipeline.records import Chunk, Member, Record, Shard, ShardKind
from pipeline.storage import Storage

_FETCH_THREADS = 16
_MOST_UNREACHABLE = 8
"""Images of one bundle for which storage may fail to the last try before it is storage's fault."""


def read_chunks(shard: Shard, *, storage: Storage, options: ReadOptions) -> Iterator[Chunk]:
    """Read a shard as chunks, in order; the final one has ``last`` set.

    The same shard gives the same chunks every time: keys, rows and cuts depend on its content and
    ``options`` alone. Rows count from 0 without gaps. A shard without images is one empty chunk.
    Notes count ``ignored_members``, ``oversized_sidecars``, ``missing_columns``,
    ``duplicate_keys``, and ``without_images`` where a Parquet file has no column of them.

    Raises:
        ObjectMissingError: The shard is gone since it was listed. That says nothing of its
            content, so there is no row that would take the place of older ones.
        ObjectChangedError: The same, of a shard that was replaced or written over.
        SettingsError: ``options`` name Parquet columns that are not there or not of a fitting
            type.
        ShardError: The output's columns cannot hold a value that the shard carries.
        StorageError: Storage failed for good; nothing is said about the shard then.
    """
    notes: Counter[str] = Counter()
    records = _number_records(shard, storage, options, notes)
    return _cut_chunks(shard.id, records, options, notes)


def read_record_bytes(
    uri: str,
    *,
    row: int,
    offset: int | None,
    nbytes: int,
    sha256: bytes | None,
    storage: Storage,
    image_column: str | None = None,
) -> bytes:
    """Fetch one encoded image that was embedded before, from where its row says it lies.

    One ranged read where the row has an offset. Without, a Parquet file is read as far as the
    row's group, and a compressed archive from its start up to the image.

    Args:
        uri: The row's ``shard``.
        row: The row's ``row``.
        offset: The row's ``offset``.
        nbytes: The row's ``nbytes``.
        sha256: The row's ``sha256``; an image with another digest is not the one that was embedded.
            None where the row has none.
        storage: How to reach it.
        image_column: Parquet column with the images; found by its type where None.

    Raises:
        RecordError: There is no image there any more, or another one.
        StorageError: Storage failed, or the object is gone.
    """
    if offset is not None:
        data = storage.read_range(uri, offset, nbytes)
    else:
        data = _find_record(uri, row, storage=storage, image_column=image_column)
    if sha256 is not None and hashlib.sha256(data).digest()[: len(sha256)] != sha256:
        raise RecordError(
            "unreadable",
            f"row {row:,} of {uri} holds another image than the one that was embedded; the object "
            "was replaced since: run embed and index again",
        )
    return data


def _find_record(uri: str, row: int, *, storage: Storage, image_column: str | None) -> bytes:
    """Read a Parquet file or an archive up to one of its images."""
    options = ReadOptions(image_column=image_column)
    try:
        with storage.open_random(uri) as file:
            is_parquet = file.read(4) == b"PAR1"
            if is_parquet:
                return read_parquet_row(file, row, uri=uri, options=options)
        with storage.open_stream(uri) as stream:
            again = _make_again(uri, None, storage)
            images = read_tar(stream, options=options, notes=Counter(), again=again)
            found = next(islice(images, row, None), None)
    except BrokenContainerError as error:
        raise RecordError("unreadable", f"row {row:,} of {uri}: {error}") from error
    if found is None or found.status != "ok":
        raise RecordError("unreadable", f"{uri} has no image in row {row:,} any more")
    return found.data


def _cut_chunks(
    shard_id: str, records: Iterator[Record], options: ReadOptions, notes: Counter[str]
) -> Iterator[Chunk]:
    chunk, absent = list[Record](), list[tuple[int, str]]()
    index = size_bytes = 0
    for record in records:
        number = len(chunk) + len(absent)  # what is absent takes its place: another try may have it
        if number and (
            number == options.chunk_images or size_bytes + record.nbytes > options.chunk_bytes
        ):
            yield Chunk(shard_id, index, chunk, last=False, absent=tuple(absent))
            chunk, absent, size_bytes, index = [], [], 0, index + 1
        if record.status == ABSENT:
            absent.append((record.row, record.error or ""))
        else:
            chunk.append(record)
        size_bytes += record.nbytes
    yield Chunk(shard_id, index, chunk, last=True, notes=dict(notes), absent=tuple(absent))


def _number_records(
    shard: Shard, storage: Storage, options: ReadOptions, notes: Counter[str]
) -> Iterator[Record]:
    row = 0
    names = _UniqueNames(notes)
    try:
        for found in _FINDERS[shard.kind](shard, storage, options, notes):
            name = names.add(found.name)
            uri = shard.members[row].uri if shard.kind == "bundle" else shard.source
            yield Record(
                key=f"{shard.name}/{name}" if shard.name else name,
                row=row,
                shard=uri,
                data=found.data,
                offset=found.offset,
                carried=dict.fromkeys(options.carry) | dict(found.carried),
                status=found.status,
                error=found.error,
                left_behind_bytes=shard.members[row].size_bytes if found.status == ABSENT else 0,
            )
            row += 1
    except NoImagesError:
        notes["without_images"] += 1
    except BrokenContainerError as error:
        carried = dict.fromkeys(options.carry)
        reason = f"{error}; {row:,} rows come before it"
        yield Record(shard.name, row, shard.source, b"", None, carried, "bad_shard", reason)
    except UnfitValueError as error:
        raise ShardError(
            f"column {error.column!r} of {shard.source} does not fit: {error.reason}; write it "
            "there as the output has it, or give it one type in all files and use another "
            "--output, or leave it out of --carry"
        ) from error


class _UniqueNames:
    """Gives a name that is used again the suffix ``#2``, ``#3`` and so on."""

    def __init__(self, notes: Counter[str]) -> None:
        self._notes = notes
        self._seen: set[str] = set()
        self._uses: dict[str, int] = {}

    def add(self, name: str) -> str:
        unique = name
        while unique in self._seen:
            self._uses[name] = self._uses.get(name, 1) + 1
            unique = f"{name}#{self._uses[name]}"
        if unique is not name:
            self._notes["duplicate_keys"] += 1
        self._seen.add(unique)
        return unique


def _find_in_tar(
    shard: Shard, storage: Storage, options: ReadOptions, notes: Counter[str]
) -> Iterator[FoundImage]:
    version = shard.version or None
    again = _make_again(shard.source, version, storage)
    with storage.open_stream(shard.source, version=version) as stream:
        yield from read_tar(stream, options=options, notes=notes, again=again)


def _make_again(uri: str, version: str | None, storage: Storage) -> Again:
    return Again(
        open=partial(storage.open_stream, uri, version=version),
        fetch=partial(storage.read_range, uri, version=version),
    )


def _find_in_parquet(
    shard: Shard, storage: Storage, options: ReadOptions, notes: Counter[str]
) -> Iterator[FoundImage]:
    with storage.open_random(shard.source, version=shard.version or None) as file:
        yield from read_parquet(file, uri=shard.source, options=options, notes=notes)


def _find_in_bundle(
    shard: Shard, storage: Storage, options: ReadOptions, _notes: Counter[str]
) -> Iterator[FoundImage]:
    """Yield the images of a bundle; what cannot be had in the version listed is ``ABSENT``.

    Raises:
        CredentialsError: Not one image can be had.
        UnreachableError: Storage fails for too many of them to be the images' fault.
    """
    faults = 0
    for found, fault in _fetch_ahead(shard, storage, options):
        faults += fault is not None
        if fault is not None and faults > _MOST_UNREACHABLE:
            raise fault
        yield found


_Fetched = tuple[FoundImage, UnreachableError | None]


def _fetch_ahead(shard: Shard, storage: Storage, options: ReadOptions) -> Iterator[_Fetched]:
    """Fetch the members of a bundle, several at a time and at most a chunk's bytes ahead."""
    pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch")
    pending: deque[tuple[Future[_Fetched], int]] = deque()
    ahead_bytes = 0
    try:
        for member in shard.members:
            while pending and (
                len(pending) == 2 * _FETCH_THREADS
                or ahead_bytes + member.size_bytes > options.chunk_bytes
            ):
                future, size_bytes = pending.popleft()
                ahead_bytes -= size_bytes
                yield future.result()
            pending.append((pool.submit(_fetch, member, storage, options), member.size_bytes))
            ahead_bytes += member.size_bytes
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch(member: Member, storage: Storage, options: ReadOptions) -> _Fetched:
    if member.size_bytes > options.max_image_bytes:
        reason = describe_excess_bytes(member.size_bytes, options.max_image_bytes)
        return FoundImage(member.key, b"", 0, status="too_large", error=reason), None
    version = member.version or None
    try:
        data = storage.read_range(member.uri, 0, member.size_bytes, version=version)
    except CredentialsError:
        raise
    except StorageError as error:
        fault = error if isinstance(error, UnreachableError) else None
        return FoundImage(member.key, b"", status=ABSENT, error=str(error)), fault
    return FoundImage(member.key, data, 0), None


_Finder = Callable[[Shard, Storage, ReadOptions, Counter[str]], Iterator[FoundImage]]

_FINDERS: dict[ShardKind, _Finder] = {
    "tar": _find_in_tar,
    "parquet": _find_in_parquet,
    "bundle": _find_in_bundle,
}
