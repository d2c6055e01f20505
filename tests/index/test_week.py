"""A week of nights: what is in the index after each is exactly what is committed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.corpus import STORAGE, Corpus, build, check_healthy, draw_vectors, make_corpus
from pipeline.config import IndexConfig
from pipeline.errors import PublishError
from pipeline.index.build import seal
from pipeline.index.files import FileStore
from pipeline.index.map import read_map
from pipeline.index.pointer import read_current
from pipeline.index.search.search_index import SearchIndex
from pipeline.nightly import describe_index

SETTINGS = {"kind": "rabitq", "queries": 40}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "embeddings", rows=400, dim=16, shards=8)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "index")


def read_points(uri: str) -> tuple[str, ...]:
    """Return the keys that the stored map of the generation that serves shows."""
    manifest = read_current(uri, STORAGE)
    assert manifest is not None
    points = read_map(manifest.map, FileStore(uri, STORAGE, Path("unused")))
    return points.keys if points else ()


def change_image(corpus: Corpus, name: str, place: int) -> None:
    """Replace one image of a shard by another picture under the same key."""
    names = [key.split("/", 1)[1] for key in corpus.keys[name]]
    vectors = np.stack([corpus.vectors[key] for key in corpus.keys[name]])
    vectors[place] = draw_vectors(1, corpus.dim, seed=99)[0]
    contents = [f"{name}/{item}" for item in names]
    contents[place] = "another picture"
    corpus.add_shard(name, vectors, names=names, contents=contents)


def drop_shown(corpus: Corpus, uri: str, name: str) -> list[str]:
    """Delete an image that the map shows."""
    shown = [key for key in read_points(uri) if key.startswith(f"{name}/")][:1]
    keep = [row for row, key in enumerate(corpus.keys[name]) if key not in shown]
    names = [corpus.keys[name][row].split("/", 1)[1] for row in keep]
    vectors = np.stack([corpus.vectors[corpus.keys[name][row]] for row in keep])
    corpus.add_shard(name, vectors, names=names, rows=keep)
    return shown


def test_a_week_of_nights_holds_exactly_what_is_committed(corpus, uri, monkeypatch):
    build(corpus, uri, **SETTINGS)
    gone: list[str] = []
    nights: dict[str, Callable[[], object]] = {
        "adds": lambda: corpus.extend("monday.tar", rows=12, seed=1),
        "changes": lambda: change_image(corpus, "shard-001.tar", 3),
        "deletes an image of the map": lambda: gone.extend(
            drop_shown(corpus, uri, "shard-002.tar")
        ),
        "brings nothing": lambda: None,
        "is killed": lambda: corpus.extend("friday.tar", rows=7, seed=2),
        "deletes a shard": lambda: corpus.remove_shard("monday.tar"),
        "does all at once": lambda: (
            corpus.extend("sunday.tar", rows=5, seed=3),
            change_image(corpus, "shard-004.tar", 0),
            gone.extend(drop_shown(corpus, uri, "shard-005.tar")),
        ),
    }
    for name, happens in nights.items():
        happens()
        if name == "is killed":
            with monkeypatch.context() as patched:
                patched.setattr("pipeline.index.publish.swap_pointer", die)
                with pytest.raises(KeyboardInterrupt):
                    build(corpus, uri, **SETTINGS)
            continue  # the next night does both
        report = build(corpus, uri, **SETTINGS)
        assert report["action"] == ("unchanged" if name == "brings nothing" else "added"), name
        check_healthy(corpus, uri, **SETTINGS)
        assert set(read_points(uri)) <= set(corpus.vectors), name
        section = describe_index(IndexConfig(index=uri))
        assert {image.key for image in section.map} <= set(corpus.vectors), name
    assert len(gone) == 2


def die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_changed_image_leaves_its_old_place_on_the_map(corpus, uri):
    build(corpus, uri, **SETTINGS)
    key = corpus.keys["shard-001.tar"][3]
    assert key in read_points(uri)
    change_image(corpus, "shard-001.tar", 3)
    build(corpus, uri, **SETTINGS)
    assert key not in read_points(uri)
    assert len(read_points(uri)) == 399


def test_a_map_that_has_lost_too_much_is_drawn_anew_from_live_rows(corpus, uri):
    build(corpus, uri, **SETTINGS)
    for number in (0, 1):
        corpus.drop_rows(f"shard-00{number}.tar", every=2)
        build(corpus, uri, **SETTINGS)
    assert set(read_points(uri)) == set(corpus.vectors)


def test_a_map_of_an_older_program_shows_no_dead_points(corpus, uri, monkeypatch):
    """Such a program took its parent's map over as it was."""
    build(corpus, uri, **SETTINGS)
    dead = drop_shown(corpus, uri, "shard-002.tar")
    monkeypatch.setattr(
        "pipeline.index.build.increment.take_over_map", lambda files, parent, dead: parent.map
    )
    build(corpus, uri, **SETTINGS)
    assert set(dead) <= set(read_points(uri))
    shown = SearchIndex.open(uri).snapshot.opened.map
    assert set(shown.keys) == set(corpus.vectors)
    section = describe_index(IndexConfig(index=uri))
    assert {image.key for image in section.map} <= set(corpus.vectors)


