"""Garbage collection: what goes, what stays, and who may do what at the same time."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from index.corpus import STORAGE, Corpus, build, check_healthy, make_corpus
from pipeline.errors import CorruptionError, PublishError, SettingsError
from pipeline.index import garbage
from pipeline.index.pointer import look_up, manifest_path, read_current
from pipeline.index.publish import publish
from pipeline.index.search.search_index import SearchIndex
from pipeline.storage import Storage
from pipeline.storage.hidden import name_unfinished

SETTINGS = {"kind": "rabitq", "queries": 30}
COLLECT = {"collect_garbage": "delete", "keep_generations": 1, "min_age_hours": 0}


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make_corpus(tmp_path / "embeddings", rows=120, dim=16)


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "index")


def list_names(uri: str) -> list[str]:
    return sorted(path.parent.name for path in Path(uri).glob("generations/*/manifest.json"))


def interrupt(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[], object], *, before_call: int = 1
) -> None:
    """Do something else just before garbage collection deletes for the n-th time."""
    real, calls = Storage.delete, []

    def delete(self: Storage, uris: object) -> None:
        calls.append(uris)
        if len(calls) == before_call:
            monkeypatch.undo()
            action()
        real(self, uris)

    monkeypatch.setattr(Storage, "delete", delete)


def build_twice(corpus: Corpus, uri: str) -> tuple[str, str]:
    """Two generations that share nothing."""
    first = build(corpus, uri, **SETTINGS)["generation"]
    corpus.extend("night.tar", rows=4, seed=1)
    return first, build(corpus, uri, full=True, **SETTINGS)["generation"]


@pytest.mark.parametrize("before_call", [1, 2])
def test_a_roll_back_to_what_is_being_deleted_is_refused(corpus, uri, monkeypatch, before_call):
    first, second = build_twice(corpus, uri)
    refusals = []

    def roll_back() -> None:
        with pytest.raises((PublishError, SettingsError)) as caught:
            build(corpus, uri, roll_back=first)
        refusals.append(str(caught.value))

    interrupt(monkeypatch, roll_back, before_call=before_call)
    build(corpus, uri, **COLLECT)
    assert len(refusals) == 1
    assert SearchIndex.open(uri).info.generation == second
    check_healthy(corpus, uri, **SETTINGS)


def test_a_roll_back_that_had_begun_before_the_collection_finds_out_in_time(
    corpus, uri, monkeypatch
):
    first, second = build_twice(corpus, uri)
    # Between reading all files and swapping the pointer: the swap looks at CURRENT once more.
    swap = Storage.put_if_version

    def put_if_version(self, target, data, version):
        monkeypatch.undo()
        build(corpus, uri, **COLLECT)
        return swap(self, target, data, version)

    monkeypatch.setattr(Storage, "put_if_version", put_if_version)
    with pytest.raises(PublishError, match=r"garbage collection deletes what it needs .*run again"):
        build(corpus, uri, roll_back=first)
    assert SearchIndex.open(uri).info.generation == second
    check_healthy(corpus, uri, **SETTINGS)


def test_a_collection_that_finds_another_generation_published_deletes_nothing(
    corpus, uri, monkeypatch
):
    first, _ = build_twice(corpus, uri)
    real = garbage.find_garbage

    def roll_back_after(*args, **settings):
        found = real(*args, **settings)
        build(corpus, uri, roll_back=first)
        return found

    monkeypatch.setattr("pipeline.index.job.find_garbage", roll_back_after)
    before = len(STORAGE.list_objects(uri))
    with pytest.raises(PublishError, match=r"nothing was deleted: .* run again"):
        build(corpus, uri, **COLLECT)
    assert len(STORAGE.list_objects(uri)) == before
    monkeypatch.undo()
    build(corpus, uri, **COLLECT)  # as it says
    assert SearchIndex.open(uri).info.generation == first


def test_a_build_that_reuses_what_is_collected_meanwhile_is_refused_and_then_runs(
    corpus, uri, monkeypatch
):
    build_twice(corpus, uri)
    corpus.remove_shard("night.tar")  # a full build finds the first generation's files again

    def collect_first(files, manifest, *, before):
        monkeypatch.undo()
        build(corpus, uri, **COLLECT)
        return publish(files, manifest, before=before)

    monkeypatch.setattr("pipeline.index.build.update.publish", collect_first)
    with pytest.raises(PublishError, match=r"garbage collection deletes what it needs .*run again"):
        build(corpus, uri, full=True, **SETTINGS)
    build(corpus, uri, full=True, **SETTINGS)
    check_healthy(corpus, uri, **SETTINGS)


def test_a_build_lets_a_collection_pass_that_takes_nothing_from_it(corpus, uri, monkeypatch):
    build_twice(corpus, uri)
    corpus.extend("later.tar", rows=3, seed=2)

    def collect_first(files, manifest, *, before):
        monkeypatch.undo()
        build(corpus, uri, **(COLLECT | {"min_age_hours": 0.0001}))
        return publish(files, manifest, before=before)

    make_old(uri)
    monkeypatch.setattr("pipeline.index.build.update.publish", collect_first)
    build(corpus, uri, **SETTINGS)
    check_healthy(corpus, uri, **SETTINGS)


@pytest.mark.parametrize("before_call", [1, 2, 3])
def test_a_collection_that_is_killed_is_finished_by_the_next(corpus, uri, monkeypatch, before_call):
    build_twice(corpus, uri)

    def die() -> None:
        raise KeyboardInterrupt

    interrupt(monkeypatch, die, before_call=before_call)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, uri, **COLLECT)
    corpus.extend("later.tar", rows=3, seed=2)
    build(corpus, uri, **SETTINGS)
    check_healthy(corpus, uri, **SETTINGS)
    build(corpus, uri, full=True, **SETTINGS)
    check_healthy(corpus, uri, **SETTINGS)
    build(corpus, uri, **COLLECT)
    check_healthy(corpus, uri, **SETTINGS)
    assert len(list_names(uri)) == 1
    assert not look_up(uri, STORAGE).pointer.doomed
    needed = {f"{uri}/{file.path}" for file in read_current(uri, STORAGE).list_files()}
    markers = {"CURRENT", "manifest.json", "segment.json", "training.json"}
    left = {i.uri for i in STORAGE.list_objects(uri) if Path(i.uri).name not in markers}
    assert left == needed


def test_builds_that_died_do_not_count_as_the_newest(corpus, uri, monkeypatch):
    first, second = build_twice(corpus, uri)

    def die(*_, **__):
        raise KeyboardInterrupt

    for seed in range(3):
        corpus.extend(f"dead-{seed}.tar", rows=3, seed=seed)
        monkeypatch.setattr("pipeline.index.publish.swap_pointer", die)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, uri, **SETTINGS)
        monkeypatch.undo()
    assert len(list_names(uri)) == 5
    make_old(uri)
    build(corpus, uri, collect_garbage="delete", keep_generations=2)
    assert list_names(uri) == [first, second]
    build(corpus, uri, roll_back="previous")
    assert SearchIndex.open(uri).info.generation == first


def test_every_generation_has_a_number_of_its_own(corpus, uri, monkeypatch):
    build(corpus, uri, **SETTINGS)

    def die(*_, **__):
        raise KeyboardInterrupt

    corpus.extend("night.tar", rows=3, seed=1)
    monkeypatch.setattr("pipeline.index.publish.swap_pointer", die)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, uri, **SETTINGS)
    monkeypatch.undo()
    build(corpus, uri, **SETTINGS)
    Path(uri, "CURRENT").unlink()
    corpus.extend("later.tar", rows=3, seed=2)
    build(corpus, uri, **SETTINGS)
    numbers = [int(name.split("-")[0]) for name in list_names(uri)]
    assert numbers == [1, 2, 3, 4]
    assert look_up(uri, STORAGE).pointer.seq == 4


def test_the_loser_of_a_race_takes_its_manifest_away(corpus, uri, monkeypatch):
    build(corpus, uri, **SETTINGS)
    corpus.extend("one.tar", rows=3, seed=5)

    def let_another_win(files, manifest, *, before):
        monkeypatch.undo()
        build(corpus, uri, **SETTINGS)
        return publish(files, manifest, before=before)

    monkeypatch.setattr("pipeline.index.build.update.publish", let_another_win)
    with pytest.raises(PublishError, match="run again to build on what it published"):
        build(corpus, uri, **SETTINGS)
    assert len(list_names(uri)) == 2
    assert build(corpus, uri, **SETTINGS)["action"] == "unchanged"


def test_unfinished_files_of_killed_writers_go_when_they_are_old(corpus, uri):
    segment = build(corpus, uri, **SETTINGS) and read_current(uri, STORAGE).segments[0]
    folder = Path(uri, segment.files["keys"].path).parent
    old, young = folder / name_unfinished(), folder / name_unfinished()
    old.write_bytes(b"half")
    make_old(uri)
    young.write_bytes(b"half")
    report = build(corpus, uri, collect_garbage="delete")
    assert (report["objects"], report["bytes"]) == (1, 4)
    assert (old.exists(), young.exists()) == (False, True)
    check_healthy(corpus, uri, **SETTINGS)


def test_a_damaged_index_is_mended_before_its_garbage_is_collected(corpus, uri):
    build_twice(corpus, uri)
    for path in ("CURRENT", manifest_path(look_up(uri, STORAGE).pointer.generation)):
        data = Path(uri, path).read_bytes()
        Path(uri, path).write_bytes(b"")
        with pytest.raises(CorruptionError, match="run the index job again"):
            build(corpus, uri, **COLLECT)
        Path(uri, path).write_bytes(data)
    check_healthy(corpus, uri, **SETTINGS)


def make_old(uri: str, hours: float = 100) -> None:
    then = time.time() - hours * 3600
    for path in Path(uri).rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))
