import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.corpus import STORAGE, Corpus, build, make_corpus
from pipeline.config import IndexConfig
from pipeline.errors import CorruptionError, PublishError, SettingsError
from pipeline.index.files import FileStore
from pipeline.index.garbage import find_garbage
from pipeline.index.job import build_index
from pipeline.index.pointer import (
    Current,
    Pointer,
    list_manifests,
    look_up,
    manifest_path,
    parse_manifest,
    read_current,
    read_manifest,
)
from pipeline.index.publish import Target, publish, swap_pointer
from pipeline.index.search.search_index import SearchIndex
from pipeline.storage import Storage


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make_corpus(tmp_path / "embeddings", rows=200, dim=32)


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path) -> tuple[str, Storage]:
    """An empty place for an index, on disk and on a real S3 server."""
    if request.param == "file":
        return str(tmp_path / "index"), STORAGE
    server = request.getfixturevalue("moto_server")
    return f"{server.make_bucket()}/some/index", server.storage()


def run(corpus, place, **settings):
    uri, storage = place
    config = IndexConfig(index=uri, embeddings=corpus.output, storage=storage.options, **settings)
    return build_index(config).to_dict()


def test_an_index_is_built_and_searched_wherever_it_lies(corpus, place):
    report = run(corpus, place)
    index = SearchIndex.open(*place)
    assert index.info.generation == report["generation"]
    key = "shard-001.tar/000003.jpg"
    assert index.search(corpus.vectors[key], 1)[0][0].key == key
    corpus.extend("night.tar", rows=3, seed=5)
    run(corpus, place)
    assert index.refresh() is True
    assert len(index) == 203


def test_two_publishers_race_and_exactly_one_wins(corpus, place, tmp_path):
    run(corpus, place)
    uri, storage = place
    files = FileStore(uri, storage, tmp_path / "cache")
    before = look_up(uri, storage)
    first = read_manifest(uri, before.pointer, storage)
    barrier, outcomes = threading.Barrier(8), []

    def attempt(number: int) -> None:
        name = f"000002-{number:08x}"
        manifest = replace(first, generation=name)
        barrier.wait()
        try:
            outcomes.append(publish(files, manifest, before=before).generation)
        except PublishError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(winners) == 1
    assert read_current(uri, storage).generation == winners[0]
    losers = [outcome for outcome in outcomes if isinstance(outcome, PublishError)]
    assert len(losers) == 7
    assert "another publisher was first" in str(losers[0])
    assert "run again to build on what it published" in str(losers[0])


def test_two_first_publishers_race_and_exactly_one_wins(place, tmp_path):
    files = FileStore(*place, tmp_path / "cache")
    outcomes = []
    for name in ("000001-a", "000001-b"):
        try:
            target = Target(name, "0" * 64, seq=1)
            outcomes.append(swap_pointer(files, target, Current()).generation)
        except PublishError as error:
            outcomes.append(error)
    assert outcomes[0] == "000001-a"
    assert isinstance(outcomes[1], PublishError)


def test_the_loser_of_a_race_leaves_the_winners_files_alone(corpus, tmp_path, monkeypatch):
    """Two jobs build different nights from the same parent."""
    uri = str(tmp_path / "index")
    build(corpus, uri)
    corpus.extend("one.tar", rows=3, seed=5)
    real = publish

    def let_another_win(files, manifest, *, before):
        monkeypatch.undo()
        corpus.drop_rows("shard-002.tar", every=10)
        build(corpus, uri)
        return real(files, manifest, before=before)

    monkeypatch.setattr("pipeline.index.build.update.publish", let_another_win)
    with pytest.raises(PublishError, match="another publisher was first"):
        build(corpus, uri)
    assert len(SearchIndex.open(uri)) == len(corpus.vectors)
    assert build(corpus, uri)["action"] == "unchanged"


KILLED = """
import os, sys
from pipeline.config import IndexConfig
from pipeline.index.build import update
from pipeline.index.job import build_index
from pipeline.storage import Storage

moment, index, embeddings = sys.argv[1:]
if moment == "before the manifest":
    update.publish = lambda *_, **__: os._exit(9)
else:
    from pipeline.index import publish
    publish.swap_pointer = lambda *_, **__: os._exit(9)
build_index(IndexConfig(index=index, embeddings=embeddings))
"""


