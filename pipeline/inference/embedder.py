"""Encoded images to embeddings on one device; knows nothing of Ray.

Decode processes turn records into 8-bit crops, in memory that they share with this one; the
caller's thread hands whole batches of them to the engine, and collects the outcome of one while the
next is on its way. Two callers may share an embedder: one's crops are made while the other's are in
the forward pass.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones import create_backbone, load_weights, weights_digest
from pipeline.errors import CorruptionError, NothingThereError, describe_no_embeddings
from pipeline.images.batches import Batch, gather_batches
from pipeline.images.buffers import Pixels, SharedBuffers
from pipeline.images.crops import CropMaker, HostCropMaker, data_config_of, recipe_of
from pipeline.images.decode import ImageLimits
from pipeline.images.gpu import GpuCropMaker
from pipeline.images.host import Crop
from pipeline.inference.deviation import Deviation, check_deviation, measure_deviation
from pipeline.inference.engines import (
    Engine,
    EngineName,
    EngineOptions,
    Forwarded,
    build_engine,
    pin_memory,
)
from pipeline.log import LOG
from pipeline.output.info import read_output_info
from pipeline.records import Classes, Embedding, Record, Space
from pipeline.storage import Storage, join_uri, normalise_uri

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class EmbedderOptions:
    """How to embed; nothing here changes an embedding beyond float noise.

    Attributes:
        device: Torch device, e.g. ``"cuda"``.
        engine: What computes the forward pass.
        batch_size: Images in one forward pass.
        decode_processes: Processes that decode; with 0 the caller's thread does, without a time
            limit, and an image that crashes its decoder ends this process.
        torch_threads: Threads of a forward pass on the CPU; None leaves torch's setting alone.
        limits: Images beyond these are refused.
        image_timeout_s: Longest time one image may take to decode.
        top_k_classes: Classes to return for each image; 0 for none.
        embedding_dtype: Type the vectors will be stored in; one that does not fit into it is
            ``non_finite``.
        any_precision: On a CPU, compute in fp32 whatever the precision of the space, which suits
            queries: a CPU has no tf32 or fp16, and is slow in bf16.
    """

    device: str = "cpu"
    engine: EngineName = "torch"
    batch_size: int = 16
    decode_processes: int = 1
    torch_threads: int | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    image_timeout_s: float = 30.0
    top_k_classes: int = 0
    embedding_dtype: str = "float32"
    any_precision: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """The outcome of ``Embedder.embed``.

    Attributes:
        embeddings: One per record, in order.
        seconds: Time by stage: ``decode`` and ``transform`` are CPU time, summed over processes;
            ``transfer`` (on a GPU only) and ``forward`` are how long the device was busy;
            ``wait`` is how long the caller had nothing to hand to it.
    """

    embeddings: list[Embedding]
    seconds: dict[str, float]


def make_host_crop_maker(
    space: Space, options: EmbedderOptions, buffers: SharedBuffers
) -> HostCropMaker:
    """Return what decodes for a space on the CPU; Pillow stands in for a GPU's decoder."""
    return HostCropMaker(
        recipe_of(space, options.limits),
        buffers,
        processes=options.decode_processes,
        timeout_s=options.image_timeout_s,
    )


def make_crop_maker(space: Space, options: EmbedderOptions, buffers: SharedBuffers) -> CropMaker:
    """Return what decodes for a space on the device of the options."""
    host = make_host_crop_maker(space, options, buffers)
    if space.decode != "gpu" or options.device == "cpu":
        return host
    return GpuCropMaker(space, device=options.device, limits=options.limits, host=host)


