"""Engines: one embedding whatever computes it, and a refusal when it is not."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbones import create_backbone, list_backbones
from pipeline.errors import SettingsError
from pipeline.images.resize import DataConfig
from pipeline.images.transforms import normalise, resolve_data_config
from pipeline.inference.deviation import Deviation, check_deviation, draw_probes, measure_deviation
from pipeline.inference.engines import (
    DTYPES,
    CpuEngine,
    Engine,
    EngineOptions,
    Forwarded,
    Network,
    build_engine,
    fill_up,
)

MODEL = "ese_vovnet19b_dw.ra_in1k"


@pytest.fixture(scope="module")
def data_config() -> DataConfig:
    return resolve_data_config(MODEL).with_size(64)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return create_backbone(MODEL, weights="random:0")


@pytest.fixture(scope="module", params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest, backbone: nn.Module, data_config: DataConfig) -> Engine:
    options = EngineOptions(name=request.param, batch_size=4, threads=1, logits=True)
    return build_engine(backbone, data_config, options)


def embed_plainly(backbone: nn.Module, data_config: DataConfig, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        images = normalise(torch.from_numpy(pixels), data_config)
        return backbone.forward_head(backbone.forward_features(images), pre_logits=True).numpy()


def test_an_engine_gives_the_embeddings_of_the_plain_backbone(
    engine: Engine, backbone: nn.Module, data_config: DataConfig
) -> None:
    pixels = draw_probes(data_config.image_size)
    forwarded = engine.submit(pixels)()
    expected = embed_plainly(backbone, data_config, pixels)
    assert forwarded.vectors.dtype == np.float32
    np.testing.assert_allclose(forwarded.vectors, expected, atol=1e-4 * np.abs(expected).max())
    assert forwarded.seconds > 0


def test_an_engine_gives_the_logits_of_the_plain_backbone(
    engine: Engine, backbone: nn.Module, data_config: DataConfig
) -> None:
    pixels = draw_probes(data_config.image_size)
    with torch.no_grad():
        expected = backbone(normalise(torch.from_numpy(pixels), data_config)).numpy()
    logits = engine.submit(pixels)().logits
    assert logits is not None
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_a_short_batch_equals_its_part_of_a_full_one(
    engine: Engine, data_config: DataConfig
) -> None:
    pixels = np.concatenate([draw_probes(data_config.image_size)] * 2)[:4]
    full = engine.submit(pixels)().vectors
    for num in (1, 2, 3):
        vectors = engine.submit(pixels[:num])().vectors
        assert vectors.shape == (num, full.shape[1])
        np.testing.assert_allclose(vectors, full[:num], atol=1e-4 * np.abs(full).max())


def test_an_outcome_survives_the_next_pass(engine: Engine, data_config: DataConfig) -> None:
    pixels = draw_probes(data_config.image_size)
    first = engine.submit(pixels)()
    kept = first.vectors.copy()
    engine.submit(pixels[::-1].copy())()
    np.testing.assert_array_equal(first.vectors, kept)


def test_an_engine_goes_on_with_smaller_batches(
    backbone: nn.Module, data_config: DataConfig
) -> None:
    engine = build_engine(backbone, data_config, EngineOptions(batch_size=4, threads=1))
    pixels = draw_probes(data_config.image_size)
    before = engine.submit(pixels)().vectors
    engine.shrink(2)
    assert engine.allocate().shape == (2, 64, 64, 3)
    after = engine.submit(pixels[:2])().vectors
    np.testing.assert_allclose(after, before[:2], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_a_compiled_engine_gives_the_embeddings_of_the_plain_backbone() -> None:
    tiny = TinyBackbone()
    data_config = DataConfig(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    options = EngineOptions(name="torch-compile", batch_size=4, threads=1)
    engine = build_engine(tiny, data_config, options)
    assert engine.submit(draw_probes(32)[:2])().vectors.shape == (2, 4)
    assert measure_deviation(engine, tiny, data_config).largest < 1e-5


class TinyBackbone(nn.Module):
    """Compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean((2, 3))


def test_the_scaling_inside_an_engine_has_the_bits_of_the_transform(
    data_config: DataConfig,
) -> None:
    class Identity(nn.Module):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            return x

    pixels = torch.from_numpy(draw_probes(data_config.image_size))
    network = Network(Identity(), data_config, precision="fp32", logits=False)
    assert torch.equal(network(pixels)[0], normalise(pixels, data_config))


def test_the_deviation_of_an_engine_is_measured_against_plain_float32(
    engine: Engine, backbone: nn.Module, data_config: DataConfig
) -> None:
    deviation = measure_deviation(engine, backbone, data_config)
    assert 0 <= deviation.largest < 1e-4
    assert deviation.cosine > 0.99999


