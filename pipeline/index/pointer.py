"""What serves: ``CURRENT``, the only object of an index that changes, and what it points to."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from pipeline.errors import CorruptionError, NewerFormatError, ObjectMissingError
from pipeline.index.manifest import FORMAT_VERSION, Manifest, digest_bytes, seal, unseal
from pipeline.storage import Storage, join_uri

MAX_HISTORY = 100
"""Generations that ``CURRENT`` remembers; garbage collection keeps far fewer."""

REMEDY = (
    "run the index job again, which goes on from the newest whole generation, or name one with "
    "--roll-back"
)


@dataclass(frozen=True, slots=True)
class Pointer:
    """The content of ``CURRENT``.

    Attributes:
        seq: Number of this publication; grows by one, for a roll-back too.
        generation: The generation that serves.
        manifest_sha256: Digest of its manifest, hex.
        pinned: True after a roll-back: builds leave ``CURRENT`` alone until they are told not to.
        history: Generations that have served before, the latest first. A manifest that is neither
            here nor serving was left behind by a build that did not get as far.
        collections: How often garbage has been collected. Every collection changes ``CURRENT``
            before it deletes anything, so that whoever had looked before cannot publish unawares.
        doomed: Path under the index of the list of what is being deleted just now; empty if
            nothing is.
    """

    seq: int
    generation: str
    manifest_sha256: str
    pinned: bool = False
    history: tuple[str, ...] = ()
    collections: int = 0
    doomed: str = ""

    def to_json(self) -> bytes:
        """Serialise for ``CURRENT``."""
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "Pointer":
        """Read ``to_json``, and what older programs wrote.

        Raises:
            ValueError: It has been damaged, or is something else; so do KeyError and TypeError.
        """
        values = unseal(data)
        seq, generation = values["seq"], values["generation"]
        if not isinstance(seq, int) or not isinstance(generation, str):
            raise ValueError("seq is no number, or generation no name")
        return cls(
            seq,
            generation,
            str(values["manifest_sha256"]),
            pinned=bool(values.get("pinned", False)),
            history=tuple(map(str, values.get("history", ()))),
            collections=int(values.get("collections", 0)),
            doomed=str(values.get("doomed", "")),
        )

    def succeed(
        self, generation: str, manifest_sha256: str, *, seq: int, pinned: bool
    ) -> "Pointer":
        """Return the pointer that comes next, with a number that is higher than any before."""
        past = [self.generation, *self.history]
        kept = [name for name in dict.fromkeys(past) if name != generation]
        return replace(
            self,
            seq=max(seq, self.seq + 1),
            generation=generation,
            manifest_sha256=manifest_sha256,
            pinned=pinned,
            history=tuple(kept[:MAX_HISTORY]),
        )


@dataclass(frozen=True, slots=True)
class Current:
    """What ``CURRENT`` was at one moment, readable or not.

    Attributes:
        pointer: What it said; None where it is missing or damaged.
        version: What to pass to a conditional write; None where it is missing.
        damage: What is wrong with it; None where nothing is, or where it is missing.
    """

    pointer: Pointer | None = None
    version: str | None = None
    damage: str | None = None


def manifest_path(generation: str) -> str:
    """Return the path of a generation's manifest under the index."""
    return f"generations/{generation}/manifest.json"


def look_up(index: str, storage: Storage) -> Current:
    """Return what ``CURRENT`` is now, damaged or missing as it may be."""
    uri = join_uri(index, "CURRENT")
    try:
        data, version = storage.read_versioned(uri)
    except ObjectMissingError:
        return Current()
    try:
        return Current(Pointer.from_json(data), version)
    except (ValueError, KeyError, TypeError) as error:
        return Current(None, version, f"{uri} is not a pointer ({error})")


def read_doomed(index: str, pointer: Pointer | None, storage: Storage) -> frozenset[str]:
    """Return the paths under an index that garbage collection is deleting just now."""
    if pointer is None or not pointer.doomed:
        return frozenset()
    try:
        return frozenset(json.loads(storage.read(join_uri(index, pointer.doomed))))
    except ObjectMissingError:  # that collection has ended since
        return frozenset()


def read_pointer(index: str, storage: Storage) -> tuple[Pointer, str] | None:
    """Return what ``CURRENT`` says and its version, or None where nothing is published yet.

    Raises:
        CorruptionError: It is there but cannot be understood.
    """
    found = look_up(index, storage)
    if found.damage is not None:
        raise CorruptionError(f"{found.damage}; {REMEDY}")
    if found.pointer is None or found.version is None:
        return None
    return found.pointer, found.version


def read_manifest(index: str, pointer: Pointer, storage: Storage) -> Manifest:
    """Return the manifest that ``pointer`` names, its digest verified.

    Raises:
        CorruptionError: It is not the one that was published, or of a newer format.
    """
    uri = join_uri(index, manifest_path(pointer.generation))
    try:
        data = storage.read(uri)
    except ObjectMissingError as error:
        raise CorruptionError(f"{uri} is missing; {REMEDY}") from error
    if digest_bytes(data) != pointer.manifest_sha256:
        raise CorruptionError(
            f"{uri} is not what was published: its digest differs from CURRENT's; {REMEDY}"
        )
    return parse_manifest(data, uri)


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """Read a manifest's bytes.

    Raises:
        NewerFormatError: A newer program wrote them.
        CorruptionError: They cannot be understood.
    """
    try:
        found = json.loads(data).get("format")
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise NewerFormatError(
                f"{uri} has format {found}; this program reads {FORMAT_VERSION}; upgrade it"
            )
        if found != FORMAT_VERSION:
            raise ValueError(f"format is {found!r}")
        return Manifest.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{uri} is not a manifest: {error}; {REMEDY}") from error


def read_generation(index: str, name: str, storage: Storage) -> tuple[Manifest, str]:
    """Return the manifest of a generation by name, and its digest, hex.

    Raises:
        CorruptionError: It is missing or damaged.
    """
    uri = join_uri(index, manifest_path(name))
    try:
        data = storage.read(uri)
    except ObjectMissingError as error:
        raise CorruptionError(f"{uri} is missing; {REMEDY}") from error
    return parse_manifest(data, uri), digest_bytes(data)


def list_manifests(index: str, uris: Iterable[str]) -> list[str]:
    """Return the names of the generations whose manifests are among ``uris``, oldest first."""
    start, end = join_uri(index, "generations") + "/", "/manifest.json"
    return sorted(
        uri[len(start) :].split("/")[0]
        for uri in uris
        if uri.startswith(start) and uri.endswith(end)
    )


def read_current(index: str, storage: Storage) -> Manifest | None:
    """Return the generation that serves, or None where nothing is published yet.

    Raises:
        CorruptionError: The pointer or the manifest is damaged.
    """
    found = read_pointer(index, storage)
    return None if found is None else read_manifest(index, found[0], storage)
