"""The embed job end to end, on a shared local Ray: every image one row, exactly once."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import (
    encode,
    make_hostile_pictures,
    make_jpeg,
    make_picture,
    write_loose,
    write_parquet,
    write_tar,
)
from runs import MODEL, assert_same_rows, list_files, make_config, read_rows

from pipeline.config import StorageOptions
from pipeline.embed_job.lease import Lease
from pipeline.embed_job.report import EmbedReport
from pipeline.embed_job.run import embed
from pipeline.errors import (
    CorruptionError,
    LeaseError,
    NoShardsError,
    SettingsError,
    SpaceMismatchError,
    StorageError,
    TooManyFailuresError,
    UnknownBackboneError,
    WeightsError,
)
from pipeline.log import LOG
from pipeline.output.commits import list_commits, list_retired
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_mixed_input(folder: Path) -> dict[str, str]:
    """Write one input with every kind of shard; return the expected status of each key."""
    hostile = make_hostile_pictures()
    write_tar(folder / "plain.tar", [(f"sub dir/{i}.jpg", make_jpeg(i)) for i in range(7)])
    write_tar(
        folder / "ünï.côdé.tar.gz",
        [("a.png", encode(make_picture(20), "PNG")), ("a.b.jpg", make_jpeg(21))],
    )
    members = [(name, picture.data) for name, picture in hostile.items()]
    write_tar(folder / "hostile.tar", [*members, ("good.jpg", make_jpeg(22))])
    whole = write_tar(folder / "cut.tar", [(f"{i}.jpg", make_jpeg(30 + i)) for i in range(3)])
    whole.write_bytes(whole.read_bytes()[: 512 + 700])
    write_tar(folder / "none.tar", [])
    write_parquet(folder / "hf.parquet", [make_jpeg(40), None, make_jpeg(41)], struct=True)
    write_parquet(folder / "nested" / "plain.pq", [make_jpeg(42), b"\0\1\2\3 no image"])
    loose = {f"loose/{i} ü.jpg": make_jpeg(50 + i) for i in range(5)}
    write_loose(folder, loose | {f"bad/{name}": data for name, data in members})
    expected = dict.fromkeys(loose, "ok")
    expected |= {f"plain.tar/sub dir/{i}.jpg": "ok" for i in range(7)}
    expected |= {"ünï.côdé.tar.gz/a.png": "ok", "ünï.côdé.tar.gz/a.b.jpg": "ok"}
    expected |= {f"hostile.tar/{name}": picture.status for name, picture in hostile.items()}
    expected |= {f"bad/{name}": picture.status for name, picture in hostile.items()}
    expected |= {"hostile.tar/good.jpg": "ok"}
    expected |= {"cut.tar/0.jpg": "truncated", "cut.tar": "bad_shard"}
    expected |= {"hf.parquet/0": "ok", "hf.parquet/1": "unreadable", "hf.parquet/2": "ok"}
    return expected | {"nested/plain.pq/0": "ok", "nested/plain.pq/1": "unsupported"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, weights):
    """An input of everything, and the output of one run over it."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "in" / "nested").mkdir(parents=True)
    expected = write_mixed_input(folder / "in")
    config = make_config(folder / "in", folder / "out", weights)
    return config, expected, embed(config)


def test_every_image_of_every_kind_of_shard_gets_one_row_with_its_status(mixed):
    config, expected, report = mixed
    rows = read_rows(config.output)
    assert {key: row["status"] for key, row in rows.items()} == expected
    counts = Counter(expected.values())
    assert report.rows == counts
    assert report.images.embedded == counts.pop("ok")
    assert report.images.failed == counts
    assert report.images.listed == len(expected)
    assert report.shards["embedded"] == len(list_commits(config.output, Storage()))


def test_a_row_has_an_embedding_or_a_reason(mixed):
    config, _, _ = mixed
    for row in read_rows(config.output).values():
        assert (row["embedding"] is None) == (row["status"] != "ok") == bool(row["error"])
        if row["status"] == "ok":
            assert np.isfinite(row["embedding"]).all()
            assert np.linalg.norm(row["embedding"]) > 0
            assert row["width"] > 0
            assert len(row["sha256"]) == 16


def test_offset_and_length_give_the_encoded_image_back(mixed):
    config, _, _ = mixed
    rows = read_rows(config.output)
    for key in ("plain.tar/sub dir/3.jpg", "loose/2 ü.jpg", "hostile.tar/good.jpg"):
        row = rows[key]
        data = Path(row["shard"]).read_bytes()[row["offset"] :][: row["nbytes"]]
        assert data in {make_jpeg(3), make_jpeg(52), make_jpeg(22)}
    assert rows["ünï.côdé.tar.gz/a.png"]["offset"] is None


