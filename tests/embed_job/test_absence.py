"""Objects that are refused, gone, changed or odd: named, and everything beside them is done."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import make_jpeg, write_loose, write_parquet, write_tar
from runs import assert_same_rows, make_config, read_rows
from s3.faulty_proxy import Fault

from pipeline.config import StorageOptions
from pipeline.embed_job import actors, dataflow, run
from pipeline.embed_job.actors import EmbedActor, FlowSettings, make_embedder
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.run import embed
from pipeline.embed_job.wire import LoadBounds, Receipt, read_loads, unpack_receipts
from pipeline.errors import (
    AccessError,
    CredentialsError,
    NoImagesError,
    ObjectMissingError,
    RemovalError,
    SettingsError,
    StorageError,
)
from pipeline.inference.embedder import Embedder
from pipeline.input.listing import Listing
from pipeline.output.commits import list_commits
from pipeline.records import Shard
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process read, embed and write what Ray's tasks and actors would.

    One embedder, which takes seconds to make, serves all runs of a space.
    """
    monkeypatch.setattr(actors, "make_embedder", share_embedder)
    monkeypatch.setattr(dataflow, "cluster", lambda _address: nullcontext())
    monkeypatch.setattr(dataflow, "choose_resources", lambda _config: Resources(1, 1.0, 0.0))
    monkeypatch.setattr(dataflow, "run_flow", run_here)


EMBEDDERS: dict[str, Embedder] = {}


def share_embedder(settings: FlowSettings) -> Embedder:
    key = settings.info.space.id
    if key not in EMBEDDERS:
        EMBEDDERS[key] = make_embedder(settings)
    return EMBEDDERS[key]


def run_here(
    shards: Sequence[Shard], settings: FlowSettings, *_: object, **__: object
) -> Iterator[Receipt]:
    actor = EmbedActor(settings)
    bounds = LoadBounds(settings.read.chunk_images, settings.read.chunk_bytes)
    loads = read_loads(shards, storage=settings.storage, options=settings.read, bounds=bounds)
    for receipt in (receipt for load in loads for receipt in unpack_receipts(actor(load))):
        if receipt.fatal is not None:
            raise receipt.fatal
        yield receipt


@pytest.fixture(scope="module")
def remote(s3_server, tmp_path_factory):
    """A bucket with two archives, a Parquet file and six loose images."""
    folder = tmp_path_factory.mktemp("absence")
    for seed, name in enumerate(("a.tar", "b.tar"), start=1):
        write_tar(folder / name, [(f"{i}.jpg", make_jpeg(10 * seed + i)) for i in range(2)])
    write_parquet(folder / "p.parquet", [make_jpeg(30)])
    write_loose(folder, {f"loose/{i}.jpg": make_jpeg(40 + i) for i in range(6)})
    bucket, storage = s3_server.make_bucket(), s3_server.storage()
    for path in sorted(folder.rglob("*.*")):
        storage.upload(path, f"{bucket}/in/{path.relative_to(folder)}")
    return bucket


KEYS = {
    *(f"{name}.tar/{i}.jpg" for name in "ab" for i in range(2)),
    "p.parquet/0",
    *(f"loose/{i}.jpg" for i in range(6)),
}


def test_refused_and_archived_objects_are_named_and_all_others_are_done(
    remote, faulty_s3, s3_server, tmp_path: Path, weights: Path
):
    """The first run lacks them, and the next one, when they are back, adds nothing else."""
    faulty_s3.inject(
        Fault("denied", method="GET", key="*/in/a.tar", times=None),
        Fault("denied", method="GET", key="*/in/loose/1.jpg", times=None),
        Fault("archived", method="GET", key="*/in/loose/4.jpg", times=None),
    )
    options = StorageOptions(endpoint_url=faulty_s3.endpoint_url)
    config = make_config(f"{remote}/in", f"{remote}/{tmp_path.name}", weights, storage=options)
    with pytest.raises(StorageError, match=r"3 objects could not be read.*run again") as told:
        embed(config)
    assert told.value.exit_code == 1
    report = told.value.report
    assert set(report.failed_objects) == {
        f"{remote}/in/{name}" for name in ("a.tar", "loose/1.jpg", "loose/4.jpg")
    }
    assert "archived: restore it first" in report.failed_objects[f"{remote}/in/loose/4.jpg"]
    assert "AccessDenied" in report.failed_objects[f"{remote}/in/a.tar"]
    assert next(iter(report.failed_shards.values())).startswith(f"{remote}/in/a.tar: cannot")
    objects = report.objects
    assert (objects.listed, objects.images, objects.shards, objects.failed) == (9, 4, 2, 3)
    lacking = {"a.tar/0.jpg", "a.tar/1.jpg", "loose/1.jpg", "loose/4.jpg"}
    rows = read_rows(config.output, s3_server.storage())
    assert set(rows) == KEYS - lacking
    assert {row["status"] for row in rows.values()} == {"ok"}
    faulty_s3.clear()
    report = embed(config)
    assert report.images.embedded == 4
    assert report.images.carried_over == 7
    after = read_rows(config.output, s3_server.storage())
    assert set(after) == KEYS
    assert_same_rows({key: after[key] for key in rows}, rows)
    assert embed(replace(config, verify=True)).problems == ()
    assert embed(config).shards["embed"] == 0


