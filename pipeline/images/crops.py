"""Records to crops: the host's share of the work, in threads, with a time limit for each image."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pipeline.errors import RecordError
from pipeline.images.decode import ImageLimits, image_digest
from pipeline.images.host import Crop, CropRecipe, make_crop
from pipeline.images.pool import DecodePool
from pipeline.images.resize import DataConfig
from pipeline.records import Embedding, Record, Space


class CropMaker(Protocol):
    """Turns records into crops."""

    def make(self, records: Sequence[Record]) -> Iterator[Crop | Embedding]:
        """Yield a crop for each record in order, or what became of it instead."""
        ...

    def close(self) -> None:
        """Let its threads end."""
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
        space: Says the geometry, and how to decode.
        limits: Images beyond these are refused.
        threads: Number of threads; with 0 the caller's own decodes, without a time limit.
        timeout_s: Longest time one image may take.
    """

    def __init__(
        self, space: Space, *, limits: ImageLimits, threads: int, timeout_s: float
    ) -> None:
        self._recipe = recipe_of(space, limits)
        self._pool = DecodePool(threads, timeout_s=timeout_s)

    def make(self, records: Sequence[Record]) -> Iterator[Crop | Embedding]:
        """Yield a crop for each record in order, or what became of it instead."""
        outcomes = self._pool.map_images(records, self._make_crop)
        for record, outcome in zip(records, outcomes, strict=True):
            if isinstance(outcome, RecordError):
                yield describe_failure(record, outcome)
            else:
                yield outcome

    def close(self) -> None:
        """Let the threads end."""
        self._pool.close()

    def _make_crop(self, record: Record) -> Crop:
        if record.status != "ok":
            raise RecordError(record.status, record.error or "")
        return make_crop(record.data, self._recipe)


def describe_failure(record: Record, error: RecordError) -> Embedding:
    """Return the outcome of an image that cannot be embedded."""
    digest = image_digest(record.data) if record.data else None
    return Embedding(error.status, error.reason, digest=digest)
