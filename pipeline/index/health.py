"""Whether generations are whole, and which one to go on from where the one that serves is not."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import CorruptionError, NewerFormatError
from pipeline.index.files import FileStore
from pipeline.index.manifest import Manifest
from pipeline.index.pointer import (
    Current,
    list_manifests,
    look_up,
    manifest_path,
    read_doomed,
    read_generation,
    read_manifest,
)

LOG = logging.getLogger("pipeline.index")


@dataclass(frozen=True, slots=True)
class Stock:
    """What lies under an index, in one listing, and what ``CURRENT`` said before it.

    Attributes:
        current: What ``CURRENT`` was.
        sizes: Size of every object by URI, in bytes.
        names: The generations that have a manifest, oldest first, without those that are being
            deleted.
        doomed: Paths under the index that are being deleted.
    """

    current: Current
    sizes: Mapping[str, int]
    names: tuple[str, ...]
    doomed: frozenset[str] = frozenset()

    @property
    def next_seq(self) -> int:
        """The number of the next publication: above all that were ever given away."""
        given = [int(name.split("-")[0]) for name in self.names if name.split("-")[0].isdecimal()]
        pointer = self.current.pointer
        return 1 + max([0, *given, *([pointer.seq] if pointer else [])])


@dataclass(frozen=True, slots=True)
class Base:
    """The generation that a build goes on from.

    Attributes:
        stock: What lies there.
        manifest: The newest generation that is whole; None where none is.
        known: The newest generation that can be read at all, to compare spaces and rows with.
        damage: What is wrong with the one that should serve; None where nothing is.
    """

    stock: Stock
    manifest: Manifest | None
    known: Manifest | None
    damage: str | None


def take_stock(files: FileStore) -> Stock:
    """List an index."""
    current = look_up(files.index, files.storage)
    doomed = read_doomed(files.index, current.pointer, files.storage)
    sizes = {info.uri: info.size_bytes for info in files.storage.list_objects(files.index)}
    names = list_manifests(files.index, sizes)
    left = tuple(name for name in names if manifest_path(name) not in doomed)
    return Stock(current, sizes, left, doomed)


def find_base(files: FileStore, *, digests: bool) -> Base:
    """Return the generation that serves if it is whole, or else the newest one before it that is.

    Generations newer than the one that should serve are never taken: somebody rolled back from
    them.

    Args:
        files: The index.
        digests: Read all files and compare digests, instead of sizes in one listing.

    Raises:
        NewerFormatError: A newer program wrote the index.
    """
    stock = take_stock(files)
    known: Manifest | None = None
    damage = stock.current.damage
    if stock.current.pointer is None and damage is None and stock.names:
        damage = f"{files.index}/CURRENT is missing"
    for manifest, fault in _inspect(files, stock, digests=digests):
        known = known or manifest
        if manifest is not None and fault is None:
            return Base(stock, manifest, known, damage)
        damage = damage or fault
    return Base(stock, None, known, damage)


def _inspect(
    files: FileStore, stock: Stock, *, digests: bool
) -> Iterator[tuple[Manifest | None, str | None]]:
    """Yield each generation that may serve, newest first, and what is wrong with it."""
    pointer = stock.current.pointer
    sizes = None if digests else stock.sizes
    if pointer is not None:
        try:
            manifest = read_manifest(files.index, pointer, files.storage)
            yield manifest, files.find_damage(manifest.list_needed(), sizes=sizes)
        except NewerFormatError:
            raise
        except CorruptionError as error:
            yield None, str(error).split(";")[0]
    for name in list_older(stock):
        yield inspect(files, name, sizes)


def list_older(stock: Stock) -> list[str]:
    """Return the generations before the one that serves, newest first; all where none does."""
    pointer = stock.current.pointer
    if pointer is None:
        return list(reversed(stock.names))
    return [name for name in reversed(stock.names) if name < pointer.generation]


def inspect(
    files: FileStore, name: str, sizes: Mapping[str, int] | None
) -> tuple[Manifest | None, str | None]:
    """Return a generation's manifest, if it can be read, and what is wrong with the generation.

    Raises:
        NewerFormatError: A newer program wrote it.
    """
    try:
        manifest, _ = read_generation(files.index, name, files.storage)
    except NewerFormatError:
        raise
    except CorruptionError as error:
        return None, str(error).split(";")[0]
    return manifest, files.find_damage(manifest.list_needed(), sizes=sizes)
