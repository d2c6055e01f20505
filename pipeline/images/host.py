"""One encoded image to one crop on the host: what a decode process does, image by image.

Imports Pillow and NumPy, and neither torch nor pyarrow, so that such a process stays small.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.images.decode import Exif, ImageLimits, decode_image, image_digest
from pipeline.images.resize import DataConfig, resize_and_crop

DRAFT_FACTOR = 2
"""A fast recipe decodes JPEGs at no less than this many times the resized size."""


@dataclass(frozen=True, slots=True)
class CropRecipe:
    """All that decides how encoded bytes become a crop; can be pickled.

    Attributes:
        data_config: Sizes and filter.
        exif: Show pictures upright and over white, or exactly as they are stored.
        fast: Let the JPEG decoder scale down, which changes bits.
        limits: Images beyond these are refused.
    """

    data_config: DataConfig
    exif: Exif
    fast: bool
    limits: ImageLimits

    @property
    def draft_size(self) -> int | None:
        """Shortest side that a JPEG may be scaled down to, pixels; None for full scale."""
        return DRAFT_FACTOR * self.data_config.resize_size if self.fast else None


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


def make_crop(data: bytes | memoryview, recipe: CropRecipe) -> Crop:
    """Decode, resize and crop one encoded image.

    Raises:
        RecordError: It cannot or must not be decoded.
    """
    start_s = time.thread_time()
    decoded = decode_image(
        data, limits=recipe.limits, exif=recipe.exif, draft_size=recipe.draft_size
    )
    decoded_s = time.thread_time()
    pixels = resize_and_crop(
        decoded.picture,
        recipe.data_config,
        size=decoded.size,
        box=decoded.box,
        turn=decoded.turn,
    )
    digest = image_digest(data)
    return Crop(
        pixels,
        decoded.width,
        decoded.height,
        digest,
        decode_s=decoded_s - start_s,
        transform_s=time.thread_time() - decoded_s,
    )
