"""The eight EXIF orientations."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Turn:
    """How a stored picture is turned upright: transposed first, then mirrored.

    Attributes:
        transposed: Rows become columns.
        mirrored: Left and right change places, after that.
        flipped: Top and bottom change places, after that.
        method: The same as one call of Pillow; None leaves a picture as it is.
    """

    transposed: bool
    mirrored: bool
    flipped: bool
    method: Image.Transpose | None

    def turn_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height after the turn."""
        return (size[1], size[0]) if self.transposed else size


TURNS = {
    1: Turn(False, False, False, None),
    2: Turn(False, True, False, Image.Transpose.FLIP_LEFT_RIGHT),
    3: Turn(False, True, True, Image.Transpose.ROTATE_180),
    4: Turn(False, False, True, Image.Transpose.FLIP_TOP_BOTTOM),
    5: Turn(True, False, False, Image.Transpose.TRANSPOSE),
    6: Turn(True, True, False, Image.Transpose.ROTATE_270),
    7: Turn(True, True, True, Image.Transpose.TRANSVERSE),
    8: Turn(True, False, True, Image.Transpose.ROTATE_90),
}
"""By the number that EXIF gives them."""


def measure(picture: Image.Image | Pixels) -> tuple[int, int]:
    """Return width and height of a picture, uint8 (H, W, 3) if it is an array."""
    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[1], picture.shape[0]


def make_upright(picture: Image.Image | Pixels, turn: int) -> Image.Image:
    """Return the picture turned by its EXIF orientation."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    method = TURNS[turn].method
    return image if method is None else image.transpose(method)
