"""Publishing: one conditional write makes a generation serve, a new one or an older one again."""

import uuid
from dataclasses import dataclass

from pipeline.errors import (
    ConflictError,
    CorruptionError,
    NothingThereError,
    PublishError,
    SettingsError,
    describe_no_index,
)
from pipeline.index.files import FileStore
from pipeline.index.health import Stock, inspect, list_older, take_stock
from pipeline.index.manifest import FileInfo, Manifest, digest_bytes
from pipeline.index.pointer import (
    Current,
    Pointer,
    look_up,
    manifest_path,
    read_doomed,
    read_generation,
)
from pipeline.storage import join_uri

MAX_TRIES = 8
"""Garbage collections that one publication lets pass."""


@dataclass(frozen=True, slots=True)
class Target:
    """A generation that is to serve.

    Attributes:
        generation: Its name.
        manifest_sha256: Digest of its manifest, hex.
        seq: Number of the publication.
        needed: The files it cannot do without.
        pinned: Whether builds are to leave it alone.
    """

    generation: str
    manifest_sha256: str
    seq: int
    needed: tuple[FileInfo, ...] = ()
    pinned: bool = False


def name_generation(seq: int) -> str:
    """Return a new name, ``"<seq>-<uid>"``, that no other publisher can have."""
    return f"{seq:06d}-{uuid.uuid4().hex[:8]}"


def publish(files: FileStore, manifest: Manifest, *, before: Current) -> Pointer:
    """Write the manifest, then swap the pointer, if nobody else has meanwhile.

    Args:
        files: The index.
        manifest: The new generation; all its files are there.
        before: What ``CURRENT`` was when the build began.

    Raises:
        PublishError: Another publisher was first; the manifest is gone again then, unless somebody
            made it serve.
    """
    data, uri = manifest.to_json(), join_uri(files.index, manifest_path(manifest.generation))
    files.storage.put_if_absent(uri, data)
    needed = tuple(manifest.list_needed())
    target = Target(manifest.generation, digest_bytes(data), manifest.seq, needed)
    try:
        return swap_pointer(files, target, before)
    except PublishError:
        # Where CURRENT is missing or damaged, others make the newest whole generation serve.
        now = look_up(files.index, files.storage).pointer
        if before.pointer and now and manifest.generation not in (now.generation, *now.history):
            files.storage.delete([uri])
        raise


def swap_pointer(files: FileStore, target: Target, before: Current) -> Pointer:
    """Make ``CURRENT`` point to a generation whose manifest is there.

    A garbage collection that came between is let pass, if it has left all that is needed.

    Raises:
        PublishError: Another publisher was first, or garbage collection was.
    """
    uri = join_uri(files.index, "CURRENT")
    for _ in range(MAX_TRIES):
        pointer = _follow(before.pointer, target)
        _refuse_doomed(files, target, pointer)
        try:
            if before.version is None:
                files.storage.put_if_absent(uri, pointer.to_json())
            else:
                files.storage.put_if_version(uri, pointer.to_json(), before.version)
            return pointer
        except ConflictError as error:
            again = look_up(files.index, files.storage)
            if _took_effect(pointer, before.pointer, again.pointer):
                return pointer
            before = _let_pass(files, target, before, again, error)
    raise PublishError(f"{uri} kept changing for {MAX_TRIES} tries; run again when nothing else is")


def _follow(pointer: Pointer | None, target: Target) -> Pointer:
    if pointer is None:
        pinned = target.pinned
        return Pointer(target.seq, target.generation, target.manifest_sha256, pinned=pinned)
    return pointer.succeed(
        target.generation, target.manifest_sha256, seq=target.seq, pinned=target.pinned
    )


def _took_effect(written: Pointer, before: Pointer | None, now: Pointer | None) -> bool:
    """Tell whether a write of ``CURRENT`` that met a conflict had been carried out before.

    When the reply to a write is lost it is sent again, and the second one meets what the first one
    wrote, or what somebody made of that since.
    """
    if now is None:
        return False
    if (now.generation, now.pinned) == (written.generation, written.pinned):
        return True
    served = (before.generation, *before.history) if before else ()
    return written.generation in now.history and written.generation not in served


