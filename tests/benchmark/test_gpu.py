"""What ``--measure gpu`` runs on a GPU, as far as a CPU goes."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from jobs.benchmark import main
from pipeline.backbones import load_weights, save_weights
from pipeline.benchmark import gpu
from pipeline.benchmark.samples import draw_photograph, write_samples
from pipeline.benchmark.worker import make_embed_round, make_gpu_crops_round
from pipeline.images.resize import DataConfig
from pipeline.images.transforms import resolve_data_config
from pipeline.inference.engines import EngineOptions

MODEL = "ese_vovnet19b_dw.ra_in1k"
GEOMETRY = DataConfig(64, 0.9, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    samples = write_samples([draw_photograph(0)], 3, folder / "samples", per_shard=3)
    weights = folder / "weights.safetensors"
    save_weights(load_weights(MODEL, "random:0").state_dict, str(weights))
    values = {
        **{"model": MODEL, "weights": str(weights), "files": samples.files, "exif": "apply"},
        **{"images": 7, "engine": asdict(EngineOptions(batch_size=4, threads=1))},
        "data_config": asdict(resolve_data_config(MODEL).with_size(64)),
    }
    return json.loads(json.dumps(values))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_not_measured_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--measure", "gpu"]) == 2
    assert "measure gpu needs a GPU, and PyTorch finds none" in capsys.readouterr().err


@pytest.mark.parametrize("decode", ["exact", "gpu"])
def test_a_round_embeds_every_image(spec: dict[str, Any], decode: str) -> None:
    run_round = make_embed_round(spec | {"decode": decode})
    assert [run_round()[0], run_round()[0]] == [7, 7]


def test_a_round_of_crops_makes_every_crop(spec: dict[str, Any]) -> None:
    pytest.importorskip("torchvision")
    assert make_gpu_crops_round(spec | {"decode": "gpu"})()[0] == 7


def test_the_check_of_bits_finds_none_wrong_and_would_find_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu.count_wrong_bytes(GEOMETRY, "cpu") == 0
    right = gpu.resize_and_crop_batch

    def be_wrong(*arguments: Any) -> torch.Tensor:
        crops = right(*arguments)
        crops[-1, 0, 0, 0] ^= 1
        return crops

    monkeypatch.setattr(gpu, "resize_and_crop_batch", be_wrong)
    assert gpu.count_wrong_bytes(GEOMETRY, "cpu") == 1
