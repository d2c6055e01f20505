"""The contenders of our own that do one thing alone: forward, arithmetic, host path, Pillow.

    python -m pipeline.benchmark.worker forward '{"model": …}'

Each serves rounds (see ``rounds.py``) on one core, or on the GPU.
"""

import fcntl
import io
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from pipeline.backbones import create_backbone, load_weights, weights_digest
from pipeline.benchmark.rounds import serve_rounds
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker, recipe_of
from pipeline.images.decode import ImageLimits
from pipeline.images.gpu import GpuCropMaker
from pipeline.images.host import CropRecipe, make_crop
from pipeline.images.resize import DataConfig
from pipeline.inference.deviation import draw_probes
from pipeline.inference.embedder import Embedder, EmbedderOptions
from pipeline.inference.engines import DTYPES, EngineOptions, Pixels, build_engine
from pipeline.input.container import ReadOptions
from pipeline.input.listing import list_sources, make_object_shard
from pipeline.input.reader import read_chunks
from pipeline.records import Record, Space
from pipeline.storage import Storage

Round = Callable[[], tuple[int, Mapping[str, float]]]


def make_forward_round(spec: Mapping[str, Any]) -> Round:
    """Return rounds of the forward pass alone, on crops that are in memory already."""
    options = EngineOptions(**spec["engine"])
    data_config = _read_data_config(spec)
    backbone = create_backbone(spec["model"], weights=spec["weights"], num_classes=0)
    engine = build_engine(backbone, data_config, options)
    pixels = engine.allocate()
    pixels[:] = np.resize(draw_probes(data_config.image_size), pixels.shape)
    batches = max(1, round(spec["images"] / options.batch_size))

    def run_round() -> tuple[int, Mapping[str, float]]:
        waiting: list[Any] = []
        for _ in range(batches):
            waiting.append(engine.submit(pixels))
            if len(waiting) > 1:
                waiting.pop(0)()
        waiting.pop()()
        return batches * options.batch_size, {}

    return run_round


def make_arithmetic_round(spec: Mapping[str, Any]) -> Round:
    """Return rounds of as many multiplications as forward passes take, in products of matrices.

    No forward pass can be faster than what the device reaches here.
    """
    options = EngineOptions(**spec["engine"])
    flops = count_flops(spec["model"], _read_data_config(spec).image_size)
    side = 2048 if options.on_cpu else 8192
    matrix = torch.ones(side, side, device=options.device, dtype=DTYPES[options.precision])
    products = math.ceil(spec["images"] * flops / (2 * side**3))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"

    def run_round() -> tuple[int, Mapping[str, float]]:
        for _ in range(products):
            product = torch.mm(matrix, matrix)
        product[0, 0].item()  # waits for the device
        return round(products * 2 * side**3 / flops), {}

    return run_round


