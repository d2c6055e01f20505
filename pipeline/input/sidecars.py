"""Sidecars of an archive, the texts beside its images, brought to the images they belong to.

A sample is what has one name up to the first dot, as in WebDataset. A sidecar belongs to the image
of its own longer name where there is one (``a.left.txt`` to ``a.left.jpg``), else to all images of
its sample. It may come before its image, however far, or after it while their sample goes on;
images are never held for one that may come later.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.carried import convert_column, to_values
from pipeline.input.container import FoundImage, ReadOptions, note_missing

_MAX_OTHERS = 100


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A member that goes with the images of its sample.

    Attributes:
        name: Its name in the archive.
        text: Its content.
    """

    name: str
    text: str


def find_column(name: str, carry: Sequence[str]) -> str | None:
    """Return the carried column that a member is a value of: by its extension, long or short."""
    extension = _split_name(name)[1]
    return next((c for c in carry if f".{extension}".endswith(f".{c.lower()}")), None)


def _split_name(name: str) -> tuple[str, str]:
    """Return the sample's name and the extension, which begins at the first dot."""
    folder, basename = posixpath.split(name)
    base, _, extension = basename.partition(".")
    return f"{folder}/{base}", extension.lower()


class SampleJoiner:
    """Gives images their sidecars, in one pass over the members of an archive."""

    def __init__(self, options: ReadOptions, notes: Counter[str]) -> None:
        self._options = options
        self._notes = notes
        self._base: str | None = None
        self._images: list[FoundImage] = []
        self._sidecars: dict[str, str] = {}  # of this sample, by extension
        self._unused: set[str] = set()
        self._waiting: dict[str, dict[str, str]] = {}  # for images that may come, by sample
        self._waiting_bytes = 0
        self._found: set[str] = set()
        self._others: set[str] = set()

    def add(self, member: FoundImage | Sidecar) -> Iterator[FoundImage]:
        """Take the next member; yield images that are complete, in their order."""
        if not self._options.carry and isinstance(member, FoundImage):
            yield member
            return
        base, extension = _split_name(member.name)
        if base != self._base:
            yield from self.end_sample()
            self._base = base
            self._sidecars = self._waiting.pop(base, {})
            self._waiting_bytes -= sum(map(len, self._sidecars.values()))
            self._unused = set(self._sidecars)
        if isinstance(member, Sidecar):
            self._sidecars[extension] = member.text
            self._unused.add(extension)
        else:
            self._images.append(member)
            yield from self._release_surplus()

    def pass_over(self, extension: str) -> None:
        """Remember what else is there, to suggest it for a name that is not."""
        if len(self._others) < _MAX_OTHERS:
            self._others.add(extension)

    def finish(self) -> Iterator[FoundImage]:
        """Yield the last images, and count the sidecars that had none and columns not found."""
        yield from self.end_sample()
        if self._waiting:
            self._notes["sidecars_without_image"] += sum(map(len, self._waiting.values()))
        missing = [name for name in self._options.carry if name not in self._found]
        note_missing(missing, known=self._others, notes=self._notes)

    def end_sample(self) -> Iterator[FoundImage]:
        """Yield the images of the sample so far, with the sidecars that it has."""
        yield from map(self._join, self._images)
        self._images = []
        unused = {extension: self._sidecars[extension] for extension in self._unused}
        if self._base is not None and unused:
            self._keep_waiting(self._base, unused)
        self._unused = set()

    def _release_surplus(self) -> Iterator[FoundImage]:
        images, options = self._images, self._options
        size_bytes = sum(len(image.data) for image in images)
        if len(images) > options.chunk_images or size_bytes > options.chunk_bytes:
            *surplus, last = images
            yield from map(self._join, surplus)
            self._images = [last]

    def _keep_waiting(self, base: str, sidecars: dict[str, str]) -> None:
        size_bytes = sum(map(len, sidecars.values()))
        if self._waiting_bytes + size_bytes <= self._options.chunk_bytes:
            self._waiting[base] = sidecars
            self._waiting_bytes += size_bytes
        else:
            self._notes["sidecars_without_image"] += len(sidecars)

    def _join(self, image: FoundImage) -> FoundImage:
        stem = _split_name(image.name)[1].rpartition(".")[0]
        carried: dict[str, Any] = {}
        for column in self._options.carry:
            own = f"{stem}.{column.lower()}" if stem else column.lower()
            extension = own if own in self._sidecars else column.lower()
            if extension in self._sidecars:
                self._unused.discard(extension)
                self._found.add(column)
                carried[column] = self._convert(column, self._sidecars[extension])
        return replace(image, carried=carried) if carried else image

    def _convert(self, column: str, text: str) -> Any:
        schema = self._options.carried
        kind = pa.string() if schema is None else schema.field(column).type
        return to_values(convert_column(column, pa.array([text]), kind))[0]