def test_rows_of_a_shard_count_from_zero_in_its_order(mixed):
    config, _, _ = mixed
    rows = [row for row in read_rows(config.output).values() if row["key"].startswith("plain.tar")]
    assert [row["row"] for row in rows] == list(range(7))
    assert [row["key"][-5] for row in rows] == list("0123456")


def test_a_second_run_reads_no_image_and_writes_nothing_but_its_report(mixed):
    config, expected, first = mixed
    tar = Path(config.input[0]) / "plain.tar"
    data, status = tar.read_bytes(), tar.stat()
    before = list_files(Path(config.output))
    try:
        tar.write_bytes(bytes(len(data)))  # a run that reads would notice
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
        report = embed(config)
    finally:
        tar.write_bytes(data)
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = list_files(Path(config.output))
    assert {name for name in after if after[name] != before.get(name)} == {
        f"runs/{report.run_id}.json",
        f"runs/{report.run_id}.html",
    }
    assert set(before) <= set(after)
    assert report.images.embedded == 0
    assert report.images.carried_over == len(expected)
    assert report.rows == first.rows
    assert report.encoded_bytes == 0


def test_the_report_is_stored_as_json_and_says_what_was_set(mixed):
    config, _, report = mixed
    stored = json.loads((Path(config.output) / "runs" / f"{report.run_id}.json").read_text())
    assert stored["images"] == report.to_dict()["images"]
    assert stored["settings"]["model"] == MODEL
    assert stored["settings"]["image_size"] == "64"


def test_verify_finds_a_fresh_output_sound(mixed):
    config, expected, _ = mixed
    report = embed(replace(config, verify=True))
    assert report.problems == ()
    assert report.rows == len(expected)


def test_verify_fails_on_a_damaged_part_and_names_it(mixed, tmp_path: Path):
    config, _, _ = mixed
    shutil.copytree(config.output, tmp_path / "out")
    part = max((tmp_path / "out" / "parts").rglob("*.parquet"), key=lambda p: p.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"1 problems.*parquet.*delete the commits") as caught:
        embed(replace(config, output=str(tmp_path / "out"), verify=True))
    assert len(caught.value.report.problems) == 1
    assert str(part) in caught.value.report.problems[0]


def test_more_actors_give_the_same_rows_parts_and_embeddings(mixed, tmp_path: Path):
    config, _, _ = mixed
    embed(replace(config, output=str(tmp_path / "out"), actors=2, batch_size=5))
    assert_same_rows(read_rows(tmp_path / "out"), read_rows(config.output))
    described = [
        {key: [(p.path, p.rows_sha256) for p in commit.parts] for key, commit in commits.items()}
        for commits in (
            list_commits(str(tmp_path / "out"), Storage()),
            list_commits(config.output, Storage()),
        )
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": "96"}, "image_size is 64 there and 96 here"),
        ({"exif": "ignore"}, "exif is 'apply' there and 'ignore' here"),
        ({"chunk_images": 7}, "chunk_images is 256 there and 7 here"),
        ({"carry": ("txt",)}, r"carry is \[\] there and \['txt'\] here"),
        ({"weights": "random:1"}, "weights_sha256 is"),
        ({"model": "ese_vovnet19b_dw.ra_in1k", "weights": "random:0"}, "backbone is 'fbnetv3"),
    ],
)
def test_settings_of_another_space_are_refused_by_name(mixed, changes, words):
    config, _, _ = mixed
    before = list_files(Path(config.output))
    with pytest.raises(SpaceMismatchError, match=f"{words}.*use the same settings, or another"):
        embed(replace(config, **changes))
    assert list_files(Path(config.output)) == before


def test_timms_form_of_the_model_is_the_same_space(mixed, caplog, monkeypatch):
    config, _, _ = mixed
    monkeypatch.setattr(LOG, "propagate", True)
    with caplog.at_level("INFO", LOG.name):
        report = embed(replace(config, model=f"timm/{config.model.split('.')[0]}"))
    assert report.settings["model"] == config.model
    assert report.images.embedded == 0
    assert f"is taken to be {config.model}, which is built in" in caplog.text


def test_a_misspelt_backbone_names_the_nearest(mixed):
    config, _, _ = mixed
    with pytest.raises(UnknownBackboneError, match=r"resnetv2_50\.a1h_in1k"):
        embed(replace(config, model="resnetv2_50.a1_in1k"))


