"""Writes of ``CURRENT`` and of manifests that take effect although their reply is lost."""

import itertools
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from index.corpus import STORAGE, Corpus, build, make_corpus
from pipeline.config import IndexConfig
from pipeline.index.job import build_index
from pipeline.index.pointer import look_up
from pipeline.index.search.search_index import SearchIndex
from pipeline.storage.local import LocalStore

SETTINGS = {"kind": "flat", "queries": 10}
COLLECT = {"collect_garbage": "delete", "keep_generations": 1, "min_age_hours": 0}


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("pipeline.storage.retry"), "FIRST_WAIT_S", 0.001)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "embeddings", rows=40, dim=8)


def lose_reply(patch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Let the n-th write of a file fail after it took effect; return what is written."""
    real, written = LocalStore.put, []

    def put(self: LocalStore, uri: str, data: bytes) -> None:
        written.append(uri)
        real(self, uri, data)
        if len(written) == nth:
            raise TimeoutError("the reply was lost")

    patch.setattr(LocalStore, "put", put)
    return written


def lose_reply_beside_a_collection(patch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Let the n-th write of ``CURRENT`` fail after it took effect and a collection began on it."""
    real, written = LocalStore.put_if, []

    def put_if(self: LocalStore, uri: str, data: bytes, **condition: Any) -> str:
        version = real(self, uri, data, **condition)
        if uri.endswith("CURRENT"):
            written.append(uri)
            if len(written) == nth:
                announce_collection(uri.removesuffix("/CURRENT"))
                raise TimeoutError("the reply was lost")
        return version

    patch.setattr(LocalStore, "put_if", put_if)
    return written


def announce_collection(uri: str) -> None:
    """Change ``CURRENT`` as a collection does before it deletes anything."""
    current = look_up(uri, STORAGE)
    if current.pointer is not None:
        announced = replace(current.pointer, collections=current.pointer.collections + 1)
        STORAGE.put_if_version(f"{uri}/CURRENT", announced.to_json(), current.version)


def prepare_nothing(corpus: Corpus, uri: str) -> None:
    pass


def prepare_night(corpus: Corpus, uri: str) -> None:
    build(corpus, uri, **SETTINGS)
    corpus.extend("night.tar", rows=3, seed=3)


def prepare_two(corpus: Corpus, uri: str) -> None:
    prepare_night(corpus, uri)
    build(corpus, uri, full=True, **SETTINGS)


JOBS = {
    "first build": (prepare_nothing, SETTINGS),
    "full build": (prepare_night, {**SETTINGS, "full": True}),
    "increment": (prepare_night, SETTINGS),
    "roll-back": (prepare_two, {"roll_back": "previous"}),
    "collection": (prepare_two, COLLECT),
}


@pytest.mark.parametrize("lose", [lose_reply, lose_reply_beside_a_collection])
@pytest.mark.parametrize(("prepare", "settings"), JOBS.values(), ids=JOBS)
def test_a_job_whose_write_loses_its_reply_ends_as_if_it_had_not(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare, settings, lose
):
    prepared = tmp_path / "prepared"
    prepare(corpus, str(prepared))
    expected = run_job(corpus, prepared, tmp_path / "expected", settings)
    for nth in itertools.count(1):
        with monkeypatch.context() as patch:
            written = lose(patch, nth)
            found = run_job(corpus, prepared, tmp_path / f"index-{nth}", settings)
        assert found == expected
        if len(written) < nth:
            break
    assert nth > 1


def run_job(corpus: Corpus, prepared: Path, place: Path, settings: dict) -> tuple:
    """Run a job in a copy of an index; return what it did, what serves then, what lies there."""
    if prepared.exists():
        shutil.copytree(prepared, place)
    action = build(corpus, str(place), **settings)["action"]
    index = SearchIndex.open(str(place))
    assert build_index(IndexConfig(index=str(place), verify=True)).action == "verified"
    left = [str(path.relative_to(place)) for path in place.glob("collections/*")]
    seq = look_up(str(place), STORAGE).pointer.seq
    return action, seq, sorted(item.key for item in index.snapshot.sample(1000)), left
