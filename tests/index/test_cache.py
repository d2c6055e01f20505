"""The cache of index files: bounded, verified, and nothing deleted that is in use."""

import gc
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.corpus import build, make_corpus
from pipeline.config import IndexConfig
from pipeline.index.cache import UNFINISHED_S, Hold, shrink
from pipeline.index.job import build_index
from pipeline.index.search.search_index import SearchIndex


def put(folder: Path, letter: str, size: int, *, age_s: float = 0) -> str:
    """Put a copy into a cache, last used some time ago; return its digest."""
    digest = letter * 64
    path = folder / digest[:2] / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age_s,) * 2)
    return digest


def list_copies(folder: Path) -> set[str]:
    return {path.name[0] for path in folder.glob("*/*") if len(path.name) >= 64}


def test_the_copies_unused_longest_go_first(tmp_path):
    for number, letter in enumerate("abcd"):
        put(tmp_path, letter, 10, age_s=100 - number)
    shrink(tmp_path, 25)
    assert list_copies(tmp_path) == {"c", "d"}


def test_what_is_held_stays_even_where_it_alone_is_too_large(tmp_path):
    hold = Hold()
    hold.add(tmp_path, put(tmp_path, "a", 10, age_s=1000))
    put(tmp_path, "b", 10)
    shrink(tmp_path, 5)
    assert list_copies(tmp_path) == {"a"}
    hold.keep_only(tmp_path, [])
    shrink(tmp_path, 5)
    assert list_copies(tmp_path) == set()


def test_a_hold_ends_with_what_held_it_and_a_copy_of_it_holds_nothing(tmp_path):
    hold = Hold()
    hold.add(tmp_path, put(tmp_path, "a", 10))
    copy = pickle.loads(pickle.dumps(hold))
    del hold
    gc.collect()
    shrink(tmp_path, 5)
    assert list_copies(tmp_path) == set()
    copy.add(tmp_path, put(tmp_path, "b", 10))
    shrink(tmp_path, 5)
    assert list_copies(tmp_path) == {"b"}


HOLDER = """
import sys
from pathlib import Path
from pipeline.index.cache import Hold
hold = Hold()
hold.add(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


def test_the_holds_of_other_processes_count_until_they_are_killed(tmp_path):
    digest = put(tmp_path, "a", 10)
    command = [sys.executable, "-c", HOLDER, str(tmp_path), digest]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    shrink(tmp_path, 5)
    assert list_copies(tmp_path) == {"a"}
    process.kill()
    process.communicate()
    shrink(tmp_path, 5)
    assert list_copies(tmp_path) == set()
    assert not list((tmp_path / "holds").iterdir())


def test_files_that_a_killed_process_was_writing_go_after_a_day(tmp_path):
    (tmp_path / "derived").mkdir()
    young, old = tmp_path / "derived" / "1.partial", tmp_path / "derived" / "2.partial"
    for path, age_s in ((young, 60), (old, UNFINISHED_S + 60)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age_s,) * 2)
    shrink(tmp_path, 10**9)
    assert (young.exists(), old.exists()) == (True, False)


@settings(max_examples=50, deadline=None)
@given(
    copies=st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=12),
    limit=st.integers(0, 300),
)
def test_a_cache_is_within_its_limit_or_holds_only_what_is_in_use(tmp_path_factory, copies, limit):
    folder, hold = tmp_path_factory.mktemp("cache"), Hold()
    for number, (size, held) in enumerate(copies):
        digest = put(folder, "0123456789ab"[number], size, age_s=100 - number)
        if held:
            hold.add(folder, digest)
    shrink(folder, limit)
    left = {"0123456789ab".index(letter) for letter in list_copies(folder)}
    in_use = {number for number, (_, held) in enumerate(copies) if held}
    assert in_use <= left
    assert sum(copies[n][0] for n in left) <= limit or left == in_use
    gone = set(range(len(copies))) - left
    assert not gone or not left - in_use or max(gone) < min(left - in_use)


@pytest.fixture
def remote(moto_server, tmp_path):
    """A remote index: what builds it again, its URI and its storage."""
    corpus = make_corpus(tmp_path / "embeddings", rows=200, dim=32)
    storage, uri = moto_server.storage(), f"{moto_server.make_bucket()}/index"

    def run(**changes):
        config = IndexConfig(
            index=uri, embeddings=corpus.output, storage=storage.options, **changes
        )
        return build_index(config)

    run(cache_dir=str(tmp_path / "builder"))
    return corpus, run, uri, storage


def test_a_service_gives_old_generations_up_and_keeps_the_open_one(remote, tmp_path):
    corpus, run, uri, storage = remote
    cache = tmp_path / "cache"
    index = SearchIndex.open(uri, storage, cache_dir=cache, cache_bytes=1)
    for night in range(2):
        corpus.extend(f"night-{night}.tar", rows=5, seed=night)
        run(full=True, cache_dir=str(tmp_path / "builder"))
        assert index.refresh()
        assert len(index.search(np.ones(32), 500)[0]) == len(corpus.vectors)
    shrink(cache, 1)
    files = index.snapshot.opened.manifest.list_files()
    assert list_files(cache)
    assert list_files(cache) <= {file.sha256 for file in files}


def list_files(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("??/*")}


def test_a_damaged_mapped_copy_of_the_keys_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.index.search.keys.MAPPED_KEYS_ROWS", 10)
    corpus = make_corpus(tmp_path / "embeddings", rows=50, dim=32)
    uri, cache = str(tmp_path / "index"), tmp_path / "cache"
    build(corpus, uri)
    SearchIndex.open(uri, cache_dir=cache)
    [copy] = (cache / "derived").iterdir()
    data = copy.read_bytes()
    name = b"shard-001.tar/000003.jpg"
    assert name in data
    copy.write_bytes(data.replace(name, b"shard-001.tar/000003.jpX"))
    assert SearchIndex.open(uri, cache_dir=cache).snapshot.find(name.decode()).row == 3
    assert [path.read_bytes() for path in (cache / "derived").iterdir()] == [data]
