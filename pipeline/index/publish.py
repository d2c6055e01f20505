"""Publishing: gates, one conditional write, roll-back, and clearing away what nobody needs."""

import time
import uuid
from dataclasses import dataclass

from pipeline.errors import ConflictError, ObjectMissingError, PublishError, SettingsError
from pipeline.index.current import Pointer, manifest_path, parse_manifest, read_pointer
from pipeline.index.manifest import Manifest, digest_bytes
from pipeline.storage import Storage, join_uri

Version = tuple[Pointer, str] | None
"""What ``CURRENT`` said when a build began, and its version; None if there was nothing."""


def name_generation(seq: int) -> str:
    """Return a new name, ``"<seq>-<uid>"``, that no other publisher can have."""
    return f"{seq:06d}-{uuid.uuid4().hex[:8]}"


def publish(index: str, manifest: Manifest, *, before: Version, storage: Storage) -> Pointer:
    """Write the manifest, then swap the pointer, if nobody else has meanwhile.

    Args:
        index: URI of the index.
        manifest: The new generation; all its files are there.
        before: What ``read_pointer`` returned when the build began.
        storage: How to reach the index.

    Raises:
        PublishError: Another publisher was first.
    """
    data = manifest.to_json()
    storage.put_if_absent(join_uri(index, manifest_path(manifest.generation)), data)
    return swap_pointer(
        index,
        manifest.generation,
        manifest_sha256=digest_bytes(data),
        before=before,
        storage=storage,
    )


def swap_pointer(
    index: str, generation: str, *, manifest_sha256: str, before: Version, storage: Storage
) -> Pointer:
    """Make ``CURRENT`` point to a generation whose manifest is there.

    Raises:
        PublishError: Another publisher was first.
    """
    uri = join_uri(index, "CURRENT")
    pointer = Pointer(before[0].seq + 1 if before else 1, generation, manifest_sha256)
    try:
        if before is None:
            storage.put_if_absent(uri, pointer.to_json())
        else:
            storage.put_if_version(uri, pointer.to_json(), before[1])
    except ConflictError as error:
        raise PublishError(
            f"generation {generation} was not published: another publisher was first at {uri}; "
            "run again to build on what it published"
        ) from error
    return pointer


def list_generations(index: str, storage: Storage) -> list[str]:
    """Return the names of all generations that have a manifest, oldest first."""
    base = join_uri(index, "generations")
    found = storage.list_objects(base)
    names = [info.uri[len(base) + 1 :] for info in found if info.uri.endswith("/manifest.json")]
    return sorted(name.split("/")[0] for name in names)


def roll_back(index: str, target: str, storage: Storage) -> tuple[Pointer, Manifest]:
    """Make an older generation serve again, as a new publication.

    Args:
        index: URI of the index.
        target: Name of a generation, or ``"previous"`` for the parent of the one that serves.
        storage: How to reach the index.

    Raises:
        SettingsError: There is no such generation; the message lists those there are.
        PublishError: Another publisher was first.
    """
    before = read_pointer(index, storage)
    if before is None:
        raise SettingsError(f"no index at {index!r}: CURRENT is missing; check the URI")
    name = target if target != "previous" else _find_previous(index, before[0], storage)
    uri = join_uri(index, manifest_path(name))
    try:
        data = storage.read(uri)
    except ObjectMissingError as error:
        names = ", ".join(list_generations(index, storage))
        raise SettingsError(f"no generation {name!r} at {index!r}; there are: {names}") from error
    manifest = parse_manifest(data, uri)
    missing = [f.path for f in manifest.list_files() if not storage.exists(join_uri(index, f.path))]
    if missing:
        raise SettingsError(f"generation {name} is no longer whole: {missing[0]} is missing")
    return swap_pointer(
        index, name, manifest_sha256=digest_bytes(data), before=before, storage=storage
    ), manifest


def _find_previous(index: str, pointer: Pointer, storage: Storage) -> str:
    uri = join_uri(index, manifest_path(pointer.generation))
    parent = parse_manifest(storage.read(uri), uri).parent
    if parent is None:
        raise SettingsError(
            f"generation {pointer.generation} has no parent to roll back to; "
            f"there are: {', '.join(list_generations(index, storage))}"
        )
    return parent


@dataclass(frozen=True, slots=True)
class Garbage:
    """What can be deleted.

    Attributes:
        generations: Generations that are given up.
        uris: Objects that no kept generation needs, manifests last.
        size_bytes: Their size.
    """

    generations: tuple[str, ...]
    uris: tuple[str, ...]
    size_bytes: int


def find_garbage(index: str, *, keep: int, min_age_s: float, storage: Storage) -> Garbage:
    """Return what no generation needs that serves, is among the newest, or is young.

    Objects younger than ``min_age_s`` stay, whoever they belong to: a build that is under way has
    files that no manifest names yet.

    Args:
        index: URI of the index.
        keep: Number of generations to keep, the one that serves included.
        min_age_s: Age below which nothing is deleted, in seconds.
        storage: How to reach the index.

    Raises:
        SettingsError: There is no index at that URI.
    """
    before = read_pointer(index, storage)
    if before is None:
        raise SettingsError(f"no index at {index!r}: CURRENT is missing; check the URI")
    now = time.time()
    objects = {info.uri: info for info in storage.list_objects(index)}
    names = list_generations(index, storage)
    kept = {before[0].generation, *names[-keep:]}
    for name in names:
        modified_s = objects[join_uri(index, manifest_path(name))].modified_s
        if modified_s is None or now - modified_s < min_age_s:
            kept.add(name)
    needed = _list_needed(index, kept, storage) | {join_uri(index, "CURRENT")}
    exported = tuple(join_uri(index, "exports", name) + "/" for name in kept)
    doomed = [
        info
        for uri, info in objects.items()
        if uri not in needed
        and not uri.startswith(exported)
        and info.modified_s is not None
        and now - info.modified_s >= min_age_s
    ]
    doomed.sort(key=lambda info: (info.uri.endswith("/manifest.json"), info.uri))
    return Garbage(
        tuple(name for name in names if name not in kept),
        tuple(info.uri for info in doomed),
        sum(info.size_bytes for info in doomed),
    )


def _list_needed(index: str, kept: set[str], storage: Storage) -> set[str]:
    needed: set[str] = set()
    for name in kept:
        uri = join_uri(index, manifest_path(name))
        manifest = parse_manifest(storage.read(uri), uri)
        needed |= {uri, *(join_uri(index, file.path) for file in manifest.list_files())}
        needed |= {join_uri(index, f"segments/{s.id}/segment.json") for s in manifest.segments}
    return needed
