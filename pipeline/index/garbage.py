"""Garbage collection: finds the files of an index that no kept generation needs, and deletes them.

A build or a roll-back that is under way may be about to use what is garbage now. So a collection
first changes ``CURRENT``, which then names a list of what is doomed. Whoever looked at it before
finds, at the moment of publishing, that it has changed, and looks whether its files are still
there; whoever looks later reuses nothing that is doomed. Only then anything is deleted, manifests
and markers before the files they name, so that what is left of a collection that was killed is
never found.
"""

import json
import logging
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from pipeline.errors import (
    ConflictError,
    CorruptionError,
    NewerFormatError,
    NothingThereError,
    PublishError,
    describe_no_index,
)
from pipeline.index.pointer import (
    REMEDY,
    Current,
    Pointer,
    list_manifests,
    look_up,
    manifest_path,
    read_doomed,
    read_generation,
)
from pipeline.records import ObjectInfo
from pipeline.storage import Storage, join_uri

LOG = logging.getLogger("pipeline.index")

MAX_TRIES = 8
"""Publications that may come between before a list of doomed files is left to the next time."""

MARKERS = ("manifest.json", "segment.json", "training.json")
"""What makes a generation, a segment or a training be found; deleted first."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """What can be deleted.

    Attributes:
        current: What ``CURRENT`` was when it was found.
        generations: Generations that are given up.
        uris: Objects that no kept generation needs, manifests and markers first.
        size_bytes: Their size.
    """

    current: Current
    generations: tuple[str, ...]
    uris: tuple[str, ...]
    size_bytes: int


def find_garbage(index: str, *, keep: int, min_age_s: float, storage: Storage) -> Garbage:
    """Return what no generation needs that serves, is among the newest, or is young.

    Only generations that have served count as the newest; those of builds that died before they
    published go when they are old. So do the unfinished files of writers that were killed. Objects
    younger than ``min_age_s`` stay, whoever they belong to: a build that is under way has files
    that no manifest names yet.

    Args:
        index: URI of the index.
        keep: Number of generations to keep, the one that serves included.
        min_age_s: Age below which nothing is deleted, in seconds.
        storage: How to reach the index.

    Raises:
        NothingThereError: There is no index at that URI.
        CorruptionError: ``CURRENT`` or the generation that serves cannot be read.
    """
    current = look_up(index, storage)
    if current.damage is not None:
        raise CorruptionError(f"{current.damage}; {REMEDY}")
    if current.pointer is None:
        raise NothingThereError(describe_no_index(index))
    newest = time.time() - min_age_s
    objects = {info.uri: info for info in storage.list_objects(index)}
    names = list_manifests(index, objects)
    young = [n for n in names if not _is_old(objects[join_uri(index, manifest_path(n))], newest)]
    served = [name for name in list_served(index, current.pointer, storage) if name in names]
    kept = {current.pointer.generation, *served[:keep], *young}
    needed = _list_needed(index, kept, current.pointer, storage) | {join_uri(index, "CURRENT")}
    exported = tuple(join_uri(index, "exports", name) + "/" for name in kept)
    doomed = [
        info
        for info in [*objects.values(), *storage.list_unfinished(index)]
        if _is_old(info, newest) and info.uri not in needed and not info.uri.startswith(exported)
    ]
    doomed.sort(key=lambda info: (not info.uri.endswith(MARKERS), info.uri))
    return Garbage(
        current,
        tuple(name for name in names if name not in kept),
        tuple(info.uri for info in doomed),
        sum(info.size_bytes for info in doomed),
    )


def _is_old(info: ObjectInfo, newest_s: float) -> bool:
    return info.modified_s is not None and info.modified_s <= newest_s


def list_served(index: str, pointer: Pointer, storage: Storage) -> list[str]:
    """Return the generations that serve or have served, the latest first."""
    served = [pointer.generation, *pointer.history]
    name: str | None = served[-1]  # older programs kept no history, but each parent has served
    while name is not None:
        try:
            name = read_generation(index, name, storage)[0].parent
        except CorruptionError:
            break
        served += [name] if name else []
    return list(dict.fromkeys(served))


def _list_needed(index: str, kept: Iterable[str], pointer: Pointer, storage: Storage) -> set[str]:
    needed: set[str] = set()
    for name in kept:
        uri = join_uri(index, manifest_path(name))
        try:
            manifest, _ = read_generation(index, name, storage)
        except NewerFormatError:
            raise
        except CorruptionError as error:
            if name == pointer.generation:
                raise
            LOG.warning("keeping nothing of a generation that cannot be read: %s", error)
            continue
        paths = {file.path for file in manifest.list_files()}
        paths |= {f"segments/{segment.id}/segment.json" for segment in manifest.segments}
        trained = [path.split("/")[1] for path in paths if path.startswith("quantizers/")]
        paths |= {f"quantizers/{identity}/training.json" for identity in trained}
        needed |= {uri, *(join_uri(index, path) for path in paths)}
    return needed


def delete_garbage(index: str, found: Garbage, storage: Storage) -> None:
    """Delete what ``find_garbage`` returned, unless something was published since.

    Raises:
        PublishError: Something was published since; nothing is deleted.
    """
    pointer = found.current.pointer
    if not found.uris or pointer is None or found.current.version is None:
        return
    number = pointer.collections + 1
    doomed = {uri[len(index) + 1 :] for uri in found.uris} | read_doomed(index, pointer, storage)
    path = f"collections/{number:06d}-{uuid.uuid4().hex[:8]}.json"
    storage.put(join_uri(index, path), json.dumps(sorted(doomed)).encode())
    announced = replace(pointer, collections=number, doomed=path)
    try:
        uri = join_uri(index, "CURRENT")
        storage.put_if_version(uri, announced.to_json(), found.current.version)
    except ConflictError as error:
        now = look_up(index, storage).pointer
        if now is None or now.doomed != path:  # else the announcement's reply was lost
            storage.delete([join_uri(index, path)])
            raise PublishError(
                f"nothing was deleted: a generation was published at {index}/CURRENT meanwhile; "
                "run again"
            ) from error
    markers = [uri for uri in found.uris if uri.endswith(MARKERS)]
    storage.delete(markers)
    storage.delete(uri for uri in found.uris if not uri.endswith(MARKERS))
    _forget_doomed(index, path, storage)


def _forget_doomed(index: str, path: str, storage: Storage) -> None:
    """Take a list of doomed files out of ``CURRENT``, whatever was published meanwhile."""
    for _ in range(MAX_TRIES):
        current = look_up(index, storage)
        if current.pointer is None or current.version is None:
            return
        if current.pointer.doomed != path:
            storage.delete([join_uri(index, path)])
            return
        cleared = replace(current.pointer, doomed="")
        with suppress(ConflictError):
            storage.put_if_version(join_uri(index, "CURRENT"), cleared.to_json(), current.version)
