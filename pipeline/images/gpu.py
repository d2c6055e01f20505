"""JPEGs to crops on a GPU, for machines whose cores cannot feed it.

torchvision decodes (nvJPEG) and PyTorch resizes; both round differently from Pillow, so
``decode="gpu"`` makes a space of its own. Whatever is not an ordinary JPEG, or does not decode,
goes to the host's decoder, which also says what is wrong with it.
"""

import importlib.metadata
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.errors import SettingsError
from pipeline.images.crops import CropMaker, data_config_of
from pipeline.images.decode import ImageHeader, ImageLimits, image_digest, read_header
from pipeline.images.host import Crop
from pipeline.images.resize import locate_crop
from pipeline.images.turns import TURNS
from pipeline.records import Embedding, Record, Space

_GROUP_IMAGES = 32
_MODES = ("RGB", "L")
_MAX_ASPECT_RATIO = 16


def find_gpu_decoder_version() -> str:
    """Return the version of the library that decodes on the GPU.

    Raises:
        SettingsError: It is not installed.
    """
    try:
        return importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError as error:
        raise SettingsError(
            "decode gpu needs torchvision; run: pip install 'image-embedding-pipeline"
            "[gpu-decode]', on every node, or use --decode exact"
        ) from error


class GpuCropMaker:
    """Decodes, turns, resizes and crops on a device.

    Args:
        space: Says the geometry.
        device: Torch device; the CPU works too, for tests.
        limits: Images beyond these are refused.
        host: Makes the crops that this cannot.
    """

    def __init__(self, space: Space, *, device: str, limits: ImageLimits, host: CropMaker) -> None:
        find_gpu_decoder_version()
        # it moves to another library; one filter, because catch_warnings is not thread-safe
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
        self._data_config = data_config_of(space)
        self._upright = space.exif == "apply"
        self._device = device
        self._limits = limits
        self._host = host

    def make(self, records: Sequence[Record]) -> Iterator[Crop | Embedding]:
        """Yield a crop for each record in order, or what became of it instead."""
        for start in range(0, len(records), _GROUP_IMAGES):
            group = records[start : start + _GROUP_IMAGES]
            headers = [self._find_jpeg(record) for record in group]
            fitting = [(r, h) for r, h in zip(group, headers, strict=True) if h is not None]
            made: Iterator[Crop | None] = iter(self._make_group(fitting))
            crops = [None if header is None else next(made) for header in headers]
            left = [r for r, crop in zip(group, crops, strict=True) if crop is None]
            by_host = self._host.make(left)
            yield from (next(by_host) if crop is None else crop for crop in crops)

    def close(self) -> None:
        """Let the host's threads end."""
        self._host.close()

    def _find_jpeg(self, record: Record) -> ImageHeader | None:
        header = read_header(record.data, limits=self._limits) if record.status == "ok" else None
        if header is None or header.format != "JPEG" or header.mode not in _MODES:
            return None
        if max(header.size) > _MAX_ASPECT_RATIO * min(header.size):
            return None  # the resized strip could fill the memory; the host makes the crop alone
        return header

    def _make_group(self, group: Sequence[tuple[Record, ImageHeader]]) -> list[Crop | None]:
        if not group:
            return []
        start_s = time.perf_counter()
        try:
            pictures = self._decode([record.data for record, _ in group])
        except RuntimeError:  # one of them is damaged, and the message does not say which
            if len(group) == 1:
                return [None]
            return [crop for item in group for crop in self._make_group([item])]
        decoded_s = time.perf_counter()
        crops = [
            self._cut(picture, header) for picture, (_, header) in zip(pictures, group, strict=True)
        ]
        pixels = torch.stack(crops).cpu().numpy()
        done_s = time.perf_counter()
        return [
            Crop(
                pixels[i],
                *header.size,
                digest=image_digest(record.data),
                decode_s=(decoded_s - start_s) / len(group),
                transform_s=(done_s - decoded_s) / len(group),
            )
            for i, (record, header) in enumerate(group)
        ]

    def _decode(self, images: Sequence[bytes | memoryview]) -> list[Tensor]:
        """Return RGB pictures, uint8 (3, H, W), on the device."""
        from torchvision.io import ImageReadMode, decode_jpeg  # an optional dependency

        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
        decoded: Any = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
        return list(decoded)

    def _cut(self, picture: Tensor, header: ImageHeader) -> Tensor:
        """Turn a picture, uint8 (3, H, W), upright, resize it and return its crop, (S, S, 3)."""
        turn = TURNS[header.orientation if self._upright else 1]
        picture = picture.transpose(1, 2) if turn.transposed else picture
        picture = picture.flip([2] * turn.mirrored + [1] * turn.flipped)
        size = (picture.shape[2], picture.shape[1])
        (width, height), (left, top, right, bottom) = locate_crop(size, self._data_config)
        resized = F.interpolate(
            picture[None].float(),
            size=(height, width),
            mode=self._data_config.interpolation,
            antialias=True,
        )[0, :, top:bottom, left:right]
        return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
