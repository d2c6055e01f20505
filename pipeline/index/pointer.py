"""What serves: ``CURRENT``, the only object of an index that changes, and what it points to."""

import json
from dataclasses import asdict, dataclass

from pipeline.errors import CorruptionError, ObjectMissingError
from pipeline.index.manifest import FORMAT_VERSION, Manifest, digest_bytes
from pipeline.storage import Storage, join_uri


@dataclass(frozen=True, slots=True)
class Pointer:
    """The content of ``CURRENT``.

    Attributes:
        seq: Number of this publication; grows by one, for a roll-back too.
        generation: The generation that serves.
        manifest_sha256: Digest of its manifest, hex.
    """

    seq: int
    generation: str
    manifest_sha256: str

    def to_json(self) -> bytes:
        """Serialise for ``CURRENT``."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Pointer":
        """Read ``to_json``."""
        values = json.loads(data)
        return cls(values["seq"], values["generation"], values["manifest_sha256"])


def manifest_path(generation: str) -> str:
    """Return the path of a generation's manifest under the index."""
    return f"generations/{generation}/manifest.json"


def read_pointer(index: str, storage: Storage) -> tuple[Pointer, str] | None:
    """Return what ``CURRENT`` says and its version, or None where nothing is published yet.

    Raises:
        CorruptionError: It is there but cannot be understood.
    """
    uri = join_uri(index, "CURRENT")
    try:
        data, version = storage.read_versioned(uri)
    except ObjectMissingError:
        return None
    try:
        return Pointer.from_json(data), version
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{uri} is not a pointer ({error}); roll back with --roll-back <generation>"
        ) from error


def read_manifest(index: str, pointer: Pointer, storage: Storage) -> Manifest:
    """Return the manifest that ``pointer`` names, its digest verified.

    Raises:
        CorruptionError: It is not the one that was published, or of a newer format.
    """
    uri = join_uri(index, manifest_path(pointer.generation))
    try:
        data = storage.read(uri)
    except ObjectMissingError as error:
        raise CorruptionError(
            f"{uri} is missing; roll back to another generation with --roll-back"
        ) from error
    if digest_bytes(data) != pointer.manifest_sha256:
        raise CorruptionError(
            f"{uri} is not what was published: its digest differs from CURRENT's; "
            "restore it, or roll back to another generation with --roll-back"
        )
    return parse_manifest(data, uri)


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """Read a manifest's bytes.

    Raises:
        CorruptionError: They cannot be understood, or are of a newer format.
    """
    try:
        found = json.loads(data).get("format")
        if found != FORMAT_VERSION:
            raise CorruptionError(
                f"{uri} has format {found!r}; this program reads {FORMAT_VERSION}; upgrade it"
            )
        return Manifest.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{uri} is not a manifest: {error}") from error


def read_current(index: str, storage: Storage) -> Manifest | None:
    """Return the generation that serves, or None where nothing is published yet.

    Raises:
        CorruptionError: The pointer or the manifest is damaged.
    """
    found = read_pointer(index, storage)
    return None if found is None else read_manifest(index, found[0], storage)
