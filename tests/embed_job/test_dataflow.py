"""The Ray Data graph: what goes wrong on a worker reaches the driver as itself, and shards of odd
shapes pass."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from pictures import make_hostile_pictures, make_jpeg, write_loose, write_parquet, write_tar
from PIL import Image
from runs import assert_same_rows, count_files, make_config, read_rows, start_job, wait_until

from pipeline.config import EmbedConfig
from pipeline.embed_job.actors import EmbedActor, FlowSettings, make_flow_settings
from pipeline.embed_job.dataflow import cluster
from pipeline.embed_job.lease import Holder
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.run import embed
from pipeline.embed_job.wire import Receipt, pack_receipts, unpack_loads, unpack_receipts
from pipeline.errors import (
    ClusterError,
    CorruptionError,
    LeaseError,
    ObjectMissingError,
    SettingsError,
    WeightsError,
)
from pipeline.inference.embedder import Embedder, open_engine
from pipeline.inference.engines import Forwarded, Pixels
from pipeline.output.commits import list_commits
from pipeline.output.info import read_output_info
from pipeline.storage import Storage


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, weights: Path):
    write_loose(tmp_path / "in", {"a.jpg": make_jpeg()})
    config = make_config(tmp_path / "in", tmp_path / "out", weights, ray_address="127.0.0.1:1")
    with start_job(config, tmp_path) as job:
        assert job.wait() == 2
        line = job.log.read_text().splitlines()[-1]
        assert line.startswith("error: no Ray cluster answers at '127.0.0.1:1'")
        assert line.endswith("check --ray-address or RAY_ADDRESS")
    assert not (tmp_path / "out" / "lease.json").exists()


def test_a_cluster_that_was_joined_before_is_left_running(ray_cluster: str):
    with cluster(None):
        pass
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == ray_cluster


def test_the_receipts_of_a_load_are_one_row_which_ray_passes_on_at_once():
    receipts = [Receipt(f"{i:016x}", i, last=True, num_records=i) for i in range(300)]
    table = pack_receipts(receipts)
    assert table.num_rows == 1
    assert list(unpack_receipts(table)) == receipts


@pytest.mark.usefixtures("ray_cluster")
class TestFaultsOfWorkers:
    """Settings, storage and code that turn out wrong on a worker, and memory that is too small."""

    def test_a_missing_column_is_a_wrong_setting(self, tmp_path: Path, weights: Path):
        (tmp_path / "in").mkdir()
        write_parquet(tmp_path / "in" / "a.parquet", [make_jpeg()])
        config = make_config(tmp_path / "in", tmp_path / "out", weights, image_column="nope")
        with pytest.raises(SettingsError, match=r"a\.parquet has no column 'nope'; its columns"):
            embed(config)

    def test_parts_that_cannot_be_written_end_the_run(self, tmp_path: Path, weights: Path):
        write_loose(tmp_path / "in", {"a.jpg": make_jpeg()})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "parts").write_text("in the way")
        with pytest.raises(
            ObjectMissingError, match=r"cannot write '.*00000-\w+\.parquet': Not a dir"
        ):
            embed(make_config(tmp_path / "in", tmp_path / "out", weights))

    def test_weights_that_were_damaged_at_the_output_are_named(self, tmp_path: Path, weights: Path):
        write_loose(tmp_path / "in", {"a.jpg": make_jpeg()})
        config = make_config(tmp_path / "in", tmp_path / "out", weights)
        embed(config)
        (stored,) = (tmp_path / "out" / "weights").iterdir()
        stored.write_bytes(stored.read_bytes()[:-100])
        write_loose(tmp_path / "in", {"b.jpg": make_jpeg(1)})
        with pytest.raises(WeightsError, match=f"cannot read the weights in '{stored}'"):
            embed(config)

    def test_an_actor_that_fails_as_nobody_foresaw_ends_the_run_with_its_words(
        self, tmp_path: Path, weights: Path
    ):
        write_loose(tmp_path / "in", {"a.jpg": make_jpeg()})
        config = make_config(tmp_path / "in", tmp_path / "out", weights)
        with pytest.raises(
            ClusterError, match=r"^Ray gave up with \S+: ZeroDivisionError: a defect; committed sh"
        ) as caught:
            embed(config, stand_in=make_defective_actor())
        assert caught.value.exit_code == 1
        assert list_commits(config.output, Storage()) == {}
        assert not (tmp_path / "out" / "lease.json").exists()
        assert embed(config).rows == {"ok": 1}

    def test_a_shard_whose_last_receipt_is_missing_is_named_and_not_committed(
        self, tmp_path: Path, weights: Path
    ):
        write_loose(tmp_path / "in", {"a.jpg": make_jpeg()})
        config = make_config(tmp_path / "in", tmp_path / "out", weights)
        with pytest.raises(
            CorruptionError, match=r"1 shards sent no final receipt, e\.g\. .*a\.jpg"
        ):
            embed(config, stand_in=make_forgetful_actor())
        assert list_commits(config.output, Storage()) == {}

    def test_batches_are_halved_where_memory_runs_out_and_the_report_says_so(
        self, tmp_path: Path, weights: Path
    ):
        images = {f"{i:02}.jpg": make_jpeg(i) for i in range(22)}
        write_loose(tmp_path / "in", images)
        config = make_config(
            tmp_path / "in", tmp_path / "out", weights, batch_size=8, chunk_images=10
        )
        report = embed(config, stand_in=make_limited_actor(config, fits=3))
        assert report.rows == {"ok": 22}
        assert report.batch_size == 2
        whole = replace(config, output=str(tmp_path / "whole"))
        assert embed(whole).batch_size == 8
        assert_same_rows(read_rows(config.output), read_rows(whole.output))


def make_defective_actor() -> type:
    class Defective:
        def __call__(self, batch: pa.Table) -> pa.Table:
            raise ZeroDivisionError("a defect")

    return Defective


def make_forgetful_actor() -> type:
    class Forgetful:
        def __call__(self, batch: pa.Table) -> pa.Table:
            chunks = [item for load in unpack_loads(batch) for item in load.chunks]
            return pack_receipts(
                [Receipt(shard.id, chunk.index, last=False) for shard, chunk in chunks]
            )

    return Forgetful


def make_limited_actor(config: EmbedConfig, *, fits: int) -> type:
    """Return an embedder actor on a device that holds ``fits`` images."""

    class Limited(EmbedActor):
        def __init__(self) -> None:
            info = read_output_info(config.output, Storage())
            resources = Resources(actors=1, cpus=1.0, gpus=0.0)
            settings = make_flow_settings(config, info, resources, run_id="limited")
            super().__init__(settings, make=self._make_limited)

        def _make_limited(self, settings: FlowSettings) -> Embedder:
            space, options = settings.info.space, settings.embedder
            engine, _ = open_engine(space, weights=settings.weights, options=options)
            submit = engine.submit

            def submit_few(pixels: Pixels) -> Callable[[], Forwarded]:
                if len(pixels) > fits:
                    raise torch.OutOfMemoryError("out of memory")
                return submit(pixels)

            engine.submit = submit_few
            return Embedder(space, engine, options=options)

    return Limited


@pytest.mark.usefixtures("ray_cluster")
class TestRuns:
    """Whole runs that differ from the usual one in one thing."""

    @pytest.mark.slow
    def test_a_decode_stage_gives_the_same_rows_and_embeddings(self, tmp_path: Path, weights: Path):
        hostile = make_hostile_pictures()
        names = ("half.jpg", "html.jpg", "empty.jpg", "lie.png")
        (tmp_path / "in").mkdir()
        good = [(f"{i}.jpg", make_jpeg(i)) for i in range(9)]
        write_tar(tmp_path / "in" / "a.tar", good)
        write_tar(tmp_path / "in" / "b.tar", [(name, hostile[name].data) for name in names])
        config = make_config(tmp_path / "in", tmp_path / "out", weights, chunk_images=4)
        embed(config)
        staged = replace(config, output=str(tmp_path / "staged"), decode_stage=True)
        report = embed(staged)
        assert report.actors["decoders"] == 1
        assert report.images.embedded == len(good)
        assert_same_rows(read_rows(staged.output), read_rows(config.output))

    @pytest.mark.slow
    def test_a_run_that_loses_its_lease_stops_and_the_next_one_completes_it(
        self, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("pipeline.embed_job.lease.RENEW_S", 0.02)
        shards, output = 16, tmp_path / "out"
        (tmp_path / "in").mkdir()
        for n in range(shards):
            images = [(f"{i}.jpg", make_jpeg(10 * n + i)) for i in range(6)]
            write_tar(tmp_path / "in" / f"{n:02}.tar", images)
        config = make_config(tmp_path / "in", output, weights, chunk_images=6)
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(embed, config)
            wait_until(lambda: count_files(output, "parts") >= 1 or run.done())
            theirs = take_over(output / "lease.json")
            with pytest.raises(LeaseError, match=r"another run took .* over; this one stops"):
                run.result()
        assert (output / "lease.json").read_bytes() == theirs
        assert len(list_commits(config.output, Storage())) < shards
        assert count_files(output, "runs") == 0
        (output / "lease.json").unlink()
        assert embed(config).rows == {"ok": 6 * shards}
        assert len(read_rows(output)) == 6 * shards
        assert embed(replace(config, verify=True)).problems == ()

    def test_hundreds_of_shards_of_one_image_are_one_commit_each(
        self, tmp_path: Path, weights: Path
    ):
        (tmp_path / "in").mkdir()
        for i in range(300):
            write_tar(tmp_path / "in" / f"{i:03}.tar", [("x.jpg", make_jpeg(i, (16, 12)))])
        config = make_config(tmp_path / "in", tmp_path / "out", weights, chunk_images=64)
        report = embed(config)
        assert report.images.embedded == 300
        assert len(list_commits(config.output, Storage())) == 300
        assert set(read_rows(config.output)) == {f"{i:03}.tar/x.jpg" for i in range(300)}

    def test_one_huge_image_among_small_ones_is_one_row(self, tmp_path: Path, weights: Path):
        write_loose(tmp_path / "in", {f"{i}.jpg": make_jpeg(i) for i in range(4)})
        Image.new("RGB", (9000, 8000), (200, 30, 30)).save(tmp_path / "in" / "huge.jpg")
        config = make_config(tmp_path / "in", tmp_path / "out", weights)
        rows = read_rows(embed(config).output)
        assert {row["status"] for row in rows.values()} == {"ok"}
        assert (rows["huge.jpg"]["width"], rows["huge.jpg"]["height"]) == (9000, 8000)
        assert np.isfinite(rows["huge.jpg"]["embedding"]).all()


def take_over(lease: Path) -> bytes:
    """Put another run's lease in the place of the one that is there."""
    data = Holder.here("theirs").to_json()
    lease.write_bytes(data)
    return data
