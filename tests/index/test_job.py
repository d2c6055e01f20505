import json
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest

from index.corpus import STORAGE, Corpus, build, draw_vectors, make_corpus, make_space
from pipeline.config import IndexConfig
from pipeline.errors import (
    CorruptionError,
    ObjectMissingError,
    PublishError,
    SettingsError,
    SpaceMismatchError,
    UnknownKeyError,
)
from pipeline.index.job import build_index
from pipeline.index.pointer import read_current
from pipeline.index.search.search_index import SearchIndex
from pipeline.output.commits import list_commits, write_commit
from pipeline.output.info import OutputInfo, claim_output

KINDS = ("flat", "rabitq", "ivf-rabitq", "ivf-sq8", "hnsw")


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make_corpus(tmp_path / "embeddings", rows=1200, dim=32)


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "index")


def list_files(uri):
    return {info.uri: info.version for info in STORAGE.list_objects(uri)}


def check_contents(corpus, uri):
    """Every key of the corpus, and no other, is found with its own vector."""
    index = SearchIndex.open(uri)
    found = index.snapshot.sample(10**6)
    assert sorted(item.key for item in found) == sorted(corpus.vectors)
    for key, vector in corpus.vectors.items():
        np.testing.assert_allclose(index.vector(key), vector / np.linalg.norm(vector), atol=1e-3)
    return index


# --- building ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_committed_is_indexed_measured_and_published(corpus, uri, kind):
    report = build(corpus, uri, kind=kind, queries=100)
    assert report["action"] == "built"
    assert report["kind"] == kind
    assert report["rows"] == 1200
    assert report["measured"]["recall"] >= 0.95
    assert set(report["measured"]["recall_at"]) == {"1", "10", "100"}
    assert report["measured"]["latency_ms"]["p50"] > 0
    assert report["curve"]
    assert all(gate["passed"] for gate in report["gates"])
    check_contents(corpus, uri)


def test_the_report_is_json(corpus, uri):
    assert json.loads(json.dumps(build(corpus, uri)))["job"] == "index"


def test_the_manifest_names_every_file_and_the_source(corpus, uri):
    build(corpus, uri)
    manifest = read_current(uri, STORAGE)
    assert manifest.embeddings.uri == corpus.output
    assert manifest.embeddings.space == corpus.info.space
    assert manifest.embeddings.statuses == {"ok": 1200}
    assert manifest.embeddings.newest_image_s == 1e9 + 4
    assert set(manifest.segments[0].files) == {"index", "vectors", "keys", "order", "truth"}
    for file in manifest.list_files():
        assert STORAGE.stat(f"{uri}/{file.path}").size_bytes == file.size_bytes


def test_several_segments_hold_all_rows_once(corpus, uri):
    report = build(corpus, uri, kind="flat", memory_budget="100kB")
    assert report["segments"] == 4
    check_contents(corpus, uri)