def test_a_map_that_cannot_be_drawn_stops_nothing(corpus, uri, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("pipeline.index.map.project_pca", fail)
    assert build(corpus, uri, **SETTINGS)["action"] == "built"
    assert "without a map of the collection: RuntimeError: no compiler" in caplog.text
    assert SearchIndex.open(uri).snapshot.opened.map is None
    assert describe_index(IndexConfig(index=uri)).map == []
    assert build(corpus, uri, **SETTINGS)["action"] == "unchanged"


def test_a_lost_map_does_not_keep_an_index_from_being_searched(corpus, uri):
    build(corpus, uri, **SETTINGS)
    Path(uri, read_current(uri, STORAGE).map.path).write_bytes(b"garbage")
    assert len(SearchIndex.open(uri).search(np.ones(16), 5)[0]) == 5
    assert build(corpus, uri, **SETTINGS)["why"] == "nothing new; deletions only"
    assert set(read_points(uri)) == set(corpus.vectors)


@pytest.mark.parametrize("gate", ["self-hits", "recall", "rows"])
def test_a_gate_that_training_anew_can_mend_leads_to_it_once(corpus, uri, monkeypatch, gate):
    build(corpus, uri, **SETTINGS)
    corpus.extend("night.tar", rows=10, seed=4)
    real, calls = seal.list_gates, []

    def refuse_first(*args: object, **settings: object) -> list[object]:
        calls.append(args)
        gates = real(*args, **settings)
        failing = len(calls) == 1
        return [
            replace(g, passed=False, detail=f"{gate} drifted") if failing and g.name == gate else g
            for g in gates
        ]

    monkeypatch.setattr("pipeline.index.build.seal.list_gates", refuse_first)
    report = build(corpus, uri, **SETTINGS)
    assert report["why"] == f"trained anew: {gate} drifted"
    assert len(calls) == 2
    check_healthy(corpus, uri, **SETTINGS)


def test_a_gate_that_training_anew_does_not_mend_refuses_after_one_try(corpus, uri, monkeypatch):
    before = build(corpus, uri, **SETTINGS)["generation"]
    corpus.extend("night.tar", rows=10, seed=4)
    real, calls = seal.list_gates, []

    def refuse(*args: object, **settings: object) -> list[object]:
        calls.append(args)
        gates = real(*args, **settings)
        return [replace(gate, passed=gate.name != "self-hits") for gate in gates]

    monkeypatch.setattr("pipeline.index.build.seal.list_gates", refuse)
    with pytest.raises(PublishError, match=r"self-hits: .*--force publishes all the same"):
        build(corpus, uri, **SETTINGS)
    assert len(calls) == 2
    assert SearchIndex.open(uri).info.generation == before
    assert build(corpus, uri, force=True, **SETTINGS)["rows"] == 410
    monkeypatch.undo()
    check_healthy(corpus, uri, **SETTINGS)