def count_flops(model: str, image_size: int) -> int:
    """Return the floating-point operations of one image's embedding, additions included."""
    backbone = create_backbone(model, weights=None, num_classes=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


def make_host_round(spec: Mapping[str, Any]) -> Round:
    """Return rounds of everything but the forward pass: read, decode, digest, resize, crop."""
    storage, data_config = Storage(), _read_data_config(spec)
    fast = spec["decode"] == "fast"
    recipe = CropRecipe(data_config, exif=spec["exif"], fast=fast, limits=ImageLimits())
    listing = list_sources([spec["shards"]], "tar", storage)
    shards = [make_object_shard(source, chunking=()) for source in listing.sources]
    batch = np.zeros((16, data_config.image_size, data_config.image_size, 3), np.uint8)

    def run_round() -> tuple[int, Mapping[str, float]]:
        seconds = dict.fromkeys(("read", "decode", "transform"), 0.0)
        images, start_s = 0, time.thread_time()
        for shard in shards:
            for chunk in read_chunks(shard, storage=storage, options=ReadOptions()):
                for record in chunk.records:
                    crop = make_crop(record.data, recipe)
                    batch[images % len(batch)] = crop.pixels
                    seconds["decode"] += crop.decode_s
                    seconds["transform"] += crop.transform_s
                    images += 1
        seconds["read"] = time.thread_time() - start_s - sum(seconds.values())
        return images, seconds

    return run_round


def make_embed_round(spec: Mapping[str, Any]) -> Round:
    """Return rounds of a whole embedder, from encoded images in memory to embeddings.

    Two threads share it, as two loads share an actor; the CPU time is that of this process, its
    decode processes apart.
    """
    engine = spec["engine"]
    space = _describe_space(spec)
    options = EmbedderOptions(
        device=engine["device"],
        engine=engine["name"],
        batch_size=engine["batch_size"],
        decode_processes=spec.get("cores", 1),
    )
    embedder = Embedder.load(space, weights=spec["weights"], options=options)
    records = _read_records(spec)
    halves = [records[: len(records) // 2], records[len(records) // 2 :]]
    threads = ThreadPoolExecutor(len(halves))

    def run_round() -> tuple[int, Mapping[str, float]]:
        for batch in threads.map(embedder.embed, halves):
            assert all(embedding.status == "ok" for embedding in batch.embeddings)
        return len(records), {}

    return run_round


def make_gpu_crops_round(spec: Mapping[str, Any]) -> Round:
    """Return rounds of decoding, resizing and cropping on the GPU."""
    engine, space = spec["engine"], _describe_space(spec)
    limits, size = ImageLimits(), engine["batch_size"]
    host = HostCropMaker(
        recipe_of(space, limits), SharedBuffers(size, space.image_size), processes=1, timeout_s=30
    )
    maker = GpuCropMaker(space, device=engine["device"], limits=limits, host=host)
    records = _read_records(spec)

    def run_round() -> tuple[int, Mapping[str, float]]:
        made = 0
        for batch in maker.make_batches(records, lambda: size):
            made += len(batch.members)
        batch.pixels[-1:].cpu()  # waits for the GPU
        return made, {}

    return run_round


def _describe_space(spec: Mapping[str, Any]) -> Space:
    digest = weights_digest(load_weights(spec["model"], spec["weights"]).state_dict)
    return Space(
        backbone=spec["model"],
        weights_sha256=digest,
        **spec["data_config"],
        exif=spec["exif"],
        decode=spec["decode"],
        precision=spec["engine"]["precision"],
        dim=0,
    )


def _read_records(spec: Mapping[str, Any]) -> list[Record]:
    """Return as many records as there shall be images in a round, again from the first."""
    encoded = [path.read_bytes() for path in sorted(Path(spec["files"]).iterdir())]
    endless = itertools.islice(itertools.cycle(encoded), spec["images"])
    return [Record(str(i), i, "", data, None) for i, data in enumerate(endless)]


def make_pillow_round(spec: Mapping[str, Any]) -> Round:
    """Return rounds of the shortest loop over Pillow that gives the same crops, from memory."""
    data_config = _read_data_config(spec)
    paths = sorted(Path(spec["files"]).iterdir())
    encoded = [path.read_bytes() for path in paths]

    def run_round() -> tuple[int, Mapping[str, float]]:
        for data in encoded:
            loop_over_pillow(data, data_config)
        return len(encoded), {}

    return run_round


def loop_over_pillow(data: bytes, data_config: DataConfig) -> Pixels:
    """Turn one encoded image into its crop, uint8 (S, S, 3), with Pillow and nothing else."""
    side, short = data_config.image_size, data_config.resize_size
    image = Image.open(io.BytesIO(data)).convert("RGB")
    shortest = min(image.size)
    size = (short * image.width // shortest, short * image.height // shortest)
    image = image.resize(size, Image.Resampling[data_config.interpolation.upper()])
    left, top = (round((length - side) / 2) for length in size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _read_data_config(spec: Mapping[str, Any]) -> DataConfig:
    return DataConfig(**spec["data_config"])


_MAKERS = {
    "forward": make_forward_round,
    "arithmetic": make_arithmetic_round,
    "host": make_host_round,
    "pillow": make_pillow_round,
    "embed": make_embed_round,
    "gpu-crops": make_gpu_crops_round,
}


def main() -> None:
    """Serve rounds of the kind and the specification on the command line."""
    kind, spec = sys.argv[1], json.loads(sys.argv[2])
    with _have_the_gpu(spec):
        run_round = _MAKERS[kind](spec)
    serve_rounds(run_round)


@contextmanager
def _have_the_gpu(spec: Mapping[str, Any]) -> Iterator[None]:
    """Keep other contenders off the GPU while PyTorch times kernels to choose among them.

    What is compiled only needs the CPU for most of that time, and would keep all others waiting.
    """
    engine = spec.get("engine", {})
    with (Path(tempfile.gettempdir()) / "image-embedding-benchmark.lock").open("w") as file:
        if engine.get("device") == "cuda" and engine["name"] == "torch":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
