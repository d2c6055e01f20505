import gc
import time

import numpy as np
import pytest
import ray

from index.corpus import STORAGE, build, make_corpus
from pipeline.config import IndexConfig
from pipeline.errors import CorruptionError
from pipeline.index.build.kinds import padded_dim
from pipeline.index.search.search_index import SearchIndex
from pipeline.index.workers import LocalWorkers, RayWorkers, open_workers, wants_ray


@pytest.fixture
def free_cluster(ray_cluster: str) -> str:
    """The cluster once runs of other tests, which may have ended in errors, have left it."""
    gc.collect()  # an error's traceback keeps a run's actors alive
    for _ in range(600):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return ray_cluster
        time.sleep(0.1)
    pytest.fail(f"CPUs are held by {ray.util.list_named_actors(all_namespaces=True)}")


def test_small_builds_stay_in_this_process():
    with open_workers(use_ray=False, address=None, tasks=1) as workers:
        assert isinstance(workers, LocalWorkers)
        assert workers.run(padded_dim, [3, 4, 5]) == [4, 4, 8]


def test_tasks_come_back_in_order_from_a_cluster(free_cluster):
    with open_workers(use_ray=True, address=free_cluster, tasks=2) as workers:
        assert workers.threads == 1
        assert workers.run(padded_dim, list(range(2, 20))) == [padded_dim(n) for n in range(2, 20)]


def test_a_build_that_waits_for_cpus_says_so_and_goes_on(free_cluster, monkeypatch, caplog):
    @ray.remote(num_cpus=1)
    class Other:
        def ready(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.ready.remote())

    def leave(*_: object) -> float:
        ray.kill(other)  # once the line is being written
        return {"CPU": 1.0}

    monkeypatch.setattr("pipeline.index.workers.PATIENCE_S", 0.5)
    monkeypatch.setattr(ray, "available_resources", leave)
    assert RayWorkers(2).run(padded_dim, [3]) == [4]
    assert "waiting tasks=1 free_cpus=1: tasks run, or wait for CPUs" in caplog.text


def test_an_error_of_a_task_keeps_its_kind_and_its_words(free_cluster, tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=100, dim=32)
    [part, *_] = STORAGE.list_objects(f"{corpus.output}/parts")
    STORAGE.put(part.uri, b"damaged")
    with pytest.raises(CorruptionError) as caught:
        build(corpus, str(tmp_path / "index"), workers="ray", ray_address=free_cluster)
    assert str(caught.value).startswith(part.uri)
    assert "cannot be read" in str(caught.value)


def test_an_index_that_a_cluster_built_equals_one_built_here(free_cluster, tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=1200, dim=32)
    settings = {"kind": "ivf-rabitq", "queries": 50, "memory_budget": "20kB"}
    here = build(corpus, str(tmp_path / "here"), workers="local", **settings)
    there = build(
        corpus, str(tmp_path / "there"), workers="ray", ray_address=free_cluster, **settings
    )
    assert here["segments"] == there["segments"] > 2
    queries = np.stack(list(corpus.vectors.values())[::100])
    lines = [SearchIndex.open(str(tmp_path / n)).search(queries, 10) for n in ("here", "there")]
    for one, other in zip(*lines, strict=True):
        assert [n.key for n in one] == [n.key for n in other]


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({}, 1_000_000, False),
        ({}, 3_000_000, True),
        ({"ray_address": "auto"}, 300_000, True),
        ({"ray_address": "auto"}, 1000, False),
        ({"workers": "local"}, 10**9, False),
        ({"workers": "ray"}, 10, True),
    ],
)
def test_a_cluster_is_used_where_it_pays(settings, rows, expected, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert wants_ray(IndexConfig(index="i", **settings), rows) is expected


def test_the_surrounding_cluster_is_used_by_a_submitted_job(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert wants_ray(IndexConfig(index="i"), 300_000)
