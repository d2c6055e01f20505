"""Finds the files of an index that no kept generation needs."""

import time
from dataclasses import dataclass

from pipeline.errors import SettingsError
from pipeline.index.pointer import manifest_path, parse_manifest, read_pointer
from pipeline.index.publish import list_generations
from pipeline.storage import Storage, join_uri


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
