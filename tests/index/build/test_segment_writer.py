"""What a segment that cannot be built leaves behind."""

from pathlib import Path

import pytest

from index.corpus import STORAGE, build, draw_vectors, make_corpus
from pipeline.errors import CorruptionError
from pipeline.index.build.rows import list_parts
from pipeline.output.commits import list_commits


def list_open_files() -> set[str]:
    """Return what this process holds open of the scratch folders of segments."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return {link for link in links if "/segment-" in link}


def test_a_build_that_fails_half_way_leaves_no_file_open(tmp_path):
    corpus = make_corpus(tmp_path, rows=300, shards=3)
    build(corpus, str(tmp_path / "index"), kind="flat")
    known = {part.path for part in list_parts(list_commits(corpus.output, STORAGE).values())}
    corpus.add_shard("later.tar", draw_vectors(50, corpus.dim, seed=9))
    parts = {part.path for part in list_parts(list_commits(corpus.output, STORAGE).values())}
    for path in parts - known:
        (tmp_path / path).unlink()
    with pytest.raises(CorruptionError, match="is missing") as caught:
        build(corpus, str(tmp_path / "index"), kind="flat")
    assert caught.value is not None  # its traceback keeps the writer: nothing closes by chance
    assert list_open_files() == set()
