import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from index.corpus import STORAGE, Corpus, draw_vectors
from pipeline.index.build.changes import (
    Owner,
    Range,
    decode_owners,
    digest_commit,
    encode_owners,
    find_changes,
    make_owners,
)
from pipeline.index.build.row_diff import match_rows
from pipeline.index.manifest import ShardRows
from pipeline.output.commits import list_commits


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    corpus = Corpus(str(tmp_path), 16)
    for number in range(4):
        corpus.add_shard(f"s{number}.tar", draw_vectors(6, 16, seed=number))
    return corpus


def read_commits(corpus):
    return sorted(list_commits(corpus.output, STORAGE).values(), key=lambda commit: commit.name)


def own_all(commits):
    return tuple(
        Owner({c.shard_id: digest_commit(c)}, (Range("seg", 6 * i, 6),))
        for i, c in enumerate(commits)
    )


def test_nothing_changed_is_seen_without_reading_anything(corpus):
    commits = read_commits(corpus)
    changes = find_changes(own_all(commits), commits)
    assert not changes.any
    assert len(changes.kept) == 4


def test_a_new_shard_is_added(corpus):
    owners = own_all(read_commits(corpus))
    corpus.add_shard("s9.tar", draw_vectors(6, 16, seed=9))
    changes = find_changes(owners, read_commits(corpus))
    assert [commit.name for commit in changes.added] == ["s9.tar"]
    assert (len(changes.kept), changes.gone, changes.replaced) == (4, (), ())


def test_a_removed_shard_is_gone(corpus):
    owners = own_all(read_commits(corpus))
    corpus.remove_shard("s1.tar")
    changes = find_changes(owners, read_commits(corpus))
    assert changes.gone == (owners[1],)
    assert len(changes.kept) == 3


def test_a_superseded_shard_is_compared_with_its_successor(corpus):
    owners = own_all(read_commits(corpus))
    corpus.add_shard("s1.tar", draw_vectors(6, 16, seed=9))
    changes = find_changes(owners, read_commits(corpus))
    assert changes.gone == changes.added == ()
    [replaced] = changes.replaced
    assert replaced.owners == (owners[1],)
    assert [commit.name for commit in replaced.commits] == ["s1.tar"]


def test_the_same_shard_embedded_again_is_compared_with_itself(corpus):
    commits = read_commits(corpus)
    owners = own_all(commits)
    vectors = draw_vectors(6, 16, seed=1)
    corpus.commit_shard("s1.tar", commits[1].shard_id, vectors, statuses={2: "unreadable"})
    changes = find_changes(owners, read_commits(corpus))
    assert [item.owners for item in changes.replaced] == [(owners[1],)]


def test_owners_that_one_commit_replaces_are_compared_together(corpus):
    commits = read_commits(corpus)
    shared = Owner({c.shard_id: digest_commit(c) for c in commits[:2]}, (Range("seg", 0, 12),))
    owners = (shared, *own_all(commits)[2:])
    corpus.add_shard("s1.tar", draw_vectors(6, 16, seed=9))
    changes = find_changes(owners, read_commits(corpus))
    [replaced] = changes.replaced
    assert replaced.owners == (shared,)
    assert [commit.name for commit in replaced.commits] == ["s0.tar", "s1.tar"]


def test_owners_survive_storage(corpus):
    owners = own_all(read_commits(corpus))
    assert decode_owners(encode_owners(owners)) == owners


def test_owners_are_made_of_what_was_built(corpus):
    commits = read_commits(corpus)[:2]
    first, second = commits[0].shard_id, commits[1].shard_id
    built = [
        ("a", (ShardRows(first, 0, 4, 1),)),
        ("b", (ShardRows(first, 0, 1), ShardRows(second, 1, 0, 6))),
    ]
    owners = make_owners(commits, built)
    assert owners[0].ranges == (Range("a", 0, 4), Range("b", 0, 1))
    assert (owners[0].skipped, owners[1].ranges, owners[1].skipped) == (1, (), 6)


def make_rows(**changes):
    rows = {
        "key": ["a", "b", "c"],
        "offset": [0, None, 512],
        "sha256": [b"1", b"2", b"3"],
        "tags": [[1], [2], None],
        "embedding": [[1.0], [2.0], None],
    }
    return pa.table(rows | changes)


def make_old(**changes):
    table = make_rows(**changes).drop_columns(["embedding"])
    return table.set_column(0, "key", table.column("key").cast(pa.large_string()))


@pytest.mark.parametrize(
    ("old", "same"),
    [
        ({}, [True, True, False]),  # the third has no vector
        ({"offset": [1, None, 512]}, [False, True, False]),
        ({"offset": [0, 7, 512]}, [True, False, False]),
        ({"sha256": [b"1", None, b"3"]}, [True, False, False]),
        ({"tags": [[1], [3], None]}, [True, False, False]),
        ({"key": ["a", "x", "c"]}, [True, False, False]),
    ],
)
def test_a_row_stays_only_if_all_that_is_stored_of_it_is_equal(old, same):
    found, positions = match_rows(make_rows(), make_old(**old))
    assert found.tolist() == same
    assert positions[0] == 0


def test_nothing_matches_an_empty_segment():
    found, _ = match_rows(make_rows(), pa.table({"key": pa.array([], pa.large_string())}))
    np.testing.assert_array_equal(found, [False] * 3)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.float16(), 0.5),
        (pa.float16(), math.nan),
        (pa.float64(), math.nan),
        (pa.float64(), -0.0),
        (pa.uint64(), 2**64 - 1),
        (pa.decimal128(10, 2), Decimal("1.50")),
        (pa.null(), None),
        (pa.timestamp("ns", "UTC"), 1),
        (pa.list_(pa.int16()), [1, None]),
    ],
)
def test_a_row_stays_where_its_carried_values_do_whatever_their_type(kind, value):
    carried = pa.array([value, None, value], kind)
    found, _ = match_rows(make_rows(carried=carried), make_old(carried=carried))
    assert found.tolist() == [True, True, False]


def test_a_row_is_replaced_where_a_carried_number_changes_at_all():
    old = make_old(carried=pa.array([0.0, math.nan, 1.0]))
    found, _ = match_rows(make_rows(carried=pa.array([-0.0, None, 1.0])), old)
    assert found.tolist() == [False, False, False]
