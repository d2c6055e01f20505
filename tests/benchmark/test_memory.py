"""The memory benchmark: every case is one run of the job, and nothing grows with the input."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.benchmark.memory import MemoryCase, MemoryFindings, list_cases, measure_memory
from pipeline.benchmark.memory import _measure_case as measure_case
from pipeline.errors import AbortError

MIB = 2**20


def test_the_cases_at_full_size_are_those_that_were_promised():
    images = {case.name: case.images for case in list_cases(1.0)}
    large = images.pop("shard larger than the object store")
    assert images == {
        "1x": 800,
        "4x": 3200,
        "16x": 12_800,
        "one shard of 50,000 tiny images": 50_000,
        "20,000 shards of one image": 20_000,
        "one image of 200 megapixels among small ones": 64,
    }
    assert large > 256


@pytest.mark.slow
def test_a_small_run_is_accounted_for_and_leaves_nothing_behind(tmp_path: Path):
    [found] = measure_memory(tmp_path, scale=0.001, names=["1x"])
    assert (found.case, found.images, found.shards) == ("1x", 16, 4)
    assert found.rows == {"ok": 16}
    assert found.seconds > 0
    assert {"driver", "actor", "task"} <= set(found.peak_bytes)
    assert all(found.peak_bytes[kind] > 20 * MIB for kind in ("driver", "actor", "task"))
    assert json.loads(json.dumps(asdict(found)))["peak_bytes"] == found.peak_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_loses_an_image_is_no_measurement(tmp_path: Path):
    case = list_cases(0.001)[0]
    wrong = MemoryCase(case.name, case.images + 1, case.write)
    with pytest.raises(AbortError, match=r"1x: 17 images have become .*16.* rows"):
        measure_case(wrong, tmp_path / "case")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MemoryFindings]:
    found = measure_memory(tmp_path_factory.mktemp("memory"), scale=0.02)
    return {item.case: item for item in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestEveryCase:
    """All cases at a fiftieth of their size."""

    def test_every_image_has_a_row(self, findings):
        assert len(findings) == 7
        for found in findings.values():
            assert sum(found.rows.values()) == found.images
        assert findings["400 shards of one image"].shards == 400
        assert findings["one shard of 1,000 tiny images"].shards == 1

    def test_an_image_beyond_the_limit_is_a_row_and_one_at_the_limit_is_embedded(self, findings):
        found = findings["one image of 4 megapixels among small ones"]
        assert found.rows == {"ok": 63, "too_large": 1}

    def test_memory_does_not_grow_with_the_number_of_images(self, findings):
        for kind in ("driver", "actor", "task"):
            few, many = (findings[name].peak_bytes[kind] for name in ("1x", "16x"))
            assert many <= 1.1 * few + 64 * MIB, kind

    def test_only_the_shard_larger_than_the_object_store_is_given_a_small_one(self, findings):
        given = {name: found.object_store_bytes for name, found in findings.items()}
        assert given.pop("shard larger than the object store") == 80 * MIB
        assert set(given.values()) == {0}
