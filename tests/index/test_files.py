import numpy as np
import pytest

from index.corpus import build, make_corpus
from pipeline.config import IndexConfig
from pipeline.errors import CorruptionError
from pipeline.index.files import FileStore, describe_file
from pipeline.index.job import build_index
from pipeline.index.search.search_index import SearchIndex


@pytest.fixture
def remote(moto_server, tmp_path):
    """A remote index: its URI, storage, cache and manifest."""
    corpus = make_corpus(tmp_path / "embeddings", rows=200, dim=32)
    storage = moto_server.storage()
    uri = f"{moto_server.make_bucket()}/index"
    build_index(IndexConfig(index=uri, embeddings=corpus.output, storage=storage.options))
    return uri, storage, tmp_path / "cache"


def test_a_remote_index_is_copied_once_and_verified_every_time(remote):
    uri, storage, cache = remote
    index = SearchIndex.open(uri, storage, cache_dir=cache)
    info = index.snapshot.opened.segments[0].info
    copies = {path.name for path in cache.rglob("*") if path.is_file()}
    assert {info.files[name].sha256 for name in ("index", "vectors", "keys")} <= copies
    for name in ("index", "vectors", "keys", "order"):
        storage.delete([f"{uri}/{info.files[name].path}"])
    assert len(SearchIndex.open(uri, storage, cache_dir=cache).search(np.ones(32))[0]) == 10


def test_a_damaged_copy_is_fetched_again(remote):
    uri, storage, cache = remote
    index = SearchIndex.open(uri, storage, cache_dir=cache)
    sha256 = index.snapshot.opened.segments[0].info.files["vectors"].sha256
    [copy] = cache.rglob(sha256)
    copy.write_bytes(b"x" + copy.read_bytes()[1:])
    SearchIndex.open(uri, storage, cache_dir=cache)
    assert FileStore(uri, storage, cache)
    assert copy.read_bytes()[:1] != b"x"


def test_a_remote_file_that_was_tampered_with_is_refused_and_not_kept(remote):
    uri, storage, cache = remote
    index = SearchIndex.open(uri, storage, cache_dir=cache / "a")
    file = index.snapshot.opened.segments[0].info.files["index"]
    data = bytearray(storage.read(f"{uri}/{file.path}"))
    data[-1] ^= 1
    storage.put(f"{uri}/{file.path}", bytes(data))
    with pytest.raises(CorruptionError, match=r"index.faiss is damaged"):
        SearchIndex.open(uri, storage, cache_dir=cache / "b")
    assert not list((cache / "b").rglob(file.sha256))
    storage.delete([f"{uri}/{file.path}"])
    with pytest.raises(CorruptionError, match=r"index.faiss is missing"):
        SearchIndex.open(uri, storage, cache_dir=cache / "b")


def test_a_local_index_is_used_in_place(tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=50, dim=32)
    build(corpus, str(tmp_path / "index"))
    SearchIndex.open(str(tmp_path / "index"), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_is_described_by_size_and_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    info = describe_file(tmp_path / "x", "segments/x")
    assert (info.path, info.size_bytes, info.sha256[:8]) == ("segments/x", 3, "ba7816bf")


def test_long_key_tables_are_mapped_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.index.search.keys.MAPPED_KEYS_ROWS", 10)
    corpus = make_corpus(tmp_path / "embeddings", rows=50, dim=32)
    build(corpus, str(tmp_path / "index"))
    for _ in range(2):
        index = SearchIndex.open(str(tmp_path / "index"), cache_dir=tmp_path / "cache")
        assert index.snapshot.find("shard-001.tar/000003.jpg").row == 3
    assert len(list((tmp_path / "cache" / "derived").iterdir())) == 1
