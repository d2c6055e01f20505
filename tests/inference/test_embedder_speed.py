"""What makes embedding fast must not change it: batches, drafts, GPU decoding, travelling crops."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encode, make_jpeg, make_picture
from PIL import Image

from pipeline.backbones import load_weights, save_weights, weights_digest
from pipeline.config import EmbedConfig
from pipeline.embed_job.actors import make_flow_settings
from pipeline.embed_job.crop_table import pack_crops, unpack_crops
from pipeline.embed_job.prepare import describe_output
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.wire import FailedShard, Load
from pipeline.errors import SettingsError
from pipeline.images.buffers import SharedBuffers
from pipeline.images.crops import HostCropMaker, recipe_of
from pipeline.images.decode import ImageLimits
from pipeline.images.gpu import GpuCropMaker, find_gpu_decoder_version
from pipeline.images.host import Crop
from pipeline.inference.deviation import LARGEST_DEVIATION
from pipeline.inference.embedder import (
    Embedder,
    EmbedderOptions,
    make_host_crop_maker,
    open_engine,
)
from pipeline.inference.engines import Engine, Forwarded, Pixels, warm_up
from pipeline.log import LOG
from pipeline.records import Chunk, Embedding, Record, Shard, Space
from pipeline.storage import Storage

MODEL = "ese_vovnet19b_dw.ra_in1k"
LIMITS = ImageLimits(max_pixels=4_000_000)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(load_weights(MODEL, "random:0").state_dict, str(path))
    return path


@pytest.fixture(scope="module")
def space(weights: Path) -> Space:
    return Space(
        backbone=MODEL,
        weights_sha256=weights_digest(load_weights(MODEL, str(weights)).state_dict),
        image_size=64,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        exif="apply",
        decode="exact",
        precision="fp32",
        dim=1024,
    )


@pytest.fixture(scope="module")
def embedder(space: Space, weights: Path) -> Iterator[Embedder]:
    options = EmbedderOptions(batch_size=4, torch_threads=1, limits=LIMITS)
    made = Embedder.load(space, weights=str(weights), options=options)
    yield made
    made.close()


def make_records(images: list[bytes]) -> list[Record]:
    return [Record(f"k{i}", i, "s.tar", data, None) for i, data in enumerate(images)]


def make_host(space: Space) -> HostCropMaker:
    buffers = SharedBuffers(4, space.image_size)
    return HostCropMaker(recipe_of(space, LIMITS), buffers, processes=0, timeout_s=30.0)


def stack(embeddings: list[Embedding]) -> np.ndarray:
    return np.stack([e.vector for e in embeddings if e.vector is not None])


class SmallMemory:
    """An engine on a device that holds ``fits`` images."""

    def __init__(self, engine: Engine, fits: int) -> None:
        self.batch_size, self.depth, self.fits = engine.batch_size, 1, fits
        self._engine = engine
        self.sizes: list[int] = []

    def allocate(self) -> Pixels:
        return self._engine.allocate()[: self.batch_size]

    def submit(self, pixels: Pixels) -> Callable[[], Forwarded]:
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(pixels))
        return self._engine.submit(pixels)

    def shrink(self, batch_size: int) -> None:
        self.batch_size = batch_size


def test_when_memory_runs_out_batches_shrink_for_good_and_no_image_is_lost(
    space: Space, weights: Path, embedder: Embedder
):
    options = EmbedderOptions(batch_size=8, torch_threads=1)
    engine = SmallMemory(open_engine(space, weights=str(weights), options=options)[0], fits=3)
    small = Embedder(space, engine, options=options)
    records = make_records([make_jpeg(seed) for seed in range(19)])
    found = small.embed(records).embeddings
    assert small.batch_size == 2
    assert small.num_oom_halvings == 2
    assert engine.batch_size == 2
    assert max(engine.sizes) == 2
    np.testing.assert_allclose(
        stack(found), stack(embedder.embed(records).embeddings), rtol=1e-3, atol=1e-4
    )
    small.close()


def test_a_device_too_small_for_the_first_batch_starts_with_a_smaller_one(embedder: Embedder):
    engine = SmallMemory(embedder.engine, fits=3)
    warm_up(engine)
    assert engine.sizes == [engine.batch_size] == [2]
    with pytest.raises(torch.OutOfMemoryError):
        warm_up(SmallMemory(embedder.engine, fits=0))


def test_one_image_that_does_not_fit_ends_the_run(space: Space, weights: Path):
    options = EmbedderOptions()
    engine, _ = open_engine(space, weights=str(weights), options=options)
    small = Embedder(space, SmallMemory(engine, fits=0), options=options)
    with pytest.raises(torch.OutOfMemoryError, match="one image does not fit"):
        small.embed_images([make_jpeg()])
    small.close()


def test_two_callers_that_share_an_embedder_get_their_own_embeddings(embedder: Embedder):
    batches = [make_records([make_jpeg(seed) for seed in range(n, n + 10)]) for n in (0, 100)]
    expected = [stack(embedder.embed(batch).embeddings) for batch in batches]
    start = threading.Barrier(2)

    def embed(batch: list[Record]) -> np.ndarray:
        start.wait()
        return stack(embedder.embed(batch).embeddings)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(embed, batches))
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4)


def test_an_embedder_knows_how_far_its_engine_is_from_plain_float32(embedder: Embedder):
    assert embedder.deviation.largest < 1e-4
    assert embedder.deviation.cosine > 0.99999


def test_an_engine_that_computes_something_else_is_refused_when_it_is_built(
    space: Space, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(LARGEST_DEVIATION, "fp32", 0.0)
    with pytest.raises(SettingsError, match="engine torch in fp32 is off by"):
        Embedder.load(space, weights=str(weights))


def test_stages_are_timed(embedder: Embedder):
    seconds = embedder.embed(make_records([make_jpeg(seed) for seed in range(5)])).seconds
    assert set(seconds) == {"decode", "transform", "forward", "wait"}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("size", [(1200, 900), (901, 1300), (640, 480)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_decoding_keeps_the_geometry_of_the_original(
    space: Space, size: tuple[int, int], orientation: int
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    record = make_records([encode(make_picture(1, size), quality=95, exif=exif.tobytes())])[0]
    exact, fast = (
        next(make_host(replace(space, decode=decode)).make([record]))
        for decode in ("exact", "fast")
    )
    assert (fast.width, fast.height) == (exact.width, exact.height) == size
    difference = fast.pixels.astype(float) - exact.pixels
    assert 10 * np.log10(255**2 / max(1e-9, (difference**2).mean())) > 40


def test_fast_decoding_leaves_small_pictures_as_they_are(space: Space):
    record = make_records([make_jpeg(1, (200, 150))])[0]
    exact, fast = (
        next(make_host(replace(space, decode=decode)).make([record]))
        for decode in ("exact", "fast")
    )
    np.testing.assert_array_equal(fast.pixels, exact.pixels)


@pytest.fixture
def gpu_crops(space: Space) -> GpuCropMaker:
    """The GPU's crop maker, on the CPU: the same calls, another decoder behind them."""
    pytest.importorskip("torchvision")
    return GpuCropMaker(space, device="cpu", limits=LIMITS, host=make_host(space))


