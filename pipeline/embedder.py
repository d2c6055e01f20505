"""Encoded images to embeddings on one device; knows nothing of Ray.

Decode threads turn records into 8-bit crops; the caller's thread gathers them into batches and
runs the backbone. Two callers may share an embedder: the crops of one chunk are made while the
other's are in the forward pass, which holds a lock.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones import create_backbone, load_weights, optimize_for_inference, weights_digest
from pipeline.decodepool import DecodePool
from pipeline.errors import CorruptionError, RecordError, SettingsError
from pipeline.images import DecodedImage, ImageLimits, decode_image, image_digest
from pipeline.records import Classes, Embedding, Record, Space
from pipeline.storage import Storage
from pipeline.transforms import DataConfig, normalise, resize_and_crop

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class EmbedderOptions:
    """How to embed; nothing here changes an embedding beyond float noise.

    Attributes:
        device: Torch device, e.g. ``"cuda"``.
        batch_size: Images in one forward pass.
        decode_threads: Threads that decode; 0 decodes in the caller's thread without time limit.
        torch_threads: Threads of a forward pass on the CPU; None leaves torch's setting alone.
        limits: Images beyond these are refused.
        image_timeout_s: Longest time one image may take to decode.
        top_k_classes: Classes to return for each image; 0 for none.
        embedding_dtype: Type the vectors will be stored in; one that does not fit into it is
            ``non_finite``.
    """

    device: str = "cpu"
    batch_size: int = 16
    decode_threads: int = 1
    torch_threads: int | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    image_timeout_s: float = 30.0
    top_k_classes: int = 0
    embedding_dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """The outcome of ``Embedder.embed``.

    Attributes:
        embeddings: One per record, in order.
        seconds: Time by stage: ``decode`` and ``transform`` are summed over the decode threads,
            ``forward`` and ``wait`` (for crops) are the caller's.
    """

    embeddings: list[Embedding]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Crop:
    """A decoded image, ready for the batch: uint8 (S, S, 3), RGB, height first."""

    pixels: NDArray[np.uint8]
    width: int
    height: int
    digest: bytes
    decode_s: float
    transform_s: float


def data_config_of(space: Space) -> DataConfig:
    """Return the preprocessing of a space."""
    return DataConfig(
        image_size=space.image_size,
        crop_pct=space.crop_pct,
        interpolation=space.interpolation,
        mean=space.mean,
        std=space.std,
    )


class Embedder:
    """Embeds encoded images into one space.

    Args:
        space: The space; its weights digest is checked.
        weights: Path or URI of the checkpoint.
        options: Device, batch size, limits.
        storage: How to reach ``weights``.

    Raises:
        CorruptionError: The weights are not those of the space.
        SettingsError: The device cannot compute in the space's precision.
    """

    def __init__(
        self,
        space: Space,
        *,
        weights: str,
        options: EmbedderOptions | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.space = space
        self.options = options or EmbedderOptions()
        self.batch_size = self.options.batch_size
        self.num_oom_halvings = 0
        if self.options.torch_threads is not None:
            torch.set_num_threads(self.options.torch_threads)
        self._data_config = data_config_of(space)
        self._backbone = self._build(weights, storage)
        self._pool = DecodePool(self.options.decode_threads, timeout_s=self.options.image_timeout_s)
        self._lock = threading.Lock()

    def embed_images(self, images: Sequence[bytes]) -> list[Embedding]:
        """Embed encoded images, e.g. of a query."""
        records = [Record(str(i), i, "", data, None) for i, data in enumerate(images)]
        return self.embed(records).embeddings

    def embed(self, records: Sequence[Record]) -> EmbeddedBatch:
        """Embed records; every one gets a status, whatever its bytes."""
        outcomes: list[Embedding | None] = [None] * len(records)
        seconds = {"decode": 0.0, "transform": 0.0, "forward": 0.0, "wait": 0.0}
        pending: list[tuple[int, _Crop]] = []
        crops = self._pool.map_images(records, self._prepare)
        for index, crop in enumerate(_time_waits(crops, seconds)):
            if isinstance(crop, RecordError):
                outcomes[index] = _describe_failure(records[index], crop)
                continue
            seconds["decode"] += crop.decode_s
            seconds["transform"] += crop.transform_s
            pending.append((index, crop))
            if len(pending) >= self.batch_size:
                self._finish(pending, outcomes, seconds)
                pending = []
        self._finish(pending, outcomes, seconds)
        return EmbeddedBatch([o for o in outcomes if o is not None], seconds)

    def close(self) -> None:
        """Let the decode threads end."""
        self._pool.close()

    def _build(self, weights: str, storage: Storage | None) -> torch.nn.Module:
        loaded = load_weights(self.space.backbone, weights, storage=storage)
        digest = weights_digest(loaded.state_dict)
        if digest != self.space.weights_sha256:
            raise CorruptionError(
                f"{weights} holds other weights (digest {digest[:16]}) than the space was made "
                f"with ({self.space.weights_sha256[:16]}); give the original checkpoint"
            )
        num_classes = None if self.options.top_k_classes else 0
        backbone = create_backbone(self.space.backbone, weights=loaded, num_classes=num_classes)
        optimized = optimize_for_inference(backbone)
        dtype = DTYPES[self.space.precision]
        if dtype == torch.float16 and self.options.device == "cpu":
            raise SettingsError("precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
        return optimized.to(device=self.options.device, dtype=dtype)

    def _prepare(self, record: Record) -> _Crop:
        if record.status != "ok":
            raise RecordError(record.status, record.error or "")
        start_s = time.perf_counter()
        decoded = self._decode(record.data)
        decoded_s = time.perf_counter()
        pixels = resize_and_crop(decoded.image, self._data_config)
        digest = image_digest(record.data)
        done_s = time.perf_counter()
        return _Crop(
            pixels,
            decoded.width,
            decoded.height,
            digest,
            decode_s=decoded_s - start_s,
            transform_s=done_s - decoded_s,
        )

    def _decode(self, data: bytes) -> DecodedImage:
        draft_size = None
        if self.space.decode == "fast":
            draft_size = 2 * self._data_config.resize_size
        exif: Any = self.space.exif
        return decode_image(data, limits=self.options.limits, exif=exif, draft_size=draft_size)

    def _finish(
        self,
        pending: Sequence[tuple[int, _Crop]],
        outcomes: list[Embedding | None],
        seconds: dict[str, float],
    ) -> None:
        if not pending:
            return
        start_s = time.perf_counter()
        vectors, classes = self._forward_halving(np.stack([crop.pixels for _, crop in pending]))
        seconds["forward"] += time.perf_counter() - start_s
        with np.errstate(over="ignore"):
            finite = np.isfinite(vectors.astype(self.options.embedding_dtype)).all(axis=1)
        for i, (index, crop) in enumerate(pending):
            outcome = Embedding(
                "ok",
                width=crop.width,
                height=crop.height,
                digest=crop.digest,
                vector=vectors[i],
                classes=None if classes is None else (classes[0][i], classes[1][i]),
            )
            if not finite[i]:
                reason = f"NaN or infinity in the {self.space.precision} forward pass"
                outcome = replace(
                    outcome, status="non_finite", error=reason, vector=None, classes=None
                )
            outcomes[index] = outcome

    def _forward_halving(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], Classes | None]:
        """Run the backbone; when memory runs out, halve the batch for good and go on."""
        try:
            with self._lock:
                return self._forward(pixels)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        half = (len(pixels) + 1) // 2
        self.batch_size = min(self.batch_size, half)
        self.num_oom_halvings += 1
        if self.options.device != "cpu":
            torch.cuda.empty_cache()
        parts = [self._forward_halving(pixels[:half]), self._forward_halving(pixels[half:])]
        vectors = np.concatenate([part[0] for part in parts])
        if parts[0][1] is None or parts[1][1] is None:
            return vectors, None
        (indices_a, probs_a), (indices_b, probs_b) = parts[0][1], parts[1][1]
        return vectors, (
            np.concatenate([indices_a, indices_b]),
            np.concatenate([probs_a, probs_b]),
        )

    @torch.inference_mode()
    def _forward(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Classes | None]:
        """Embed crops, uint8 (B, S, S, 3); float32 (B, D), and the classes if asked for."""
        batch = torch.from_numpy(pixels)
        if self.options.device != "cpu":
            batch = batch.pin_memory().to(self.options.device, non_blocking=True)
        images = normalise(batch, self._data_config).to(DTYPES[self.space.precision])
        features = self._backbone.forward_features(images)  # type: ignore[operator]
        head: Callable[..., torch.Tensor] = self._backbone.forward_head  # type: ignore[assignment]
        vectors = head(features, pre_logits=True).float().cpu().numpy()
        if not self.options.top_k_classes:
            return vectors, None
        top = head(features).float().softmax(dim=1).topk(self.options.top_k_classes, dim=1)
        return vectors, (top.indices.to(torch.int16).cpu().numpy(), top.values.cpu().numpy())


def _describe_failure(record: Record, error: RecordError) -> Embedding:
    digest = image_digest(record.data) if record.data else None
    return Embedding(error.status, error.reason, digest=digest)


def _time_waits(
    crops: Iterator[_Crop | RecordError], seconds: dict[str, float]
) -> Iterator[_Crop | RecordError]:
    """Pass ``crops`` on, adding the time spent waiting for each to ``seconds["wait"]``."""
    while True:
        start_s = time.perf_counter()
        crop = next(crops, None)
        seconds["wait"] += time.perf_counter() - start_s
        if crop is None:
            return
        yield crop