def test_rows_without_a_usable_vector_are_counted_and_left_out(tmp_path, uri):
    corpus = Corpus(str(tmp_path / "embeddings"), 32)
    vectors = draw_vectors(50, 32, seed=0)
    vectors[3] = 0
    vectors[4] = np.nan
    corpus.add_shard("a.tar", vectors, statuses={0: "truncated", 1: "unsupported"})
    report = build(corpus, uri)
    assert (report["rows"], report["skipped"]) == (46, 2)
    assert report["statuses"] == {"ok": 48, "unsupported": 1, "truncated": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_handful_of_rows_is_enough(tmp_path, uri, kind):
    corpus = Corpus(str(tmp_path / "embeddings"), 32)
    corpus.add_shard("a.tar", draw_vectors(3, 32, seed=0))
    build(corpus, uri, kind=kind)
    assert len(SearchIndex.open(uri).search(np.ones(32), 10)[0]) == 3


def test_equal_pictures_do_not_spoil_the_recall(tmp_path, uri):
    corpus = Corpus(str(tmp_path / "embeddings"), 32)
    corpus.add_shard("a.tar", np.repeat(draw_vectors(20, 32, seed=0), 30, axis=0))
    report = build(corpus, uri, kind="rabitq")
    assert report["measured"]["recall"] == 1


def test_a_key_that_occurs_twice_is_named(tmp_path, uri):
    corpus = Corpus(str(tmp_path / "embeddings"), 32)
    corpus.add_shard("a.tar", draw_vectors(4, 32, seed=0), names=["x.jpg", "y.jpg"] * 2)
    with pytest.raises(CorruptionError, match=r"the key 'a.tar/x.jpg'.*is one input given twice"):
        build(corpus, uri)


@pytest.mark.parametrize("rows_at_once", [2, 1000])
def test_a_key_that_occurs_in_two_segments_is_refused_by_a_gate(
    corpus, uri, rows_at_once, monkeypatch
):
    monkeypatch.setattr("pipeline.index.build.gates.COMPARED_ROWS", rows_at_once)
    build(corpus, uri)
    before = read_current(uri, STORAGE)
    old = next(c for c in list_commits(corpus.output, STORAGE).values() if "000" in c.name)
    corpus.add_shard("shard-000.tar", draw_vectors(5, 32, seed=1))
    # The first shard comes back to life beside the one that had superseded it, as another object.
    revived = replace(old, sequence=99, source="/pictures/other.tar")
    write_commit(corpus.output, revived, STORAGE, replaces=old)
    with pytest.raises(PublishError, match=r"keys: the key 'shard-000.tar/00000"):
        build(corpus, uri)
    assert read_current(uri, STORAGE) == before


def test_keys_too_many_to_compare_are_logged(corpus, uri, monkeypatch, caplog):
    build(corpus, uri)
    corpus.extend("shard-000b.tar", rows=20, seed=5)  # in order, among the keys that are there
    monkeypatch.setattr("pipeline.index.build.gates.MAX_READ_ROWS", 1000)
    [gate] = [gate for gate in build(corpus, uri)["gates"] if gate["name"] == "keys"]
    assert gate["passed"]
    expected = "not compared between segments: 1,200 keys would have to be read"
    assert gate["detail"] == expected
    assert f"keys {expected}; the limit is 1000" in caplog.text


def test_segments_that_were_compared_before_are_not_read_again(corpus, uri, monkeypatch):
    build(corpus, uri)
    corpus.extend("shard-000b.tar", rows=20, seed=5)
    build(corpus, uri)
    monkeypatch.setattr("pipeline.index.build.gates._find_common", lambda *args, **settings: "read")
    corpus.drop_rows("shard-001.tar", every=50)
    assert build(corpus, uri)["action"] == "added"


def test_no_embeddings_no_index_and_no_rows_are_told_apart(tmp_path, uri):
    with pytest.raises(ObjectMissingError, match=r"space.json is missing"):
        build_at(str(tmp_path / "none"), uri)
    corpus = Corpus(str(tmp_path / "empty"), 32)
    with pytest.raises(SettingsError, match="hold no committed vector; run embed first"):
        build(corpus, uri)
    zeros = Corpus(str(tmp_path / "zeros"), 32)
    zeros.add_shard("a.tar", np.zeros((5, 32), np.float32))
    with pytest.raises(SettingsError, match="no usable vector; look at its rows' status"):
        build(zeros, uri)


def build_at(embeddings, uri):
    return build_index(IndexConfig(index=uri, embeddings=embeddings))


def test_embeddings_have_to_be_given(uri):
    with pytest.raises(SettingsError, match="no embeddings given; pass --embeddings"):
        build_at(None, uri)


def test_embeddings_of_another_space_are_refused_by_name(corpus, uri, tmp_path):
    build(corpus, uri)
    other = make_corpus(tmp_path / "other", rows=100, dim=32)
    space = make_space(32, image_size=288)
    info = OutputInfo(space, corpus.info.layout, corpus.info.carried, "w", "random:0 of it")
    STORAGE.delete([f"{other.output}/space.json"])
    claim_output(other.output, info, STORAGE)
    with pytest.raises(SpaceMismatchError, match="image_size is 224 there and 288 here"):
        build(other, uri)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(corpus, uri):
    report = build(corpus, uri, dry_run=True)
    assert report["action"] == "planned"
    assert report["why"] == "first generation"
    assert report["plan"]["kind"] == "flat"
    assert list_files(uri) == {}


def test_a_build_that_was_stopped_goes_on_from_its_segments(corpus, uri, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.index.build.update.publish", fail)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, uri, kind="ivf-rabitq", queries=100)
    monkeypatch.undo()
    before = {u: v for u, v in list_files(uri).items() if "/segments/" in u or "trained" in u}
    report = build(corpus, uri, kind="ivf-rabitq", queries=100)
    after = list_files(uri)
    assert {u: after[u] for u in before} == before
    assert report["written_bytes"] < 10_000


# --- nights ---


def test_a_second_run_without_changes_writes_nothing(corpus, uri):
    build(corpus, uri)
    before = list_files(uri)
    report = build(corpus, uri)
    assert report["action"] == "unchanged"
    assert list_files(uri) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_night_adds_changes_and_removes(corpus, uri, kind):
    build(corpus, uri, kind=kind, queries=100)
    corpus.extend("new.tar", rows=40, seed=5)
    corpus.drop_rows("shard-002.tar", every=100)
    corpus.remove_shard("new.tar")
    corpus.extend("newer.tar", rows=20, seed=6)
    report = build(corpus, uri, kind=kind, queries=100)
    assert report["action"] == "added"
    assert (report["segments"], report["deltas"], report["deleted"]) == (2, 1, 3)
    check_contents(corpus, uri)


def test_a_night_writes_in_proportion_to_what_it_adds(tmp_path, uri):
    corpus = make_corpus(tmp_path / "embeddings", rows=20_000, dim=64, shards=8)
    whole = build(corpus, uri, queries=100)["written_bytes"]
    corpus.extend("night.tar", rows=200, seed=5)
    night = build(corpus, uri, queries=100)["written_bytes"]
    assert night < 0.02 * whole


def test_a_night_reads_nothing_of_shards_that_did_not_change(corpus, uri):
    build(corpus, uri)
    for info in STORAGE.list_objects(f"{corpus.output}/parts"):
        STORAGE.delete([info.uri])  # anything that reads them would fail
    corpus.extend("night.tar", rows=10, seed=5)
    assert build(corpus, uri)["rows"] == 1210


def test_untouched_segments_are_reused_by_reference(corpus, uri):
    build(corpus, uri)
    first = read_current(uri, STORAGE).segments
    corpus.extend("night.tar", rows=10, seed=5)
    build(corpus, uri)
    assert read_current(uri, STORAGE).segments[0] == first[0]


def test_a_changed_image_replaces_its_old_row(corpus, uri):
    build(corpus, uri)
    names = [key.split("/")[1] for key in corpus.keys["shard-001.tar"]]
    vectors = np.stack([corpus.vectors[key] for key in corpus.keys["shard-001.tar"]])
    vectors[7] = vectors[7][::-1]
    contents = [f"shard-001.tar/{name}" for name in names]
    contents[7] = "another picture"
    corpus.add_shard("shard-001.tar", vectors, names=names, contents=contents)
    report = build(corpus, uri)
    assert (report["rows"], report["deleted"], report["why"]) == (1200, 1, "1 new rows as a delta")
    check_contents(corpus, uri)


def test_a_shard_that_was_replaced_twice_still_owns_its_first_rows(corpus, uri):
    build(corpus, uri)
    for every in (100, 60, 45):
        corpus.drop_rows("shard-001.tar", every=every)
        report = build(corpus, uri)
        assert report["segments"] == 1  # nothing is ever written again
        check_contents(corpus, uri)


def test_rows_that_failed_and_were_retried_are_added(corpus, uri):
    vectors = draw_vectors(20, 32, seed=4)
    shard = corpus.add_shard("late.tar", vectors, statuses={3: "unreadable"})
    build(corpus, uri)
    corpus.commit_shard("late.tar", shard, vectors)
    report = build(corpus, uri)
    assert report["why"] == "1 new rows as a delta"
    check_contents(corpus, uri)


def test_a_shard_that_is_removed_and_comes_back_is_there_again(corpus, uri):
    build(corpus, uri)
    shard = corpus.extend("tide.tar", rows=10, seed=5)
    build(corpus, uri)
    corpus.remove_shard("tide.tar")
    build(corpus, uri)
    check_contents(corpus, uri)
    corpus.commit_shard("tide.tar", shard, draw_vectors(10, 32, seed=5))  # restored as it was
    build(corpus, uri)
    check_contents(corpus, uri)


@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf-rabitq"])
def test_many_nights_are_merged_and_nothing_is_lost(tmp_path, uri, kind):
    corpus = make_corpus(tmp_path / "embeddings", rows=600, dim=32)
    build(corpus, uri, kind=kind, queries=50)
    segments = []
    for night in range(12):
        corpus.extend(f"night-{night:02d}.tar", rows=6, seed=100 + night)
        if night % 4 == 3:
            corpus.remove_shard(f"night-{night - 2:02d}.tar")
        segments.append(build(corpus, uri, kind=kind, queries=50)["segments"])
    assert max(segments) <= 9
    assert min(segments[8:]) <= 3  # merged at least once
    check_contents(corpus, uri)
    corpus.drop_rows("night-00.tar", every=3)  # owners of merged rows still know them
    build(corpus, uri, kind=kind, queries=50)
    check_contents(corpus, uri)


def test_mostly_deleted_segments_are_written_anew(corpus, uri):
    build(corpus, uri)
    corpus.drop_rows("shard-000.tar", every=2)
    corpus.drop_rows("shard-001.tar", every=2)
    report = build(corpus, uri, max_row_drop=0.5, full=False)
    assert report["deleted"] == 0
    check_contents(corpus, uri)


def test_an_index_whose_shards_were_mostly_replaced_is_built_anew(corpus, uri):
    build(corpus, uri)
    for shard in ("shard-000.tar", "shard-001.tar"):
        corpus.drop_rows(shard, every=20)
    report = build(corpus, uri)
    assert report["why"] == "50% of the rows are in shards that were replaced"
    check_contents(corpus, uri)


def test_an_index_that_outgrew_its_training_is_trained_anew(tmp_path, uri):
    corpus = make_corpus(tmp_path / "embeddings", rows=150, dim=32)
    build(corpus, uri, kind="rabitq", queries=50)
    corpus.extend("much.tar", rows=700, seed=5)
    report = build(corpus, uri, kind="rabitq", queries=50)
    assert report["why"] == "trained anew: rows grew from 150 at training to 850"
    check_contents(corpus, uri)


def test_another_kind_or_full_builds_anew(corpus, uri):
    build(corpus, uri)
    assert build(corpus, uri, full=True)["why"] == "asked for with --full"
    report = build(corpus, uri, kind="rabitq", queries=50)
    assert report["why"] == "asked for rabitq instead of flat"
    assert report["kind"] == "rabitq"


def test_an_index_without_kind_grows_into_the_next_one(corpus, uri, monkeypatch):
    monkeypatch.setattr("pipeline.index.build.kinds.AIM_MS", 0.05)
    report = build(corpus, uri, queries=50)
    assert report["kind"] == "rabitq"
    monkeypatch.setattr("pipeline.index.build.kinds.AIM_MS", 0.065)
    build(corpus, uri, full=True)
    corpus.extend("more.tar", rows=400, seed=5)
    report = build(corpus, uri, queries=50)
    assert report["why"] == "1,600 rows are too many for flat"
    assert report["kind"] == "rabitq"


def test_filters_see_new_rows(corpus, uri):
    build(corpus, uri)
    corpus.extend("new.tar", rows=20, seed=5)
    build(corpus, uri)
    where = pc.starts_with(pc.field("key"), "new.tar")
    assert len(SearchIndex.open(uri).search(np.ones(32), 100, where)[0]) == 20


# --- gates ---


def test_recall_that_misses_the_target_is_not_published(corpus, uri, monkeypatch):
    monkeypatch.setattr("pipeline.index.build.tune.CANDIDATES", (100,))
    monkeypatch.setattr(
        "pipeline.index.search.segment.Segment._rank",
        lambda self, queries, scores, *, candidates, k: (
            np.sort(scores, axis=1)[:, :k].astype(np.float64),
            candidates[:, ::-1][:, :k],
        ),
    )
    with pytest.raises(PublishError, match=r"recall@10 is 0\.\d+ .*the target 0.95.*--force"):
        build(corpus, uri, kind="rabitq", queries=50)
    assert read_current(uri, STORAGE) is None


@pytest.mark.parametrize("dim", [4, 16])
@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf-rabitq"])
def test_narrow_vectors_round_coarsely_and_find_themselves_all_the_same(tmp_path, dim, kind):
    corpus = make_corpus(tmp_path / "embeddings", rows=1200, dim=dim)
    report = build(corpus, str(tmp_path / "index"), kind=kind, queries=50)
    assert report["measured"]["self_hits"] == 1
    assert all(gate["passed"] for gate in report["gates"])


def test_a_large_drop_of_rows_is_not_published_unless_forced(corpus, uri):
    build(corpus, uri)
    before = read_current(uri, STORAGE)
    corpus.remove_shard("shard-000.tar")
    with pytest.raises(PublishError, match=r"row drop: rows go from 1,200 to 900, by 25.0%; max"):
        build(corpus, uri)
    assert read_current(uri, STORAGE) == before
    assert build(corpus, uri, force=True)["rows"] == 900
    check_contents(corpus, uri)


@pytest.mark.parametrize("name", ["index", "vectors", "keys", "order"])
def test_a_damaged_file_is_refused_by_readers(corpus, uri, name):
    build(corpus, uri)
    file = read_current(uri, STORAGE).segments[0].files[name]
    data = bytearray(STORAGE.read(f"{uri}/{file.path}"))
    data[len(data) // 2] ^= 1
    STORAGE.put(f"{uri}/{file.path}", bytes(data))
    with pytest.raises(CorruptionError, match=f"{file.path} is damaged"):
        SearchIndex.open(uri)
    STORAGE.put(f"{uri}/{file.path}", bytes(data[:-1]))
    with pytest.raises(CorruptionError, match=f"{file.path} has .* bytes, its manifest says"):
        SearchIndex.open(uri)


def test_an_unknown_key_after_its_shard_is_gone(corpus, uri):
    corpus.extend("tide.tar", rows=5, seed=5)
    build(corpus, uri)
    corpus.remove_shard("tide.tar")
    build(corpus, uri)
    with pytest.raises(UnknownKeyError):
        SearchIndex.open(uri).vector("tide.tar/000000.jpg")