@pytest.mark.parametrize("moment", ["before the manifest", "before the pointer"])
def test_a_killed_publisher_leaves_the_old_generation_serving(corpus, tmp_path, moment):
    uri = str(tmp_path / "index")
    old = build(corpus, uri)["generation"]
    corpus.extend("night.tar", rows=3, seed=5)
    command = [sys.executable, "-c", KILLED, moment, uri, corpus.output]
    assert subprocess.run(command, check=False).returncode == 9
    index = SearchIndex.open(uri)
    assert index.info.generation == old
    assert len(index.search(np.ones(32), 1000)[0]) == 200
    assert build(corpus, uri)["rows"] == 203


def test_rolling_back_serves_an_older_generation_as_a_new_publication(corpus, place):
    first = run(corpus, place)["generation"]
    corpus.extend("night.tar", rows=3, seed=5)
    second = run(corpus, place)["generation"]
    index = SearchIndex.open(*place)
    report = run(corpus, place, roll_back="previous")
    assert (report["action"], report["generation"], report["seq"]) == ("rolled back", first, 3)
    assert index.refresh() is True
    assert len(index) == 200
    run(corpus, place, roll_back=second)
    assert index.refresh() is True
    assert len(index) == 203


def roll_back_a_night(corpus, uri):
    """Return the generation that was rolled back to; another night came after it."""
    first = build(corpus, uri)["generation"]
    corpus.extend("night.tar", rows=3, seed=5)
    build(corpus, uri)
    build(corpus, uri, roll_back="previous")
    corpus.extend("later.tar", rows=2, seed=6)
    return first


def test_a_roll_back_holds_through_nights_until_it_is_unpinned(corpus, tmp_path):
    uri = str(tmp_path / "index")
    first = roll_back_a_night(corpus, uri)
    for _ in range(2):
        report = build(corpus, uri)
        assert (report["action"], report["generation"], report["rows"]) == ("pinned", first, 200)
        assert "pass --unpin once to go on from it, or --full" in report["why"]
        assert len(SearchIndex.open(uri)) == 200
    assert build(corpus, uri, unpin=True)["rows"] == 205
    assert build(corpus, uri)["action"] == "unchanged"


@pytest.mark.parametrize("setting", ["full", "force"])
def test_full_and_force_end_a_roll_back_too(corpus, tmp_path, setting):
    uri = str(tmp_path / "index")
    roll_back_a_night(corpus, uri)
    assert build(corpus, uri, **{setting: True})["rows"] == 205
    assert build(corpus, uri)["action"] == "unchanged"


def test_unpinning_without_anything_new_publishes_no_other_generation(corpus, tmp_path):
    uri = str(tmp_path / "index")
    build(corpus, uri)
    first = build(corpus, uri, full=True)["generation"]
    build(corpus, uri, full=True)
    build(corpus, uri, roll_back=first)
    report = build(corpus, uri, unpin=True)
    assert (report["action"], report["generation"]) == ("unpinned", first)
    assert build(corpus, uri)["action"] == "unchanged"


def test_a_roll_back_during_a_build_wins(corpus, tmp_path, monkeypatch):
    uri = str(tmp_path / "index")
    first = build(corpus, uri)["generation"]
    corpus.extend("one.tar", rows=3, seed=5)
    build(corpus, uri)
    corpus.extend("two.tar", rows=3, seed=6)
    real = publish

    def roll_back_first(files, manifest, *, before):
        build(corpus, uri, roll_back="previous")
        return real(files, manifest, before=before)

    monkeypatch.setattr("pipeline.index.build.update.publish", roll_back_first)
    with pytest.raises(PublishError, match="another publisher was first"):
        build(corpus, uri)
    assert SearchIndex.open(uri).info.generation == first
    assert build(corpus, uri)["action"] == "pinned"


def test_rolling_back_to_what_is_not_there_lists_what_is(corpus, tmp_path):
    uri = str(tmp_path / "index")
    with pytest.raises(SettingsError, match="CURRENT is missing"):
        build(corpus, uri, roll_back="previous")
    generation = build(corpus, uri)["generation"]
    with pytest.raises(SettingsError, match=f"no generation '7' at .*there are: {generation}"):
        build(corpus, uri, roll_back="7")
    with pytest.raises(SettingsError, match=f"no generation before {generation} to roll back"):
        build(corpus, uri, roll_back="previous")


def list_generations(uri, storage):
    return list_manifests(uri, [info.uri for info in storage.list_objects(uri)])


