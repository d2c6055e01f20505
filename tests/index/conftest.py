"""Indexes that several tests read and none changes."""

from pathlib import Path

import pytest

from index.corpus import Built, build, make_corpus

KINDS = ("flat", "rabitq", "ivf-rabitq", "ivf-sq8", "hnsw")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the caches of tests out of the user's."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def built_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """One small index of each kind, with a delta and deletions, made on first use."""
    return _LazyIndexes(tmp_path_factory.mktemp("kinds"))


class _LazyIndexes(dict[str, Built]):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, kind: str) -> Built:
        corpus = make_corpus(self._folder / kind / "embeddings", rows=2400, dim=64)
        index = str(self._folder / kind / "index")
        build(corpus, index, kind=kind, queries=200)
        corpus.extend("night.tar", rows=30, seed=7)
        corpus.drop_rows("shard-001.tar", every=50)
        build(corpus, index, kind=kind, queries=200)
        self[kind] = Built(corpus, index)
        return self[kind]


@pytest.fixture(params=KINDS)
def built(request: pytest.FixtureRequest, built_by_kind: dict[str, Built]) -> Built:
    """An index of each kind in turn."""
    return built_by_kind[request.param]


@pytest.fixture
def built_flat(built_by_kind: dict[str, Built]) -> Built:
    """A flat index."""
    return built_by_kind["flat"]
