"""Publishing: gates, one conditional write, roll-back, and clearing away what nobody needs."""

import uuid

from pipeline.errors import ConflictError, ObjectMissingError, PublishError, SettingsError
from pipeline.index.manifest import Manifest, digest_bytes
from pipeline.index.pointer import Pointer, manifest_path, parse_manifest, read_pointer
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