def open_engine(
    space: Space, *, weights: str, options: EmbedderOptions, storage: Storage | None = None
) -> tuple[Engine, Deviation]:
    """Build the engine of a space from a checkpoint, and measure how exact it is.

    Args:
        space: The space; its weights digest is checked.
        weights: Path or URI of the checkpoint.
        options: Device, engine, batch size, threads.
        storage: How to reach ``weights``.

    Returns:
        The engine, and how far it is from plain float32 PyTorch.

    Raises:
        CorruptionError: The weights are not those of the space.
        SettingsError: The device or the engine cannot compute in the space's precision, or is
            further from plain float32 PyTorch than the precision explains.
    """
    loaded = load_weights(space.backbone, weights, storage=storage)
    digest = weights_digest(loaded.state_dict)
    if digest != space.weights_sha256:
        raise CorruptionError(
            f"{weights} holds other weights (digest {digest[:16]}) than the space was made "
            f"with ({space.weights_sha256[:16]}); give the original checkpoint"
        )
    num_classes = None if options.top_k_classes else 0
    backbone = create_backbone(space.backbone, weights=loaded, num_classes=num_classes)
    stand_in = options.any_precision and options.device == "cpu"
    engine_options = EngineOptions(
        name=options.engine,
        device=options.device,
        precision="fp32" if stand_in else space.precision,
        batch_size=options.batch_size,
        threads=options.torch_threads,
        logits=options.top_k_classes > 0,
    )
    engine = build_engine(backbone, data_config_of(space), engine_options)
    reference = space.precision if stand_in else "fp32"
    deviation = measure_deviation(engine, backbone, data_config_of(space), reference=reference)
    allowed = replace(engine_options, precision=space.precision)
    check_deviation(deviation, allowed, space.backbone)
    if stand_in and space.precision != "fp32":
        LOG.info(
            "embedding in fp32 for a space of %s: smallest cosine to it %.6f",
            space.precision,
            deviation.cosine,
        )
    return engine, deviation


