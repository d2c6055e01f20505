"""The Ray Data graph: what goes wrong on a worker reaches the driver as itself, on any cluster."""

from pathlib import Path

from pictures import make_jpeg, write_loose
from runs import make_config, start_job


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, weights: Path):
    write_loose(tmp_path / "in", {"a.jpg": make_jpeg()})
    config = make_config(tmp_path / "in", tmp_path / "out", weights, ray_address="127.0.0.1:1")
    with start_job(config, tmp_path) as job:
        assert job.wait() == 2
        line = job.log.read_text().splitlines()[-1]
        assert line.startswith("error: no Ray cluster answers at '127.0.0.1:1'")
        assert line.endswith("check --ray-address or RAY_ADDRESS")
    assert not (tmp_path / "out" / "lease.json").exists()