@pytest.mark.parametrize(
    ("wrong", "words", "right"),
    [
        ({"precision": "tf32"}, "needs a GPU; use bf16 or fp32", {"precision": "bf16"}),
        ({"precision": "fp16"}, "needs a GPU; use bf16 or fp32", {"precision": "fp32"}),
        ({"decode": "gpu"}, "use --decode exact or fast", {"decode": "fast"}),
        (
            {"engine": "openvino", "precision": "bf16"},
            "use engine torch-compile",
            {"engine": "openvino", "precision": "fp32"},
        ),
    ],
)
def test_what_the_cluster_cannot_do_makes_no_output_that_stands_in_the_way(
    mixed, tmp_path: Path, wrong, words: str, right
):
    config = replace(mixed[0], output=str(tmp_path / "out"))
    with pytest.raises(SettingsError, match=words):
        embed(replace(config, **wrong))
    assert not (tmp_path / "out").exists()
    assert embed(replace(config, **right)).images.embedded > 0


def test_a_wrong_prefix_leaves_no_output_behind(mixed, tmp_path: Path):
    config, _, _ = mixed
    with pytest.raises(NoShardsError, match="no image shards under"):
        embed(replace(config, input=(str(tmp_path / "nope"),), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_read_are_an_error_before_anything_runs(mixed, tmp_path: Path):
    config, _, _ = mixed
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    for weights in (tmp_path / "w.safetensors", tmp_path / "gone.safetensors"):
        with pytest.raises(WeightsError, match=str(weights)):
            embed(replace(config, weights=str(weights), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_output_inside_an_input_is_refused(mixed):
    config, _, _ = mixed
    with pytest.raises(SettingsError, match="lies inside the input"):
        embed(replace(config, output=f"{config.input[0]}/embeddings"))


def test_a_second_run_on_a_held_output_is_refused(mixed):
    config, _, _ = mixed
    with (
        Lease(config.output, "20260101-000000-abcdef", storage=Storage()),
        pytest.raises(LeaseError, match=r"run 20260101-000000-abcdef .* is writing there now"),
    ):
        embed(config)


def test_a_dry_run_writes_nothing_and_tells_what_would_be_done(mixed, tmp_path: Path):
    config, _, _ = mixed
    before = list_files(Path(config.output))
    done = embed(replace(config, dry_run=True)).to_dict()
    assert done["shards"]["embed"] == 0
    assert done["shards"]["carried_over"] == 8
    assert list_files(Path(config.output)) == before
    fresh = embed(replace(config, output=str(tmp_path / "out"), dry_run=True)).to_dict()
    assert fresh["shards"]["embed"] == 8
    assert fresh["dry_run"] is True
    assert not (tmp_path / "out").exists()


def test_added_changed_deleted_and_restored_sources_are_followed(tmp_path: Path, weights: Path):
    source, output, storage = tmp_path / "in", tmp_path / "out", Storage()
    loose = {f"{name}.jpg": make_jpeg(seed) for seed, name in enumerate("abcd")}
    write_loose(source / "loose", loose)
    for seed, name in enumerate(("keep", "change", "drop"), start=10):
        write_tar(source / f"{name}.tar", [("x.jpg", make_jpeg(seed)), ("y.jpg", make_jpeg())])
    config = make_config(source, output, weights)
    embed(config)
    first = read_rows(output)

    (source / "drop.tar").rename(tmp_path / "drop.tar")
    write_tar(source / "change.tar", [("x.jpg", make_jpeg(99))])
    write_tar(source / "new.tar", [("n.jpg", make_jpeg(98))])
    (source / "loose" / "b.jpg").unlink()
    write_loose(source / "loose", {"c.jpg": make_jpeg(97, (80, 60)), "e.jpg": make_jpeg(96)})
    report = embed(config)
    second = read_rows(output)
    loose_keys = {f"loose/{name}.jpg" for name in "acde"}
    assert set(second) == loose_keys | {
        "keep.tar/x.jpg",
        "keep.tar/y.jpg",
        "change.tar/x.jpg",
        "new.tar/n.jpg",
    }
    assert second["loose/c.jpg"]["width"] == 80
    assert second["change.tar/x.jpg"]["sha256"] != first["change.tar/x.jpg"]["sha256"]
    unchanged = ("keep.tar/x.jpg", "keep.tar/y.jpg")
    assert_same_rows({k: second[k] for k in unchanged}, {k: first[k] for k in unchanged})
    for key in ("loose/a.jpg", "loose/d.jpg"):
        assert second[key]["sha256"] == first[key]["sha256"]
    assert report.shards["removed"] == 1
    assert report.images.removed == 3  # both of drop.tar, and loose/b.jpg
    assert report.images.carried_over == 2
    assert report.images.listed == len(second) + 3

    (tmp_path / "drop.tar").rename(source / "drop.tar")
    report = embed(config)
    assert report.images.embedded == 0
    assert report.shards["restored"] == 1
    third = read_rows(output)
    assert_same_rows(third, second | {k: first[k] for k in ("drop.tar/x.jpg", "drop.tar/y.jpg")})

    assert list_retired(str(output), storage)
    parts_before = len(list((output / "parts").rglob("*.parquet")))
    embed(replace(config, prune=True))
    assert list_retired(str(output), storage) == {}
    live = {p.path for c in list_commits(str(output), storage).values() for p in c.parts}
    assert {str(p.relative_to(output)) for p in (output / "parts").rglob("*.parquet")} == live
    assert len(live) < parts_before
    assert_same_rows(read_rows(output), third)


@pytest.mark.slow
def test_shards_with_missing_or_cut_parts_are_embedded_again(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("cut", "lost", "whole", "gone"):
        write_tar(source / f"{name}.tar", [("x.jpg", make_jpeg(len(name)))])
    config = make_config(source, output, weights)
    embed(config)
    first = read_rows(output)
    storage = Storage()
    parts = {c.name: output / c.parts[0].path for c in list_commits(str(output), storage).values()}
    parts["cut.tar"].write_bytes(parts["cut.tar"].read_bytes()[:-1])
    parts["lost.tar"].unlink()
    (source / "gone.tar").rename(tmp_path / "gone.tar")
    report = embed(config)
    assert (report.shards["embedded"], report.shards["removed"]) == (2, 1)
    (output / "retired").joinpath(f"{parts['gone.tar'].parent.name}.json").stat()
    parts["gone.tar"].unlink()
    (tmp_path / "gone.tar").rename(source / "gone.tar")
    report = embed(config)  # its retired commit promises parts that are not there
    assert (report.shards["embedded"], report.shards["restored"]) == (1, 0)
    assert_same_rows(read_rows(output), first)
    assert embed(replace(config, verify=True)).problems == ()


@pytest.mark.slow
def test_a_damaged_shard_whose_input_was_not_given_is_a_failure(tmp_path: Path, weights: Path):
    output = tmp_path / "out"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / f"{name}.tar", [("x.jpg", make_jpeg(1))])
        embed(make_config(tmp_path / name, output, weights))
    (commit,) = [c for c in list_commits(str(output), Storage()).values() if c.name == "a.tar"]
    (output / commit.parts[0].path).unlink()
    with pytest.raises(StorageError, match=r"a\.tar: .*\.parquet is missing"):
        embed(make_config(tmp_path / "b", output, weights))
    embed(make_config(tmp_path / "a", output, weights))
    assert set(read_rows(output)) == {"a.tar/x.jpg", "b.tar/x.jpg"}


def test_carried_columns_classes_and_half_precision_go_with_the_rows(tmp_path: Path, weights: Path):
    source = tmp_path / "in"
    source.mkdir()
    members = []
    for i in range(3):
        members += [(f"{i}.jpg", make_jpeg(i)), (f"{i}.txt", f"caption ü {i}".encode())]
        members += [(f"{i}.json", json.dumps({"n": i}).encode())]
    write_tar(source / "a.tar", [*members, ("0.jpg", make_jpeg(7)), ("3.jpg", b"broken")])
    config = make_config(
        source,
        tmp_path / "out",
        weights,
        carry=("txt", "json"),
        top_k_classes=3,
        embedding_dtype="float16",
        chunk_images=2,
    )
    report = embed(config)
    rows = read_rows(config.output)
    assert rows["a.tar/1.jpg"]["txt"] == "caption ü 1"
    assert json.loads(rows["a.tar/2.jpg"]["json"]) == {"n": 2}
    assert rows["a.tar/3.jpg"]["txt"] is None
    assert rows["a.tar/0.jpg#2"]["status"] == "ok"
    assert report.notes["duplicate_keys"] == 1
    row = rows["a.tar/0.jpg"]
    assert len(row["class_index"]) == len(row["class_prob"]) == 3
    assert row["class_prob"] == sorted(row["class_prob"], reverse=True)
    assert rows["a.tar/3.jpg"]["class_index"] is None
    schema = pa.parquet.read_schema(next((tmp_path / "out" / "parts").rglob("*.parquet")))
    assert schema.field("embedding").type.value_type == pa.float16()
    (commit,) = list_commits(config.output, Storage()).values()
    assert [part.rows for part in commit.parts] == [2, 2, 1]
    assert embed(replace(config, verify=True)).problems == ()


def test_parquet_keys_and_carried_columns_keep_their_types(tmp_path: Path, weights: Path):
    source = tmp_path / "in"
    source.mkdir()
    for name, first in (("a", 0), ("b", 2)):
        write_parquet(
            source / f"{name}.parquet",
            [make_jpeg(first), make_jpeg(first + 1)],
            id=pa.array([f"id-{first}", f"id-{first + 1}"]),
            label=pa.array([first, None], pa.int16()),
            tags=pa.array([["x"], []]),
        )
    config = make_config(
        source, tmp_path / "out", weights, key_column="id", carry=("label", "tags")
    )
    embed(config)
    rows = read_rows(config.output)
    assert set(rows) == {f"{n}.parquet/id-{i}" for n, i in ("a0", "a1", "b2", "b3")}
    assert rows["b.parquet/id-2"]["label"] == 2
    assert rows["b.parquet/id-3"]["label"] is None
    assert rows["a.parquet/id-0"]["tags"] == '["x"]'


@pytest.mark.slow
def test_failures_stop_a_run_at_their_limit_and_are_tried_again_on_request(
    tmp_path: Path, weights: Path
):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(4)])
    write_tar(tmp_path / "in" / "b.tar", [("small.png", encode(make_picture(0, (9, 9)), "PNG"))])
    config = make_config(tmp_path / "in", tmp_path / "out", weights, max_pixels=100)
    with pytest.raises(
        TooManyFailuresError, match=r"4 of \d images failed \(4 too_large\)"
    ) as told:
        embed(replace(config, max_failures="3"))
    stopped = told.value.report
    assert isinstance(stopped, EmbedReport)
    assert stopped.images.failed.get("too_large", 0) in (0, 4)  # committed before the stop, or not
    assert 0 <= stopped.embed_seconds < 300
    assert len(list((tmp_path / "out" / "runs").glob("*.html"))) == 1
    with pytest.raises(TooManyFailuresError, match="than --max-failures allows"):
        embed(replace(config, max_failures="50%", output=str(tmp_path / "other")))
    report = embed(config)
    assert report.rows == {"ok": 1, "too_large": 4}
    assert embed(replace(config, max_pixels=10**6)).images.embedded == 0
    report = embed(replace(config, max_pixels=10**6, retry_failed=True))
    assert report.images.embedded == 4
    assert report.images.carried_over == 1
    rows = read_rows(config.output)
    assert Counter(row["status"] for row in rows.values()) == {"ok": 5}
    assert embed(replace(config, verify=True)).problems == ()


def test_s3_goes_in_and_out_and_a_second_run_fetches_no_image(
    s3_server, s3_bucket, faulty_s3, tmp_path: Path, weights: Path
):
    storage = s3_server.storage()
    write_tar(tmp_path / "ü a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(3)])
    write_parquet(tmp_path / "p.parquet", [make_jpeg(5)])
    for name in ("ü a.tar", "p.parquet"):
        storage.upload(tmp_path / name, f"{s3_bucket}/in/{name}")
    storage.put(f"{s3_bucket}/in/loose/x y.jpg", make_jpeg(6))
    options = StorageOptions(endpoint_url=faulty_s3.endpoint_url)
    config = make_config(f"{s3_bucket}/in", f"{s3_bucket}/out", weights, storage=options)
    report = embed(config)
    assert report.rows == {"ok": 5}
    rows = read_rows(config.output, storage)
    assert set(rows) == {"p.parquet/0", "loose/x y.jpg", *(f"ü a.tar/{i}.jpg" for i in range(3))}
    assert rows["ü a.tar/1.jpg"]["shard"] == f"{s3_bucket}/in/ü a.tar"
    faulty_s3.clear()
    report = embed(config)
    assert report.images.carried_over == 5
    bucket = s3_bucket.removeprefix("s3://")
    assert faulty_s3.count("GET", f"{bucket}/in/*") == 0
    written = {seen.key for seen in faulty_s3.seen if seen.method == "PUT"}
    assert all(key.split("/")[2].startswith(("runs", "lease.json", ".~lock")) for key in written)
    assert embed(replace(config, verify=True)).problems == ()
