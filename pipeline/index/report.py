"""The report of an index job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.index.manifest import Manifest
from pipeline.records import describe_job


@dataclass(frozen=True, slots=True)
class IndexReport:
    """The report of an index job.

    Attributes:
        action: ``"built"``, ``"added"``, ``"unchanged"``, ``"mended"`` (an older whole generation
            serves instead of a damaged one), ``"pinned"`` (a roll-back holds, nothing was done),
            ``"unpinned"``, ``"planned"``, ``"verified"``, ``"rolled back"``, ``"exported"``,
            ``"garbage listed"`` or ``"garbage deleted"``.
        index: URI of the index.
        generation: The generation that serves now; None if there is none.
        rows: Its live rows.
        kind: Its kind.
        reason: Why that kind, in one line.
        details: What else there is to know; depends on the action.
    """

    action: str
    index: str
    generation: str | None
    rows: int
    kind: str | None
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = describe_job("index") | asdict(self)
        return values | dict(values.pop("details"))


def make_report(
    action: str, index: str, *, manifest: Manifest | None, details: Mapping[str, Any]
) -> IndexReport:
    """Return a report about a generation, or about an index that has none."""
    if manifest is None:
        return IndexReport(action, index, None, 0, None, "", details)
    kind, rows = manifest.codec.kind, manifest.rows
    return IndexReport(action, index, manifest.generation, rows, kind, manifest.reason, details)