def _let_pass(
    files: FileStore, target: Target, before: Current, again: Current, error: ConflictError
) -> Current:
    """Return ``again``, what ``CURRENT`` is now, if it is nothing but garbage collected since."""
    if not _same_publication(before.pointer, again.pointer):
        raise PublishError(
            f"generation {target.generation} was not published: another publisher was first at "
            f"{files.index}/CURRENT; run again to build on what it published"
        ) from error
    sizes = {info.uri: info.size_bytes for info in files.storage.list_objects(files.index)}
    damage = files.find_damage(target.needed, sizes=sizes)
    if damage is not None:
        raise PublishError(_DELETED.format(name=target.generation, what=damage)) from error
    return again


_DELETED = (
    "generation {name} was not published: garbage collection deletes what it needs ({what}); "
    "run again"
)


def _refuse_doomed(files: FileStore, target: Target, pointer: Pointer) -> None:
    doomed = read_doomed(files.index, pointer, files.storage)
    for path in (manifest_path(target.generation), *(file.path for file in target.needed)):
        if path in doomed:
            raise PublishError(_DELETED.format(name=target.generation, what=path))


def _same_publication(one: Pointer | None, other: Pointer | None) -> bool:
    if one is None or other is None:
        return False
    return (one.seq, one.generation, one.pinned) == (other.seq, other.generation, other.pinned)


def roll_back(files: FileStore, target: str) -> tuple[Pointer, Manifest]:
    """Make an older generation serve again, pinned, as a new publication.

    It works whatever state ``CURRENT`` is in; of the target, every file is read and compared.

    Args:
        files: The index.
        target: Name of a generation, or ``"previous"`` for the parent of the one that serves;
            where that cannot be told, the newest whole one before it.

    Raises:
        NothingThereError: There is no such generation, or it is damaged; the message lists others.
        PublishError: Another publisher was first.
    """
    stock = take_stock(files)
    if stock.current.version is None and not stock.names:
        raise NothingThereError(describe_no_index(files.index))
    name = target if target != "previous" else _find_previous(files, stock)
    if name not in stock.names:
        raise SettingsError(
            f"no generation {name!r} at {files.index!r}; there are: {', '.join(stock.names)}"
        )
    manifest, sha256 = _read_whole(files, name, stock)
    needed = tuple(manifest.list_needed())
    chosen = Target(name, sha256, stock.next_seq, needed, pinned=True)
    return swap_pointer(files, chosen, stock.current), manifest


def serve_again(files: FileStore, manifest: Manifest, stock: Stock) -> Pointer:
    """Make a whole generation serve that ``CURRENT`` does not point to, or pins.

    Raises:
        PublishError: Another publisher was first.
    """
    _, sha256 = read_generation(files.index, manifest.generation, files.storage)
    needed = tuple(manifest.list_needed())
    target = Target(manifest.generation, sha256, stock.next_seq, needed)
    return swap_pointer(files, target, stock.current)


def _read_whole(files: FileStore, name: str, stock: Stock) -> tuple[Manifest, str]:
    try:
        manifest, sha256 = read_generation(files.index, name, files.storage)
        damage = files.find_damage(manifest.list_needed())
    except CorruptionError as error:
        damage = str(error).split(";")[0]
    if damage is None:
        return manifest, sha256
    others = [n for n in stock.names if n != name and inspect(files, n, stock.sizes)[1] is None]
    instead = f"roll back to one of: {', '.join(others)}, or " if others else ""
    raise SettingsError(
        f"generation {name} is no longer whole: {damage}; {instead}build again with --full"
    )


def _find_previous(files: FileStore, stock: Stock) -> str:
    pointer = stock.current.pointer
    manifest = inspect(files, pointer.generation, stock.sizes)[0] if pointer else None
    if manifest is not None and manifest.parent in stock.names:
        return str(manifest.parent)
    older = list_older(stock)
    if not older:
        serving = pointer.generation if pointer else "the one that serves"
        raise SettingsError(
            f"there is no generation before {serving} to roll back to; "
            f"there are: {', '.join(stock.names)}"
        )
    return next((name for name in older if inspect(files, name, stock.sizes)[1] is None), older[0])
