"""Records to crops: the host's share of the work, in threads, with a time limit for each image."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RecordError
from pipeline.images.decode import ImageLimits, decode_image, image_digest
from pipeline.images.pool import DecodePool
from pipeline.images.transforms import DataConfig, resize_and_crop
from pipeline.records import Embedding, Record, Space

DRAFT_FACTOR = 2
"""With ``decode="fast"`` JPEGs are decoded at no less than this many times the resized size."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A decoded image, ready for a batch.

    Attributes:
        pixels: uint8 (S, S, 3), RGB, height first.
        width: Width of the original image, pixels.
        height: Height of the original image, pixels.
        digest: First 16 bytes of the SHA-256 of the encoded image.
        decode_s: Time to decode it.
        transform_s: Time for the rest. Both are CPU time of its thread: on a crowded core the
            clock on the wall counts the waiting of one thread for another as well.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    digest: bytes
    decode_s: float = 0.0
    transform_s: float = 0.0


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
        self._data_config = data_config_of(space)
        self._exif: Any = space.exif
        fast = space.decode == "fast"
        self._draft_size = DRAFT_FACTOR * self._data_config.resize_size if fast else None
        self._limits = limits
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
        start_s = time.thread_time()
        decoded = decode_image(
            record.data, limits=self._limits, exif=self._exif, draft_size=self._draft_size
        )
        decoded_s = time.thread_time()
        pixels = resize_and_crop(
            decoded.image, self._data_config, size=decoded.size, box=decoded.box
        )
        digest = image_digest(record.data)
        return Crop(
            pixels,
            decoded.width,
            decoded.height,
            digest,
            decode_s=decoded_s - start_s,
            transform_s=time.thread_time() - decoded_s,
        )


def describe_failure(record: Record, error: RecordError) -> Embedding:
    """Return the outcome of an image that cannot be embedded."""
    digest = image_digest(record.data) if record.data else None
    return Embedding(error.status, error.reason, digest=digest)
