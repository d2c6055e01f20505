"""How many embedder actors a cluster has room for."""

import pytest

from pipeline.config import EmbedConfig
from pipeline.embed_job.resources import Resources, fit_actors

GPU_NODE = {"CPU": 16.0, "GPU": 2.0}
CPU_NODE = {"CPU": 64.0}
HEAD = {"CPU": 0.0}


def make_config(**changes: object) -> EmbedConfig:
    return EmbedConfig(input=("in",), output="out", model="m", **changes)


@pytest.mark.parametrize(
    ("nodes", "changes", "expected"),
    [
        ([{"CPU": 2.0}], {}, Resources(2, 1.0, 0.0)),
        ([HEAD, {"CPU": 3.0}, {"CPU": 5.0}], {"cpus_per_actor": 2.0}, Resources(3, 2.0, 0.0)),
        ([HEAD], {}, Resources(1, 1.0, 0.0)),
        ([HEAD, GPU_NODE, GPU_NODE], {}, Resources(4, 8.0, 1.0)),
        ([GPU_NODE, CPU_NODE, CPU_NODE], {}, Resources(2, 8.0, 1.0)),
        ([GPU_NODE], {"gpus_per_actor": 0.5}, Resources(4, 4.0, 0.5)),
        ([GPU_NODE], {"gpus_per_actor": 0.0}, Resources(16, 1.0, 0.0)),
        ([HEAD], {"gpus_per_actor": 1.0, "actors": 8}, Resources(8, 1.0, 1.0)),
        ([GPU_NODE], {"actors": 1, "cpus_per_actor": 3.0}, Resources(1, 3.0, 1.0)),
    ],
)
def test_actors_fit_the_nodes_they_live_on(nodes, changes, expected) -> None:
    assert fit_actors(make_config(**changes), nodes) == expected