def test_an_engine_of_other_weights_is_refused_before_a_run(data_config: DataConfig) -> None:
    options = EngineOptions(batch_size=4, threads=1)
    other = create_backbone(MODEL, weights="random:1", num_classes=0)
    engine = build_engine(other, data_config, options)
    deviation = measure_deviation(
        engine, create_backbone(MODEL, weights="random:0", num_classes=0), data_config
    )
    with pytest.raises(SettingsError, match=r"engine torch in fp32 is off by .* plain fp32") as e:
        check_deviation(deviation, options, MODEL)
    assert MODEL in str(e.value)


@pytest.mark.parametrize(("largest", "cosine"), [(0.01, 1.0), (0.0, 0.9), (float("nan"), 1.0)])
def test_a_deviation_beyond_the_bound_is_refused(largest: float, cosine: float) -> None:
    with pytest.raises(SettingsError, match="Use --engine torch or --precision fp32"):
        check_deviation(Deviation(largest, cosine, 0.0), EngineOptions(), MODEL)


@pytest.mark.parametrize(
    ("precision", "largest", "cosine"),
    [("bf16", 0.14, 0.99634), ("tf32", 0.018, 0.99996), ("fp16", 0.024, 0.999896)],
)
def test_a_precision_is_allowed_what_its_bits_explain(
    precision: str, largest: float, cosine: float
) -> None:
    """The figures are resnetv2_50's on an H200."""
    check_deviation(Deviation(largest, cosine, 0.0), EngineOptions(precision=precision), MODEL)


@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_is_within_what_its_precision_is_allowed(name: str) -> None:
    """At the size it was trained on; between its fp32 engine and itself in short numbers."""
    data_config = resolve_data_config(name)
    own = create_backbone(name, weights="random:0", num_classes=0)
    engine = build_engine(own, data_config, EngineOptions())
    for precision in ("fp32", "bf16", "fp16"):
        deviation = measure_deviation(engine, own, data_config, reference=precision)
        check_deviation(deviation, EngineOptions(precision=precision), name)


@pytest.mark.parametrize("precision", list(DTYPES))
def test_other_weights_are_refused_in_every_precision(
    precision: str, data_config: DataConfig
) -> None:
    engine = build_engine(
        create_backbone(MODEL, weights="random:1", num_classes=0), data_config, EngineOptions()
    )
    own = create_backbone(MODEL, weights="random:0", num_classes=0)
    deviation = measure_deviation(engine, own, data_config)
    with pytest.raises(SettingsError, match="Use --engine torch or --precision fp32"):
        check_deviation(deviation, EngineOptions(precision=precision), MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(precision="fp16"), "precision fp16 needs a GPU"),
        (EngineOptions(precision="tf32"), "precision tf32 needs a GPU; use bf16 or fp32"),
        (EngineOptions("openvino", "cuda"), "openvino runs on the CPU only"),
        (EngineOptions("openvino", precision="bf16"), "openvino computes in fp32, not bf16"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    options: EngineOptions, message: str, backbone: nn.Module, data_config: DataConfig
) -> None:
    with pytest.raises(SettingsError, match=message):
        build_engine(backbone, data_config, options)


def test_a_missing_openvino_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, backbone: nn.Module, data_config: DataConfig
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(SettingsError, match=r"pip install 'image-embedding-pipeline\[openvino\]'"):
        build_engine(backbone, data_config, EngineOptions("openvino"))


def test_a_batch_is_filled_up_with_black() -> None:
    pixels = np.full((2, 3, 3, 3), 7, np.uint8)
    full = fill_up(pixels, 4)
    assert full.shape == (4, 3, 3, 3)
    assert (full[:2] == 7).all()
    assert not full[2:].any()
    assert fill_up(pixels, 2) is pixels


def test_outcomes_of_pieces_are_joined_in_order() -> None:
    first = Forwarded(np.zeros((2, 3), np.float32), np.ones((2, 5), np.float32), 1.0, 0.5)
    second = Forwarded(np.ones((1, 3), np.float32), np.zeros((1, 5), np.float32), 2.0, 0.25)
    joined = Forwarded.join([first, second])
    assert joined.vectors[:, 0].tolist() == [0, 0, 1]
    assert joined.logits is not None
    assert joined.logits[:, 0].tolist() == [1, 1, 0]
    assert (joined.seconds, joined.transfer_s) == (3.0, 0.75)


def test_an_engine_on_the_cpu_computes_at_once(
    backbone: nn.Module, data_config: DataConfig
) -> None:
    assert CpuEngine.depth == 0
    engine = build_engine(backbone, data_config, EngineOptions(batch_size=2, threads=1))
    pixels = engine.allocate()
    collect = engine.submit(pixels)
    pixels[:] = 255
    assert np.abs(collect().vectors - engine.submit(pixels)().vectors).max() > 0
