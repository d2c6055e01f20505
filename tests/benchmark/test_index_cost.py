import numpy as np
import pytest

from pipeline.benchmark.index_cost import measure_index
from pipeline.benchmark.synthetic import generate_vectors
from pipeline.index.vectors import normalise_rows


@pytest.mark.slow
def test_an_index_is_measured_next_to_flat_search(tmp_path):
    flat, codes = measure_index(4000, 64, folder=tmp_path, kinds=("flat", "rabitq"))
    assert (flat.kind, codes.kind) == ("flat", "rabitq")
    assert flat.recall_at["10"]["value"] == 1
    assert codes.recall_at["10"]["value"] >= 0.95
    assert codes.params["candidates"] >= 128
    for cost in (flat, codes):
        assert set(cost.recall_at) == {"1", "10", "100"}
        assert all(at["low"] <= at["value"] <= at["high"] for at in cost.recall_at.values())
        assert 0 < cost.night_bytes < 0.2 * cost.size_bytes  # of so few rows, the map is a tenth
        assert cost.build_cpu_s > 0
        assert cost.build_cpu_s_per_million == pytest.approx(250 * cost.build_cpu_s, abs=3)
        assert cost.peak_bytes > 10**7
        for latency in (cost.search, cost.lookup):
            assert 0 < latency.p50_ms <= latency.p99_ms
            assert latency.queries > 1
        assert len(cost.filters) == 12
        assert all(found.recall_at["10"] >= 0.95 for found in cost.filters)
        assert (cost.paging.rows, cost.paging.doubled, cost.paging.lost) == (8000, 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_synthetic_vectors_resemble_embeddings_of_images():
    vectors = generate_vectors(3000, 256, clusters=200)
    assert vectors.dtype == np.float32
    assert (vectors >= 0).all()
    assert 0.4 < (vectors == 0).mean() < 0.6
    unit = normalise_rows(vectors)
    pairs = unit[:500] @ unit[500:1000].T
    assert 0.4 < pairs.mean() < 0.7
    fresh = normalise_rows(generate_vectors(50, 256, seed=1, clusters=200))
    assert (fresh @ unit.T).max(axis=1).mean() > 0.93


def test_the_same_seeds_give_the_same_vectors():
    one, same, other = (generate_vectors(20_000, 8, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