def make_old(folder: Path, hours: float = 100) -> None:
    then = time.time() - hours * 3600
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def test_garbage_is_what_no_kept_generation_needs(corpus, tmp_path):
    uri = str(tmp_path / "index")
    build(corpus, uri)
    for night in range(3):
        corpus.extend(f"night-{night}.tar", rows=3, seed=night)
        build(corpus, uri, full=True, knn=2)
    make_old(tmp_path / "index")
    listed = build(corpus, uri, collect_garbage="list", keep_generations=2)
    assert listed["action"] == "garbage listed"
    assert len(listed["generations"]) == 2
    assert len(list_generations(uri, STORAGE)) == 4
    deleted = build(corpus, uri, collect_garbage="delete", keep_generations=2)
    assert deleted["objects"] == listed["objects"] > 10
    assert len(list_generations(uri, STORAGE)) == 2
    assert len(SearchIndex.open(uri)) == len(corpus.vectors)
    build(corpus, uri, roll_back="previous")
    assert len(SearchIndex.open(uri)) == len(corpus.vectors) - 3
    exports = STORAGE.list_objects(f"{uri}/exports")
    assert {info.uri.split("/")[-3] for info in exports} == set(list_generations(uri, STORAGE))


def test_nothing_young_is_garbage(corpus, tmp_path):
    uri = str(tmp_path / "index")
    build(corpus, uri)
    build(corpus, uri, full=True)
    STORAGE.put(f"{uri}/segments/half-built/index.faiss", b"x")
    assert build(corpus, uri, collect_garbage="list", keep_generations=1)["objects"] == 0


def test_a_dry_run_deletes_nothing(corpus, tmp_path):
    uri = str(tmp_path / "index")
    build(corpus, uri)
    build(corpus, uri, full=True)
    make_old(tmp_path / "index")
    settings = {"collect_garbage": "delete", "keep_generations": 1, "dry_run": True}
    report = build(corpus, uri, **settings)
    assert report["action"] == "garbage listed"
    assert report["objects"] > 0
    assert len(list_generations(uri, STORAGE)) == 2


def test_manifests_and_markers_are_deleted_before_what_they_name(corpus, tmp_path):
    uri = str(tmp_path / "index")
    build(corpus, uri)
    corpus.extend("night.tar", rows=30, seed=5)
    build(corpus, uri, full=True)
    make_old(tmp_path / "index")
    found = find_garbage(uri, keep=1, min_age_s=0, storage=STORAGE)
    names = [Path(item).name for item in found.uris]
    assert sorted(names[:3]) == ["manifest.json", "segment.json", "training.json"]
    assert not {"manifest.json", "segment.json", "training.json"}.intersection(names[3:])
    with pytest.raises(SettingsError, match="CURRENT is missing"):
        find_garbage(str(tmp_path / "none"), keep=1, min_age_s=0, storage=STORAGE)


def test_a_tampered_manifest_or_pointer_is_refused(corpus, tmp_path):
    uri = str(tmp_path / "index")
    generation = build(corpus, uri)["generation"]
    path = f"{uri}/{manifest_path(generation)}"
    data = STORAGE.read(path)
    STORAGE.put(path, data.replace(b'"rows": 200', b'"rows": 201'))
    with pytest.raises(CorruptionError, match="its digest differs from CURRENT's"):
        SearchIndex.open(uri)
    STORAGE.delete([path])
    with pytest.raises(CorruptionError, match=r"manifest.json is missing; run the index job again"):
        SearchIndex.open(uri)
    STORAGE.put(f"{uri}/CURRENT", b"not json")
    with pytest.raises(CorruptionError, match="is not a pointer"):
        SearchIndex.open(uri)


def test_a_manifest_of_a_newer_format_asks_for_a_newer_program(corpus, tmp_path):
    uri = str(tmp_path / "index")
    generation = build(corpus, uri)["generation"]
    data = STORAGE.read(f"{uri}/{manifest_path(generation)}")
    newer = data.replace(b'"format": 1', b'"format": 2')
    with pytest.raises(CorruptionError, match="has format 2; this program reads 1; upgrade"):
        parse_manifest(newer, "m")
    with pytest.raises(CorruptionError, match="m is not a manifest"):
        parse_manifest(b"[]", "m")
    with pytest.raises(CorruptionError, match="m is not a manifest"):
        parse_manifest(b'{"format": 1}', "m")


def test_manifests_and_pointers_survive_storage(corpus, tmp_path):
    uri = str(tmp_path / "index")
    build(corpus, uri, kind="ivf-rabitq", queries=50)
    corpus.drop_rows("shard-002.tar", every=10)
    build(corpus, uri, kind="ivf-rabitq", queries=50)
    manifest = read_current(uri, STORAGE)
    assert manifest.tombstones
    assert parse_manifest(manifest.to_json(), "m") == manifest
    pointer = Pointer(3, "000003-x", "0" * 64)
    assert Pointer.from_json(pointer.to_json()) == pointer