def gather(crops: GpuCropMaker, records: list[Record]) -> dict[int, tuple[Any, Embedding]]:
    """Return crop and outcome of each record by its index; crops of those that failed are None."""
    found: dict[int, tuple[Any, Embedding]] = {}
    for batch in crops.make_batches(records, lambda: 3):
        assert len(batch.members) <= 3
        for pixels, (index, known) in zip(batch.pixels, batch.members, strict=True):
            found[index] = np.asarray(pixels).copy(), known
        found |= {index: (None, known) for index, known in batch.failed}
    return found


def test_gpu_crops_have_the_bits_of_the_host_s(gpu_crops: GpuCropMaker, space: Space):
    images = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        images.append(encode(make_picture(orientation, (160, 120)), exif=exif.tobytes()))
    images.append(encode(make_picture(9).convert("L")))
    records = make_records(images)
    ours = gather(gpu_crops, records)
    for index, host in enumerate(make_host(space).make(records)):
        pixels, known = ours[index]
        assert (known.width, known.height, known.digest) == (host.width, host.height, host.digest)
        np.testing.assert_array_equal(pixels, host.pixels)


def test_gpu_crops_give_the_embeddings_of_equal_crops(
    space: Space, weights: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("torchvision")

    def make(space: Space, options: EmbedderOptions, buffers: SharedBuffers) -> GpuCropMaker:
        host = make_host_crop_maker(space, options, buffers)
        return GpuCropMaker(space, device="cpu", limits=LIMITS, host=host)

    monkeypatch.setattr("pipeline.inference.embedder.make_crop_maker", make)
    records = make_records(
        [*(make_jpeg(seed, (200, 150)) for seed in range(6)), encode(make_picture(7), "PNG"), b""]
    )
    other = Embedder.load(space, weights=str(weights), options=EmbedderOptions(batch_size=4))
    ours, exact = other.embed(records).embeddings, embedder.embed(records).embeddings
    other.close()
    assert [one.status for one in ours] == [one.status for one in exact]
    np.testing.assert_allclose(stack(ours[:7]), stack(exact[:7]), rtol=1e-4, atol=1e-5)


def test_what_a_gpu_cannot_decode_goes_to_the_host_in_its_place(
    gpu_crops: GpuCropMaker, space: Space
):
    jpeg = make_jpeg(1, (200, 150))
    broken = replace(make_records([b""])[0], status="truncated", error="cut off")
    images = [
        *(jpeg, encode(make_picture(2), "PNG"), jpeg[: len(jpeg) // 2], b"<html>", b""),
        *(encode(make_picture(3).convert("CMYK")), make_jpeg(4, (2000, 40)), make_jpeg(5)),
        make_jpeg(6, (3000, 2000)),
    ]
    records = [*make_records(images), broken]
    found = gather(gpu_crops, records)
    assert sorted(found) == list(range(len(records)))
    for index, host in enumerate(make_host(space).make(records)):
        pixels, known = found[index]
        if isinstance(host, Crop):
            np.testing.assert_array_equal(pixels, host.pixels)
        else:
            assert (known.status, known.error) == (host.status, host.error)


def test_a_jpeg_that_was_cut_off_is_truncated_even_if_the_gpu_decodes_it(
    gpu_crops: GpuCropMaker, monkeypatch: pytest.MonkeyPatch
):
    def decode(images: list[torch.Tensor], **_: object) -> list[torch.Tensor]:
        return [torch.zeros(3, 150, 200, dtype=torch.uint8) for _ in images]

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    jpeg = make_jpeg(1, (200, 150))
    found = gather(gpu_crops, make_records([jpeg, jpeg[: len(jpeg) // 2], jpeg[:-2]]))
    assert [found[i][1].status for i in range(3)] == ["ok", "truncated", "truncated"]


def test_crops_that_do_not_fit_the_gpu_are_made_by_the_host(
    gpu_crops: GpuCropMaker, space: Space, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("pipeline.images.gpu.resize_and_crop_batch", run_out)
    records = make_records([make_jpeg(seed, (200, 150)) for seed in range(5)])
    found = gather(gpu_crops, records)
    for index, host in enumerate(make_host(space).make(records)):
        np.testing.assert_array_equal(found[index][0], host.pixels)


def test_a_missing_gpu_decoder_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    def find(name: str) -> str:
        raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", find)
    with pytest.raises(SettingsError, match=r"'image-embedding-pipeline\[gpu-decode\]'"):
        find_gpu_decoder_version()


def test_without_a_gpu_a_lookup_in_a_gpu_decoded_space_decodes_with_pillow(
    space: Space, weights: Path, embedder: Embedder
):
    lookup = Embedder.load(replace(space, decode="gpu"), weights=str(weights))
    found, exact = lookup.embed_images([make_jpeg()]), embedder.embed_images([make_jpeg()])
    np.testing.assert_allclose(found[0].vector, exact[0].vector, rtol=1e-3, atol=1e-4)
    lookup.close()


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp16"])
def test_a_query_to_a_space_of_any_precision_is_embedded_without_a_gpu(
    space: Space,
    weights: Path,
    embedder: Embedder,
    precision: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    other = replace(space, precision=precision)
    options = EmbedderOptions(any_precision=True)
    monkeypatch.setattr(LOG, "propagate", True)
    with caplog.at_level("INFO", LOG.name):
        lookup = Embedder.load(other, weights=str(weights), options=options)
    found, exact = lookup.embed_images([make_jpeg()]), embedder.embed_images([make_jpeg()])
    lookup.close()
    np.testing.assert_allclose(found[0].vector, exact[0].vector, rtol=1e-3, atol=1e-4)
    assert lookup.deviation is not None
    assert 0 < lookup.deviation.largest <= LARGEST_DEVIATION[precision]
    assert f"embedding in fp32 for a space of {precision}: smallest cosine" in caplog.text
    if precision != "bf16":
        with pytest.raises(SettingsError, match=f"precision {precision} needs a GPU"):
            Embedder.load(other, weights=str(weights))


def test_crops_that_travelled_give_the_same_embeddings(space: Space, embedder: Embedder):
    images = [make_jpeg(1), b"not an image", make_jpeg(2), encode(make_picture(3), "PNG")]
    shard = Shard("id", "tar", "s.tar", "/", "s.tar", 1, "v")
    chunks = [
        Chunk("id", 0, make_records(images[:3]), last=False),
        Chunk("id", 1, make_records(images[3:]), last=True, notes={"ignored_members": 1}),
    ]
    failed = FailedShard("other", SettingsError("no"))
    load = Load([(shard, chunk) for chunk in chunks], [failed], read_s=0.5)
    [(arrived, crops)] = unpack_crops(pack_crops(load, list(make_host(space).make(load.records))))
    assert [record.nbytes for record in arrived.records] == [len(data) for data in images]
    assert not any(record.data for record in arrived.records)
    assert arrived.read_s == 0.5
    assert [item.shard_id for item in arrived.failed] == ["other"]
    assert arrived.chunks[1][1].notes == {"ignored_members": 1}
    found, direct = embedder.embed_crops(crops).embeddings, embedder.embed(load.records).embeddings
    assert [(e.status, e.error, e.width, e.digest) for e in found] == [
        (e.status, e.error, e.width, e.digest) for e in direct
    ]
    np.testing.assert_allclose(stack(found), stack(direct), rtol=1e-3, atol=1e-4)


def test_a_load_without_any_crop_travels(space: Space):
    load = Load([(Shard("id", "tar", "s", "/", "s", 1, "v"), Chunk("id", 0, [], last=True))])
    [(arrived, crops)] = unpack_crops(pack_crops(load, []))
    assert (arrived.records, crops) == ([], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": "gpu"}, "decode gpu needs GPUs, and Ray has none"),
        ({"precision": "fp16"}, "precision fp16 needs a GPU"),
        ({"engine": "openvino", "precision": "bf16"}, "openvino computes in fp32"),
    ],
)
def test_what_the_actors_cannot_do_is_refused_before_any_is_started(
    tmp_path: Path, weights: Path, changes: dict[str, str], message: str
):
    config = EmbedConfig(
        input=("in",), output=str(tmp_path), model=MODEL, weights=str(weights), **changes
    )
    info, _ = describe_output(config, Storage())
    with pytest.raises(SettingsError, match=message):
        make_flow_settings(config, info, Resources(1, 1.0, 0.0), run_id="r")
