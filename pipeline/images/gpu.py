"""JPEGs to crops on a GPU, for machines whose cores cannot feed it.

torchvision decodes (nvJPEG), which rounds differently from Pillow, so ``decode="gpu"`` makes a
space of its own; ``ragged.py`` resizes, with Pillow's arithmetic. The crops stay on the GPU.
Whatever is not an ordinary JPEG goes to the host's decode processes, which work meanwhile; what
does not decode follows, and they say what is wrong with it.
"""

import importlib.metadata
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import SettingsError
from pipeline.images.batches import Batch
from pipeline.images.crops import HostCropMaker, data_config_of
from pipeline.images.decode import ImageHeader, ImageLimits, image_digest, read_header
from pipeline.images.ragged import StoredPicture, resize_and_crop_batch
from pipeline.records import Embedding, Record, Space

_GROUP_PIXELS = 1 << 26  # decoded together; bounds the GPU's memory
_MODES = ("RGB", "L")
_END, _END_WITHIN = b"\xff\xd9", 4096  # of a JPEG that is whole; some bytes may follow
_DECODING = threading.Lock()  # two threads at once crash torchvision's decoder


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

    def __init__(
        self, space: Space, *, device: str, limits: ImageLimits, host: HostCropMaker
    ) -> None:
        find_gpu_decoder_version()
        # it moves to another library; one filter, because catch_warnings is not thread-safe
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
        self._data_config = data_config_of(space)
        self._upright = space.exif == "apply"
        self._device = device
        self._limits = limits
        self._host = host

    def make_batches(
        self, records: Sequence[Record], batch_size: Callable[[], int]
    ) -> Iterator[Batch]:
        """See ``CropMaker``; the batches of the GPU come first."""
        headers = [self._find_jpeg(record) for record in records]
        own = [i for i, header in enumerate(headers) if header is not None]
        others = [i for i, header in enumerate(headers) if header is None]
        failed: list[int] = []
        with self._host.start_batches([records[i] for i in others], batch_size) as aside:
            while own:
                members, own = own[: batch_size()], own[batch_size() :]
                items = [(records[i], h) for i in members if (h := headers[i]) is not None]
                batch = self._make_batch(dict(zip(members, items, strict=True)))
                failed += set(members).difference(index for index, _ in batch.members)
                if batch.members:
                    yield batch
            yield from (_renumber(batch, others) for batch in aside)
        for batch in self._host.make_batches([records[i] for i in failed], batch_size):
            yield _renumber(batch, failed)

    def close(self) -> None:
        """Let the host's processes end."""
        self._host.close()

    def _find_jpeg(self, record: Record) -> ImageHeader | None:
        if record.status != "ok" or _END not in bytes(record.data[-_END_WITHIN:]):
            return None  # a GPU's decoder may fill up what was cut off, without a word
        header = read_header(record.data, limits=self._limits)
        return header if header and header.format == "JPEG" and header.mode in _MODES else None

    def _make_batch(self, items: dict[int, tuple[Record, ImageHeader]]) -> Batch:
        """Make the crops of a batch; those that do not decode are not among its members."""
        batch, crops = Batch(None), []
        for group in _group_by_pixels(items):
            start_s = time.thread_time()
            pictures = self._decode([items[index][0].data for index in group])
            decoded_s = time.thread_time()
            found = {i: p for i, p in zip(group, pictures, strict=True) if p is not None}
            try:
                if found:
                    crops.append(self._cut(list(found.values()), [items[i][1] for i in found]))
            except torch.OutOfMemoryError:
                found = {}  # the host makes these crops
            for index in found:
                record, header = items[index]
                known = Embedding("ok", None, *header.size, image_digest(record.data))
                batch.members.append((index, known))
            batch.seconds["decode"] += decoded_s - start_s
            batch.seconds["transform"] += time.thread_time() - decoded_s
        batch.on_gpu = torch.cat(crops) if crops else None
        return batch

    def _decode(self, images: Sequence[bytes | memoryview]) -> list[Tensor | None]:
        """Return RGB pictures, uint8 (3, H, W), on the device; None of what does not decode."""
        from torchvision.io import ImageReadMode, decode_jpeg  # an optional dependency

        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
        try:
            with _DECODING:
                decoded: Any = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
            return list(decoded)
        except RuntimeError:  # one of them is damaged, and the message does not say which
            if len(images) == 1:
                return [None]
        half = len(images) // 2
        return self._decode(images[:half]) + self._decode(images[half:])

    def _cut(self, pictures: Sequence[Tensor], headers: Sequence[ImageHeader]) -> Tensor:
        """Turn pictures, uint8 (3, H, W), upright, resize them and return crops (B, S, S, 3)."""
        stored, offset = [], 0
        for picture, header in zip(pictures, headers, strict=True):
            height, width = picture.shape[1:]
            turn = header.orientation if self._upright else 1
            stored.append(StoredPicture(offset, width, height, turn, planar=True))
            offset += picture.numel()
        samples = torch.cat([picture.reshape(-1) for picture in pictures])
        return resize_and_crop_batch(samples, stored, self._data_config)


def _group_by_pixels(items: dict[int, tuple[Record, ImageHeader]]) -> Iterator[list[int]]:
    group: list[int] = []
    pixels = 0
    for index, (_, header) in items.items():
        own = header.size[0] * header.size[1]
        if group and pixels + own > _GROUP_PIXELS:
            yield group
            group, pixels = [], 0
        group.append(index)
        pixels += own
    if group:
        yield group


def _renumber(batch: Batch, indices: Sequence[int]) -> Batch:
    """Let a batch of some records say which of all they are."""
    batch.members = [(indices[i], known) for i, known in batch.members]
    batch.failed = [(indices[i], known) for i, known in batch.failed]
    return batch
