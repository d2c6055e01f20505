"""``space.json``: the space, layout and weights of an output; its first run claims it."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from pipeline.errors import CorruptionError, ObjectMissingError, SpaceMismatchError
from pipeline.records import FORMAT_VERSION, Layout, Space, part_schema
from pipeline.storage import Storage, join_uri


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """What ``space.json`` records about an output.

    Attributes:
        space: The space of all its vectors.
        layout: Its rows and columns.
        carried: Arrow types of the carried columns, in the order of ``layout.carry``; ``null``
            for one that has held nothing but nulls so far, until a shard tells its type.
        weights: Path of the weights under the output; actors and lookups load them from there.
        weights_source: What was asked for when the output was made, e.g. ``"pretrained"``.
        weights_revision: Commit of the weights on the hub; None for other sources.
    """

    space: Space
    layout: Layout
    carried: pa.Schema
    weights: str
    weights_source: str
    weights_revision: str | None = None

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of every part."""
        return part_schema(self.space, self.layout, self.carried)

    def to_json(self) -> bytes:
        """Serialise for ``space.json``."""
        values = self.space.to_dict() | {
            "id": self.space.id,
            "format": FORMAT_VERSION,
            "layout": self.layout.to_dict(),
            "carried_schema": self.carried.serialize().to_pybytes().hex(),
            "weights": self.weights,
            "weights_source": self.weights_source,
            "weights_revision": self.weights_revision,
        }
        return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "OutputInfo":
        """Read ``to_json``."""
        values = json.loads(data)
        carried = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(values["carried_schema"])))
        layout = Layout.from_dict(values["layout"])
        return cls(
            Space.from_dict(values),
            layout,
            carried,
            values["weights"],
            values["weights_source"],
            values["weights_revision"],
        )


def read_output_info(output: str, storage: Storage) -> OutputInfo | None:
    """Return what ``space.json`` of ``output`` records, or None where there is no output yet.

    Raises:
        CorruptionError: ``space.json`` is there but cannot be understood.
    """
    uri = join_uri(output, "space.json")
    try:
        data = storage.read(uri)
    except ObjectMissingError:
        return None
    try:
        return OutputInfo.from_json(data)
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorruptionError(
            f"{uri} is not a space record ({error}); restore it, or write to another output"
        ) from error


def write_output_info(output: str, info: OutputInfo, storage: Storage) -> None:
    """Write ``space.json``; only the run that holds the output's lease may."""
    storage.put(join_uri(output, "space.json"), info.to_json())


def claim_output(output: str, info: OutputInfo, storage: Storage) -> OutputInfo:
    """Make ``output`` one of this space and layout, or check that it already is.

    Returns:
        What is recorded at the output.

    Raises:
        SpaceMismatchError: The output belongs to another space or layout; names the fields.
    """
    found = read_output_info(output, storage)
    if found is None:
        write_output_info(output, info, storage)
        return info
    wanted, recorded = _list_fields(info), _list_fields(found)
    differing = [name for name in wanted if wanted[name] != recorded.get(name)]
    if differing:
        details = "; ".join(
            f"{name} is {recorded.get(name)!r} there and {wanted[name]!r} here"
            for name in differing
        )
        raise SpaceMismatchError(
            f"{output!r} holds other embeddings: {details}; "
            "use the same settings, or another --output"
        )
    return found


def _list_fields(info: OutputInfo) -> dict[str, Any]:
    return info.space.to_dict() | info.layout.to_dict()
