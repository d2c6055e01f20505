"""What a run is told about itself."""

import pytest

from pipeline.embed_job.efficiency import judge_run
from pipeline.embed_job.resources import Resources


def test_cores_that_decode_and_compute_share_one_ceiling():
    stages = {"decode": 1.0, "transform": 2.0, "forward": 17.0}
    found = judge_run(1000, 10.0, stages, Resources(actors=2, cpus=1.0, gpus=0.0))
    assert found.forward_images_per_s == pytest.approx(2000 / 17)
    assert found.host_images_per_s == pytest.approx(2000 / 3)
    assert found.ceiling_images_per_s == pytest.approx(100.0)
    assert found.reached == pytest.approx(1.0)
    assert found.binds == "forward"
    assert found.advice.startswith("forward-bound: the forward pass takes 85% of the cores")


def test_a_gpu_that_waits_for_decoding_is_told_how_many_cores_it_lacks():
    stages = {"decode": 60.0, "transform": 100.0, "forward": 5.0, "idle": 0.1}
    found = judge_run(30_000, 11.0, stages, Resources(actors=1, cpus=16.0, gpus=1.0))
    assert found.ceiling_images_per_s == pytest.approx(3000.0)
    assert found.reached == pytest.approx(30_000 / 11 / 3000)
    assert found.binds == "decode"
    assert found.advice.startswith("decode-bound: 16 more CPU cores per GPU would fill it")


def test_cores_are_counted_for_each_gpu_of_several_actors():
    stages = {"decode": 80.0, "transform": 80.0, "forward": 10.0}
    found = judge_run(30_000, 11.0, stages, Resources(actors=2, cpus=8.0, gpus=0.5))
    assert found.binds == "decode"
    assert "16 more CPU cores per GPU" in found.advice


def test_a_full_gpu_is_forward_bound():
    stages = {"decode": 10.0, "transform": 10.0, "forward": 9.8}
    found = judge_run(10_000, 10.0, stages, Resources(actors=1, cpus=8.0, gpus=1.0))
    assert found.reached == pytest.approx(0.98)
    assert found.advice.startswith("forward-bound: the GPUs are full, and their cores could feed")


def test_a_decode_stage_has_the_cores_of_its_own():
    stages = {"decode": 10.0, "transform": 10.0, "forward": 2.0}
    found = judge_run(10_000, 5.0, stages, Resources(actors=1, cpus=1.0, gpus=1.0, decoders=4))
    assert found.host_images_per_s == pytest.approx(2000.0)
    assert found.ceiling_images_per_s == pytest.approx(2000.0)
    assert found.reached == pytest.approx(1.0)


def test_actors_without_loads_are_read_bound():
    stages = {"decode": 1.0, "transform": 1.0, "forward": 8.0, "idle": 10.0}
    found = judge_run(1000, 10.0, stages, Resources(actors=2, cpus=1.0, gpus=0.0))
    assert (found.binds, found.idle) == ("read", 0.5)
    assert found.advice.startswith("read-bound: embedder actors had no images for 50%")


def test_cores_that_mostly_decode_are_told_so():
    stages = {"decode": 6.0, "transform": 3.0, "forward": 1.0}
    found = judge_run(1000, 10.0, stages, Resources(actors=1, cpus=1.0, gpus=0.0))
    assert found.advice.startswith("decode-bound: decoding takes 90% of the cores")


@pytest.mark.parametrize(
    ("images", "seconds", "stages"),
    [
        (0, 1.0, {"decode": 1.0, "forward": 1.0}),
        (5, 0.0, {}),
        (5, 1.0, {}),
        (5, 1.0, {"decode": 1.0}),
    ],
)
def test_a_run_without_figures_is_not_judged(images, seconds, stages):
    assert judge_run(images, seconds, stages, Resources(1, 1.0, 0.0)) is None
