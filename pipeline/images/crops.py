"""Records to crops: the host's share of the work, in processes or in the caller's thread."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from pipeline.errors import RecordError
from pipeline.images.batches import (
    Batch,
    describe_failure,
    fill_batches,
    gather_batches,
    pass_on,
)
from pipeline.images.buffers import SharedBuffers
from pipeline.images.decode import ImageLimits
from pipeline.images.decoder import Setup
from pipeline.images.host import Crop, CropRecipe, make_crop
from pipeline.images.pool import DecodePool
from pipeline.images.resize import DataConfig
from pipeline.records import Embedding, Record, Space


class CropMaker(Protocol):
    """Turns records into batches of crops."""

    def make_batches(
        self, records: Sequence[Record], batch_size: Callable[[], int]
    ) -> Iterator[Batch]:
        """Yield batches of crops as they get ready, in whatever order; in the end, of all records.

        Whoever takes a batch gives its buffer back.

        Args:
            records: The images.
            batch_size: Says how many crops a batch should have, at most as many as buffers hold.

        Raises:
            ShortageError: This machine has no memory or no process left to decode with.
        """
        ...

    def close(self) -> None:
        """Let its threads and processes end."""
        ...


def data_config_of(space: Space) -> DataConfig:
    """Return the preprocessing of a space."""
    return DataConfig(
        image_size=space.image_size,
        crop_pct=space.crop_pct,
        interpolation=space.interpolation,
        mean=space.mean,
        std=space.std,
    )


def recipe_of(space: Space, limits: ImageLimits) -> CropRecipe:
    """Return how the host makes the crops of a space."""
    exif: Any = space.exif
    return CropRecipe(data_config_of(space), exif, space.decode == "fast", limits)


class HostCropMaker:
    """Decodes with Pillow on the CPU.

    Args:
        recipe: How encoded bytes become a crop.
        buffers: Where batches lie.
        processes: Number of decode processes; with 0, and elsewhere than on Linux, the caller's own
            thread decodes, and nothing protects it from images that hang or crash their decoder.
        timeout_s: Longest time one image may take.
    """

    def __init__(
        self, recipe: CropRecipe, buffers: SharedBuffers, *, processes: int, timeout_s: float
    ) -> None:
        self._recipe = recipe
        self._buffers = buffers
        setup = Setup(recipe, timeout_s, buffers.batch_size)
        in_processes = processes > 0 and sys.platform == "linux"
        self._pool = DecodePool(setup, buffers, processes=processes) if in_processes else None

    def make(self, records: Sequence[Record]) -> Iterator[Crop | Embedding]:
        """Yield a crop for each record in order, or what became of it instead."""
        if self._pool is None:
            return map(self._make_here, records)
        made: list[Crop | Embedding | None] = [None] * len(records)
        for batch in self.make_batches(records, lambda: self._buffers.batch_size):
            for crop, (index, _) in zip(_copy_crops(batch), batch.members, strict=True):
                made[index] = crop
            for index, known in batch.failed:
                made[index] = known
            if batch.buffer is not None:
                self._buffers.give_back(batch.buffer)
        return (item for item in made if item is not None)

    def make_batches(
        self, records: Sequence[Record], batch_size: Callable[[], int]
    ) -> Iterator[Batch]:
        """See ``CropMaker``; the processes begin when the first batch is asked for."""
        with self.start_batches(records, batch_size) as batches:
            yield from batches

    def start_batches(
        self, records: Sequence[Record], batch_size: Callable[[], int]
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Let the processes begin at once; inside the context are the batches that follow."""
        if self._pool is None:
            batches = gather_batches(self.make(records), self._buffers, batch_size)
            return nullcontext(batches)
        return fill_batches(self._pool, self._buffers, records, batch_size)

    def close(self) -> None:
        """Let the processes end."""
        if self._pool is not None:
            self._pool.close()

    def _make_here(self, record: Record) -> Crop | Embedding:
        if record.status != "ok":
            return pass_on(record)
        try:
            return make_crop(record.data, self._recipe)
        except RecordError as error:
            return describe_failure(record, error)


def _copy_crops(batch: Batch) -> Iterator[Crop]:
    """Yield the crops of a batch as arrays of their own, the CPU time shared among them."""
    shares = {
        stage: seconds / max(1, len(batch.members)) for stage, seconds in batch.seconds.items()
    }
    for pixels, (_, known) in zip(np.array(batch.pixels), batch.members, strict=True):
        yield Crop(
            pixels,
            known.width or 0,
            known.height or 0,
            known.digest or b"",
            decode_s=shares["decode"],
            transform_s=shares["transform"],
        )