class Embedder:
    """Embeds encoded images into one space; ``Embedder.load`` makes one from a checkpoint.

    Args:
        space: The space.
        engine: Computes the forward pass, in the space's precision.
        options: Device, batch size, limits; the batch size is also the engine's.
        deviation: How far the engine is from plain float32 PyTorch, where that was measured.

    Attributes:
        batch_size: Images in one forward pass; halved when memory ran out.
        num_oom_halvings: How often it was.
    """

    def __init__(
        self,
        space: Space,
        engine: Engine,
        *,
        options: EmbedderOptions | None = None,
        deviation: Deviation | None = None,
    ) -> None:
        self.space = space
        self.engine = engine
        self.options = options or EmbedderOptions()
        self.deviation = deviation
        self._lock = threading.Lock()
        self._buffers = SharedBuffers(
            self.options.batch_size,
            space.image_size,
            pin=partial(pin_memory, device=self.options.device),
        )
        self._crops = make_crop_maker(space, self.options, self._buffers)
        self.batch_size = engine.batch_size
        self.num_oom_halvings = 0

    @classmethod
    def load(
        cls,
        space: Space,
        *,
        weights: str,
        options: EmbedderOptions | None = None,
        storage: Storage | None = None,
    ) -> "Embedder":
        """Return an embedder with the engine that ``open_engine`` builds; same arguments."""
        options = options or EmbedderOptions()
        engine, deviation = open_engine(space, weights=weights, options=options, storage=storage)
        return cls(space, engine, options=options, deviation=deviation)

    @classmethod
    def open(
        cls, output: str, *, options: EmbedderOptions | None = None, storage: Storage | None = None
    ) -> "Embedder":
        """Return an embedder into the space of an output, with the weights that lie there.

        Args:
            output: What the embed job has written to.
            options: Device, engine, batch size, threads; by default on the CPU, which computes in
                fp32 whatever the precision of the space.
            storage: How to reach it; credentials from the environment otherwise.

        Raises:
            NothingThereError: There is no output.
        """
        storage = storage or Storage()
        uri = normalise_uri(output)
        info = read_output_info(uri, storage)
        if info is None:
            raise NothingThereError(describe_no_embeddings(output))
        options = options or EmbedderOptions(any_precision=True)
        weights = join_uri(uri, info.weights)
        return cls.load(info.space, weights=weights, options=options, storage=storage)

    def embed_images(self, images: Sequence[bytes]) -> list[Embedding]:
        """Embed encoded images, e.g. of a query."""
        records = [Record(str(i), i, "", data, None) for i, data in enumerate(images)]
        return self.embed(records).embeddings

    def embed(self, records: Sequence[Record]) -> EmbeddedBatch:
        """Embed records; every one gets a status, whatever its bytes.

        Raises:
            ShortageError: This machine has no memory or no process left to decode with.
        """
        return self._embed_batches(self._crops.make_batches(records, self._count_rows))

    def embed_crops(self, crops: Iterable[Crop | Embedding]) -> EmbeddedBatch:
        """Embed crops that were made before; what failed already is passed on in its place."""
        return self._embed_batches(gather_batches(crops, self._buffers, self._count_rows))

    def close(self) -> None:
        """Let the decode processes end."""
        self._crops.close()
        self._buffers.close()

    def _count_rows(self) -> int:
        return self.batch_size

    def _embed_batches(self, batches: Iterator[Batch]) -> EmbeddedBatch:
        outcomes: dict[int, Embedding] = {}
        seconds = {"decode": 0.0, "transform": 0.0, "forward": 0.0, "wait": 0.0}
        started: deque[_Started] = deque()
        for batch in _time_waits(batches, seconds):
            outcomes.update(batch.failed)
            for stage, spent_s in batch.seconds.items():
                seconds[stage] += spent_s
            try:
                started.append(self._start(batch))
            except BaseException:
                self._give_back(batch)
                raise
            while len(started) > self.engine.depth:
                self._collect(started.popleft(), outcomes, seconds)
        for unfinished in started:
            self._collect(unfinished, outcomes, seconds)
        return EmbeddedBatch([outcomes[index] for index in range(len(outcomes))], seconds)

    def _start(self, batch: Batch) -> "_Started":
        """Hand a batch to the engine; when memory runs out, go on with smaller ones for good."""
        started = _Started(batch)
        if not batch.members:
            return started
        if len(batch.members) <= self.batch_size:
            try:
                with self._lock:
                    started.wait = self.engine.submit(batch.pixels)
                return started
            except torch.OutOfMemoryError:
                self._shrink(len(batch.members))
        forwarded = self._forward_pieces(batch.pixels)
        started.wait = lambda: forwarded
        return started

    def _forward_pieces(self, pixels: Pixels) -> Forwarded:
        parts: list[Forwarded] = []
        start = 0
        while start < len(pixels):
            piece = pixels[start : start + self.batch_size]
            try:
                with self._lock:
                    parts.append(self.engine.submit(piece)())
                start += len(piece)
            except torch.OutOfMemoryError:
                self._shrink(len(piece))
        return Forwarded.join(parts)

    def _shrink(self, too_many: int) -> None:
        if too_many == 1:
            raise torch.OutOfMemoryError("one image does not fit the device's memory")
        with self._lock:
            self.batch_size = min(self.batch_size, (too_many + 1) // 2)
            self.num_oom_halvings += 1
            self.engine.shrink(self.batch_size)

    def _collect(
        self, started: "_Started", outcomes: dict[int, Embedding], seconds: dict[str, float]
    ) -> None:
        if started.wait is not None:
            forwarded = started.wait()
            seconds["forward"] += forwarded.seconds
            if forwarded.transfer_s:
                seconds["transfer"] = seconds.get("transfer", 0.0) + forwarded.transfer_s
            described = self._describe(started.batch, forwarded)
            for (index, _), outcome in zip(started.batch.members, described, strict=True):
                outcomes[index] = outcome
        self._give_back(started.batch)

    def _give_back(self, batch: Batch) -> None:
        if batch.buffer is not None:
            self._buffers.give_back(batch.buffer)

    def _describe(self, batch: Batch, forwarded: Forwarded) -> Iterator[Embedding]:
        classes = self._pick_classes(forwarded.logits)
        with np.errstate(over="ignore"):
            stored = forwarded.vectors.astype(self.options.embedding_dtype, copy=False)
        finite = np.isfinite(stored).all(axis=1)
        for i, (_, outcome) in enumerate(batch.members):
            if finite[i]:
                own = None if classes is None else (classes[0][i], classes[1][i])
                yield replace(outcome, vector=forwarded.vectors[i], classes=own)
            else:
                reason = f"NaN or infinity in the {self.space.precision} forward pass"
                yield replace(outcome, status="non_finite", error=reason)

    def _pick_classes(self, logits: NDArray[np.float32] | None) -> Classes | None:
        if logits is None:
            return None
        probabilities = torch.from_numpy(logits).softmax(dim=1)
        top = probabilities.topk(self.options.top_k_classes, dim=1)
        return top.indices.to(torch.int16).numpy(), top.values.numpy()


@dataclass(slots=True)
class _Started:
    """A batch that the engine has, and the call that waits for the outcome."""

    batch: Batch
    wait: Callable[[], Forwarded] | None = None


def _time_waits(items: Iterable[Item], seconds: dict[str, float]) -> Iterator[Item]:
    """Pass items on, adding the time spent waiting for each to ``seconds["wait"]``."""
    source = iter(items)
    while True:
        start_s = time.perf_counter()
        item = next(source, None)
        seconds["wait"] += time.perf_counter() - start_s
        if item is None:
            return
        yield item