def test_only_where_nothing_can_be_read_is_it_the_runs_fault(
    remote, faulty_s3, tmp_path: Path, weights: Path
):
    faulty_s3.inject(Fault("denied", method="GET", key="*/in/*", times=None))
    options = StorageOptions(endpoint_url=faulty_s3.endpoint_url)
    config = make_config(f"{remote}/in", f"{remote}/{tmp_path.name}", weights, storage=options)
    with pytest.raises(AccessError, match=r"AccessDenied.*in the bucket's or the role's policy"):
        embed(config)
    faulty_s3.clear()
    faulty_s3.inject(Fault("expired", method="GET", key="*/in/*", times=None))
    with pytest.raises(CredentialsError, match="renew the credentials"):
        embed(config)


def write_bundle(folder: Path) -> None:
    write_loose(folder, {f"{i}.jpg": make_jpeg(i) for i in range(5)})


def test_a_changed_image_that_cannot_be_had_keeps_its_older_row_beside_those_that_can(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    write_bundle(source)
    config = make_config(source, tmp_path / "out", weights, actors=1)
    embed(config)
    first = read_rows(config.output)
    write_loose(source, {"1.jpg": make_jpeg(101), "3.jpg": make_jpeg(103)})
    with vanishing(source / "3.jpg"), pytest.raises(StorageError) as told:
        embed(config)
    report = told.value.report
    assert list(report.failed_objects) == [str(source / "3.jpg")]
    assert report.images.embedded == 4
    assert report.images.carried_over == 1
    assert report.images.listed == 5
    second = read_rows(config.output)
    assert sorted(row["row"] for row in second.values()) == list(range(5))
    assert second["3.jpg"] == first["3.jpg"]
    assert second["1.jpg"]["sha256"] != first["1.jpg"]["sha256"]
    assert embed(replace(config, verify=True)).problems == ()

    report = embed(config)  # the image can be had now
    assert report.failed_objects == {}
    third = read_rows(config.output)
    assert third["3.jpg"]["sha256"] != first["3.jpg"]["sha256"]
    assert_same_rows({"1.jpg": third["1.jpg"]}, {"1.jpg": second["1.jpg"]})
    assert embed(config).shards["embed"] == 0


def test_where_nothing_but_an_absence_is_new_the_older_commit_stays(tmp_path: Path, weights: Path):
    source = tmp_path / "in"
    write_bundle(source)
    write_tar(source / "t.tar", [("x.jpg", make_jpeg(50))])
    config = make_config(source, tmp_path / "out", weights)
    embed(config)
    before = list_commits(config.output, Storage())
    rows = read_rows(config.output)
    write_loose(source, {"3.jpg": make_jpeg(103)})
    write_tar(source / "t.tar", [("x.jpg", make_jpeg(51))])
    with (
        vanishing(source / "3.jpg", source / "t.tar"),
        pytest.raises(StorageError, match="2 objects could not be read") as told,
    ):
        embed(config)
    assert list_commits(config.output, Storage()) == before
    assert read_rows(config.output) == rows
    assert told.value.report.images.carried_over == 6
    report = embed(config)
    assert report.images.embedded == 6
    assert read_rows(config.output)["t.tar/x.jpg"]["sha256"] != rows["t.tar/x.jpg"]["sha256"]


@contextmanager
def vanishing(*paths: Path) -> Iterator[None]:
    """Move files away between each listing and the reading, and back at the end."""
    listed = run.list_sources

    def list_and_lose(*args: Any, **kwargs: Any) -> Listing:
        for path in paths:
            if not path.exists():  # what leaves is listed twice
                path.with_suffix(".away").rename(path)
        listing = listed(*args, **kwargs)
        for path in paths:
            path.rename(path.with_suffix(".away"))
        return listing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "list_sources", list_and_lose)
        yield
    for path in paths:
        path.with_suffix(".away").rename(path)


def test_a_name_that_is_no_utf8_a_dead_link_and_metadata_beside_shards_stop_nothing(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    write_bundle(source)
    write_tar(source / "00000.tar", [("x.jpg", make_jpeg(50))])
    pq.write_table(pa.table({"url": ["http://x"], "key": ["x"]}), source / "00000.parquet")
    (source / "00000_stats.json").write_text("{}")
    (source / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    latin = Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.jpg"))
    try:
        shutil.copy(source / "1.jpg", latin)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    config = make_config(source, tmp_path / "out", weights)
    with pytest.raises(StorageError, match="2 objects could not be read") as told:
        embed(config)
    report = told.value.report
    assert report.failed_objects == {
        f"{source}/caf\\xe9.jpg": "its name is not UTF-8; rename it",
        f"{source}/link.jpg": "cannot look at it: a symbolic link that leads nowhere; mend it at "
        "the source, or take it out of the input",
    }
    assert set(read_rows(config.output)) == {"00000.tar/x.jpg", *(f"{i}.jpg" for i in range(5))}
    (source / "link.jpg").unlink()
    latin.unlink()
    report = embed(config)
    assert report.images.embedded == 0
    assert {reason: aside.count for reason, aside in report.set_aside.items()} == {
        "Parquet without a column of images": 1,
        "text or metadata": 1,
    }
    assert report.set_aside["Parquet without a column of images"].names == (
        f"{source}/00000.parquet",
    )
    assert report.objects.listed == 8


def test_shards_without_one_image_are_no_success(tmp_path: Path, weights: Path):
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "a.tar", [("x.npy", b"1"), ("y.txt", b"2")])
    pq.write_table(pa.table({"url": ["http://x"]}), source / "b.parquet")
    config = make_config(source, tmp_path / "out", weights)
    for _ in range(2):  # nor is the night after
        with pytest.raises(NoImagesError, match=r"no image was found in the 2 shards under") as e:
            embed(config)
        assert e.value.exit_code == 1
        assert "1 without images" in str(e.value)


def test_a_column_that_one_file_lacks_is_that_files_fault_unless_all_lack_it(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    source.mkdir()
    write_parquet(source / "a.parquet", [make_jpeg(1)], id=pa.array(["one"]))
    write_parquet(source / "b.parquet", [make_jpeg(2)])
    config = make_config(source, tmp_path / "out", weights, key_column="id")
    with pytest.raises(StorageError, match=r"1 objects.*b\.parquet has no column 'id'") as told:
        embed(config)
    assert told.value.exit_code == 1
    assert set(read_rows(config.output)) == {"a.parquet/one"}
    config = replace(config, output=str(tmp_path / "other"), key_column="nope")
    with pytest.raises(SettingsError, match=r"has no column 'nope'; its columns are") as told:
        embed(config)
    assert told.value.exit_code == 2


def test_an_entry_of_a_list_that_is_gone_keeps_its_row(tmp_path: Path, weights: Path):
    write_bundle(tmp_path / "in")
    uris = tmp_path / "list.txt"
    uris.write_text("\n".join(str(tmp_path / "in" / f"{i}.jpg") for i in range(5)))
    config = make_config(uris, tmp_path / "out", weights, input_kind="list")
    embed(config)
    rows = read_rows(config.output)
    (tmp_path / "in" / "2.jpg").rename(tmp_path / "2.jpg")
    with pytest.raises(StorageError, match=r"1 objects could not be read.*2\.jpg.*No such file"):
        embed(config)
    assert read_rows(config.output) == rows
    (tmp_path / "2.jpg").rename(tmp_path / "in" / "2.jpg")
    assert embed(config).shards["embed"] == 0
    uris.write_text(str(tmp_path / "gone.jpg"))
    with pytest.raises((StorageError, ObjectMissingError), match=r"nothing under .* can be read"):
        embed(config)


def test_a_listing_that_lost_a_subfolder_removes_nothing_until_it_is_told_to(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    write_loose(source, {f"{day}/{i}.jpg": make_jpeg(i) for day in "ab" for i in range(20)})
    config = make_config(source, tmp_path / "out", weights)
    embed(config)
    rows = read_rows(config.output)
    (source / "b").rename(tmp_path / "b")
    write_loose(source, {"c/new.jpg": make_jpeg(77)})
    words = r"20 of 40 committed rows are no longer listed.* run again with --max-removed 0\.5$"
    with pytest.raises(RemovalError, match=words) as told:
        embed(config)
    assert told.value.exit_code == 1
    assert told.value.report.images.removed == 0
    after = read_rows(config.output)
    assert set(after) == {*rows, "c/new.jpg"}
    report = embed(replace(config, max_removed=0.5))  # the remedy
    assert report.images.removed == 20
    assert set(read_rows(config.output)) == {key for key in after if not key.startswith("b/")}
    (tmp_path / "b").rename(source / "b")  # the other remedy
    embed(config)
    assert set(read_rows(config.output)) == set(after)


def test_the_last_line_on_the_terminal_accounts_for_everything_listed(
    tmp_path: Path, weights: Path, caplog, monkeypatch
):
    source = tmp_path / "in"
    write_loose(source, {"a.jpg": make_jpeg(1), ".b.jpg": b"", "c.nef": b"", "d.json": b""})
    write_tar(source / "t.tar", [("x.jpg", make_jpeg(2)), ("y.npy", b"")])
    monkeypatch.setattr("pipeline.log.LOG.handlers", [caplog.handler])
    monkeypatch.setattr("pipeline.log.LOG.propagate", False)
    with caplog.at_level(logging.INFO, "pipeline"):
        report = embed(make_config(source, tmp_path / "out", weights))
    assert caplog.records[-1].getMessage() == (
        f"done run={report.run_id} 5 objects listed: 1 images, 1 shards, 3 set aside "
        "(1 camera raw, 1 hidden, 1 text or metadata), 0 failed; 1 ignored members"
    )
    page = (tmp_path / "out" / "runs" / f"{report.run_id}.html").read_text()
    for text in ("Set aside", "camera raw", str(source / "c.nef"), "Of 5 objects listed"):
        assert text in page
