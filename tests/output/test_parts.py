"""Parts and commits: what is written comes back, and no damage goes unnoticed."""

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import (
    ConflictError,
    CorruptionError,
    LeaseError,
    ObjectMissingError,
    SettingsError,
    SpaceMismatchError,
)
from pipeline.output.commits import (
    commit_path,
    find_damaged,
    list_commits,
    list_present_commits,
    list_retired,
    prune_output,
    read_embeddings,
    renew_commit,
    restore_commit,
    retire_commit,
    split_commits,
    write_commit,
)
from pipeline.output.info import OutputInfo, claim_output, read_output_info
from pipeline.output.parts import build_part, digest_rows, encode_part, write_part
from pipeline.output.verify import verify_output
from pipeline.records import Commit, Embedding, Layout, ObjectInfo, PartInfo, Record, Space
from pipeline.storage import Storage, join_uri

STORAGE = Storage()
SPACE = Space(
    "fbnetv3_b.ra2_in1k",
    "ab" * 32,
    64,
    0.95,
    "bilinear",
    (0.5, 0.5, 0.5),
    (0.2, 0.2, 0.2),
    "apply",
    "exact",
    "fp32",
    dim=8,
)
LAYOUT = Layout(chunk_images=3, chunk_bytes=1000, carry=("txt",))
INFO = OutputInfo(
    SPACE,
    LAYOUT,
    pa.schema([pa.field("txt", pa.string())]),
    weights="weights/abababababababab.safetensors",
    weights_source="random:0 of fbnetv3_b.ra2_in1k",
)


def make_rows(count: int, *, first: int = 0) -> tuple[list[Record], list[Embedding]]:
    """Return records and embeddings, every third one failed."""
    records, embeddings = [], []
    for row in range(first, first + count):
        data = f"image {row}".encode()
        records.append(Record(f"a.tar/{row}.jpg", row, "a.tar", data, 512 * row, {"txt": "ü"}))
        if row % 3 == 2:
            embeddings.append(Embedding("truncated", "cut short", digest=bytes(16)))
        else:
            vector = np.random.default_rng(row).random(8, np.float32)
            digest = bytes([row]) * 16
            embeddings.append(Embedding("ok", None, 40, 30, digest, vector))
    return records, embeddings


def write_shard(output: str, shard_id: str = "aa", *, info: OutputInfo = INFO, **changes) -> Commit:
    """Write an output of one shard with two parts, and return its commit."""
    claim_output(output, info, STORAGE)
    parts = []
    for chunk in range(2):
        records, embeddings = make_rows(3, first=3 * chunk)
        records = [replace(r, key=f"{shard_id}/{r.row}") for r in records]
        table = build_part(records, embeddings, info.schema)
        parts.append(
            write_part(
                output,
                table,
                folder=shard_id,
                chunk=chunk,
                space_id=info.space.id,
                storage=STORAGE,
            )
        )
    name = f"{shard_id.removesuffix('-new')}.tar"
    commit = Commit(shard_id, "tar", name, "/in", name, "v1", 9, info.space.id, tuple(parts))
    commit = replace(commit, **changes)
    write_commit(output, commit, STORAGE)
    return commit


@pytest.fixture
def output(tmp_path: Path) -> str:
    uri = str(tmp_path / "out")
    write_shard(uri)
    return uri


def test_rows_come_back_as_they_were_written(output: str):
    table = read_embeddings(output).to_table()
    records, embeddings = make_rows(6)
    assert table.schema.equals(INFO.schema)
    assert table.column("row").to_pylist() == list(range(6))
    assert table.column("status").to_pylist() == [e.status for e in embeddings]
    assert table.column("nbytes").to_pylist() == [len(r.data) for r in records]
    assert table.column("txt").to_pylist() == ["ü"] * 6
    for found, embedding in zip(table.column("embedding").to_pylist(), embeddings, strict=True):
        wanted = None if embedding.vector is None else embedding.vector.tolist()
        assert found == wanted


def test_rows_without_a_commit_are_not_seen(output: str):
    Path(output, commit_path("aa")).unlink()
    assert read_embeddings(output).count_rows() == 0
    assert list_commits(output, STORAGE) == {}


def test_a_commit_survives_its_file_and_unknown_fields(output: str):
    commit = write_shard(output, "bb", supersedes=("cc",), notes={"ignored_members": 2})
    path = Path(output, commit_path("bb"))
    path.write_bytes(path.read_bytes()[:-1] + b', "colour": "red"}')
    assert list_commits(output, STORAGE)["bb"] == commit
    assert commit.statuses == {"ok": 4, "truncated": 2}


def test_the_output_record_survives_its_file(output: str):
    assert read_output_info(output, STORAGE) == INFO
    assert read_output_info(output, STORAGE).schema.equals(INFO.schema)


def test_retrying_a_chunk_changes_no_digest_but_other_rows_do():
    records, embeddings = make_rows(6)
    table = build_part(records, embeddings, INFO.schema)
    noisy = [replace(e, vector=None if e.vector is None else e.vector + 1e-7) for e in embeddings]
    assert digest_rows(build_part(records, noisy, INFO.schema)) == digest_rows(table)
    for index, change in enumerate(({"key": "other"}, {"row": 17})):
        changed = [*records[:index], replace(records[index], **change), *records[index + 1 :]]
        assert digest_rows(build_part(changed, embeddings, INFO.schema)) != digest_rows(table)
    failed = [Embedding("truncated", "cut"), *embeddings[1:]]
    assert digest_rows(build_part(records, failed, INFO.schema)) != digest_rows(table)


def test_half_precision_and_classes_are_columns_of_their_types():
    info = replace(INFO, layout=replace(LAYOUT, embedding_dtype="float16", top_k_classes=2))
    records, embeddings = make_rows(2)
    classes = (np.array([7, 3], np.int16), np.array([0.9, 0.1], np.float32))
    embeddings = [replace(embeddings[0], classes=classes), Embedding("unreadable", "x")]
    table = build_part(records, embeddings, info.schema)
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    assert table.column("class_index").to_pylist() == [[7, 3], None]
    assert table.column("embedding")[1].as_py() is None


def test_a_carried_value_that_does_not_fit_says_which_column_and_where():
    records, embeddings = make_rows(1)
    info = replace(INFO, carried=pa.schema([pa.field("txt", pa.int16())]))
    with pytest.raises(
        SettingsError, match=r"column 'txt' of a\.tar does not fit .* int16: .*leave"
    ):
        build_part(records, embeddings, info.schema)


def test_settings_of_another_output_are_refused_with_every_field_that_differs(output: str):
    other = replace(INFO, space=replace(SPACE, image_size=96, exif="ignore"))
    with pytest.raises(SpaceMismatchError) as caught:
        claim_output(output, other, STORAGE)
    assert "image_size is 64 there and 96 here" in str(caught.value)
    assert "exif is 'apply' there and 'ignore' here" in str(caught.value)
    assert claim_output(output, INFO, STORAGE) == INFO


def test_a_damaged_output_record_is_named(output: str):
    Path(output, "space.json").write_text("{}")
    with pytest.raises(CorruptionError, match=r"space\.json is not a space record"):
        read_output_info(output, STORAGE)


def test_a_damaged_commit_is_named_and_says_how_to_go_on(output: str):
    Path(output, commit_path("aa")).write_text('{"shard_id": "aa"')
    with pytest.raises(
        CorruptionError, match=r"aa\.json is not a commit .*delete it, and the next"
    ):
        list_commits(output, STORAGE)


def test_reading_where_no_output_is_says_so(tmp_path: Path):
    with pytest.raises(ObjectMissingError, match=r"no embeddings at .* run embed first"):
        read_embeddings(str(tmp_path / "nope"))
    with pytest.raises(ObjectMissingError, match=r"no embeddings at .* space\.json is missing"):
        verify_output(str(tmp_path / "nope"), STORAGE)


# Verification


def part_of(output: str, index: int = 0) -> Path:
    return sorted(Path(output, "parts").rglob("*.parquet"))[index]


def find_problem(output: str) -> str:
    problems = verify_output(output, STORAGE).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_sound_output_has_no_problems(output: str):
    report = verify_output(output, STORAGE)
    assert report.problems == ()
    assert (report.commits, report.parts, report.rows) == (1, 2, 6)
    assert report.to_dict()["statuses"] == {"ok": 4, "truncated": 2}


def test_a_missing_part_is_found(output: str):
    missing = part_of(output)
    missing.unlink()
    assert find_problem(output) == f"{missing} is missing"


def test_a_truncated_part_is_found(output: str):
    path = part_of(output)
    path.write_bytes(path.read_bytes()[:-20])
    assert find_problem(output).startswith(f"{path} ")


def test_an_empty_part_is_found(output: str):
    part_of(output).write_bytes(b"")
    assert str(part_of(output)) in find_problem(output)


def test_a_flipped_bit_in_a_vector_is_found(output: str):
    path = part_of(output)
    meta = pq.ParquetFile(path).metadata.row_group(0)
    column = next(
        meta.column(i)
        for i in range(meta.num_columns)
        if meta.column(i).path_in_schema.startswith("embedding")
    )
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(bytes(data))
    assert str(path) in find_problem(output)


def forget_digests(output: str) -> None:
    """Make the commit one from before the digests of parts were recorded."""
    commit = list_commits(output, STORAGE)["aa"]
    parts = tuple(replace(part, sha256="") for part in commit.parts)
    write_commit(output, replace(commit, parts=parts), STORAGE, replaces=commit)


def rewrite(output: str, change) -> None:
    """Write the first part anew, with another table or metadata."""
    forget_digests(output)
    path = part_of(output)
    table = pq.read_table(path)
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    table, metadata = change(table.replace_schema_metadata(None), metadata)
    path.write_bytes(encode_part(table, metadata=metadata))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: (t, m | {"space_id": "dead"}), "is of space 'dead', not"),
        (lambda t, m: (t.slice(0, 2), m), "has 2 rows, its commit says 3"),
        (lambda t, m: (t.take([1, 0, 2]), m), "does not hold the rows that its commit recorded"),
        (lambda t, m: (t.drop_columns("txt"), m), "has another schema than space.json describes"),
        (
            lambda t, m: (
                t.set_column(10, t.schema.field(10), pa.nulls(3, t.schema.field(10).type)),
                m,
            ),
            "has embeddings that do not go with their status",
        ),
    ],
)
def test_a_part_of_other_rows_schema_or_space_is_found(output: str, change, words: str):
    rewrite(output, change)
    problems = verify_output(output, STORAGE).problems
    assert any(words in problem for problem in problems), problems
    assert all(problem.startswith(str(part_of(output))) for problem in problems)


def test_a_part_of_another_chunk_in_its_place_is_found(output: str):
    part_of(output, 0).write_bytes(part_of(output, 1).read_bytes())
    assert "is damaged: it has other bytes than its commit" in find_problem(output)
    forget_digests(output)
    problems = verify_output(output, STORAGE).problems
    assert any("does not hold the rows that its commit" in problem for problem in problems)


def test_a_commit_of_another_space_is_found(output: str):
    commit = list_commits(output, STORAGE)["aa"]
    write_commit(output, replace(commit, space_id="dead"), STORAGE, replaces=commit)
    problems = verify_output(output, STORAGE).problems
    assert any("was committed for space 'dead'" in problem for problem in problems)


def test_a_key_that_two_shards_have_is_found(output: str):
    commit = list_commits(output, STORAGE)["aa"]
    write_commit(output, replace(commit, shard_id="bb"), STORAGE)
    problems = verify_output(output, STORAGE).problems
    assert len(problems) == 6
    assert "key 'aa/0' occurs more than once" in problems


# What is live


def test_a_superseded_commit_is_dead_from_the_moment_the_new_one_is_written(output: str):
    write_shard(output, "bb", supersedes=("aa",), sequence=2)
    assert set(list_commits(output, STORAGE)) == {"bb"}
    live, superseded = list_present_commits(output, STORAGE)
    assert (set(live), set(superseded)) == ({"bb"}, {"aa"})
    assert read_embeddings(output).count_rows() == 6


def test_of_two_commits_that_supersede_each_other_the_later_one_is_live():
    old = Commit("aa", "tar", "", "", "", "", 0, "", (), supersedes=("bb",), sequence=3)
    new = Commit("bb", "tar", "", "", "", "", 0, "", (), supersedes=("aa",), sequence=2)
    live, _ = split_commits({"aa": old, "bb": new})
    assert set(live) == {"aa"}


def test_a_retired_shard_is_not_read_but_can_come_back(output: str):
    commit = list_commits(output, STORAGE)["aa"]
    retire_commit(output, "aa", STORAGE)
    retire_commit(output, "aa", STORAGE)  # once more, as after a kill
    assert read_embeddings(output).count_rows() == 0
    assert list_retired(output, STORAGE) == {"aa": commit}
    renewed = renew_commit(commit, sequence=5, run_id="r", supersedes=["zz"])
    restore_commit(output, renewed, STORAGE)
    assert list_commits(output, STORAGE) == {"aa": renewed}
    assert list_retired(output, STORAGE) == {}
    assert verify_output(output, STORAGE).problems == ()


def prune(output: str) -> int:
    return prune_output(output, STORAGE, check=lambda: None)


def test_pruning_deletes_what_no_live_commit_names_and_nothing_else(output: str):
    write_shard(output, "bb")
    write_shard(output, "cc")
    retire_commit(output, "bb", STORAGE)
    Path(output, commit_path("cc")).unlink()
    # The parts of cc may be those of a process that is about to report them; bb's were committed.
    assert prune(output) == 3
    assert {p.parent.name for p in Path(output, "parts").rglob("*.parquet")} == {"aa", "cc"}
    for part in Path(output, "parts", "cc").iterdir():
        os.utime(part, (0, 0))
    assert prune(output) == 2
    assert {p.parent.name for p in Path(output, "parts").rglob("*.parquet")} == {"aa"}
    assert list_retired(output, STORAGE) == {}
    assert verify_output(output, STORAGE).problems == ()
    assert prune(output) == 0


def test_pruning_stops_before_it_deletes_anything_once_the_lease_is_lost(output: str):
    write_shard(output, "bb")
    retire_commit(output, "bb", STORAGE)

    def check() -> None:
        raise LeaseError("lost")

    with pytest.raises(LeaseError):
        prune_output(output, STORAGE, check=check)
    assert set(list_retired(output, STORAGE)) == {"bb"}
    assert len(list(Path(output, "parts").rglob("*.parquet"))) == 4


def test_a_part_of_a_retried_shard_never_takes_the_name_of_a_committed_one(output: str):
    """A process that wakes up late may write other outcomes for the same images."""
    records, embeddings = make_rows(3)
    slow = [replace(e, status="unreadable", error="too slow", vector=None) for e in embeddings]
    settings = {"folder": "aa", "chunk": 0, "space_id": SPACE.id, "storage": STORAGE}
    first = write_part(output, build_part(records, embeddings, INFO.schema), **settings)
    again = write_part(output, build_part(records, embeddings, INFO.schema), **settings)
    other = write_part(output, build_part(records, slow, INFO.schema), **settings)
    assert first == again
    assert first.path != other.path
    assert verify_output(output, STORAGE).problems == ()


def test_a_late_commit_of_a_shard_changes_nothing(output: str):
    commit = list_commits(output, STORAGE)["aa"]
    late = replace(commit, run_id="late", parts=commit.parts[:1])
    with pytest.raises(ConflictError):
        write_commit(output, late, STORAGE)
    renewed = replace(commit, run_id="retry")
    write_commit(output, renewed, STORAGE, replaces=commit)
    with pytest.raises(ConflictError, match="another run wrote to"):
        write_commit(output, late, STORAGE, replaces=commit)
    retire_commit(output, "aa", STORAGE)
    with pytest.raises(ConflictError, match="another run wrote to"):
        write_commit(output, late, STORAGE, replaces=renewed)
    assert list_retired(output, STORAGE) == {"aa": renewed}


def test_a_flipped_bit_in_a_part_is_never_read_as_a_vector(output: str):
    """Pages have checksums; a footer that lost a column's name leaves nulls, no other numbers."""
    path = part_of(output)
    whole = path.read_bytes()
    vectors = read_embeddings(output).to_table().column("embedding").to_pylist()
    noticed = 0
    for place in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        assert len(verify_output(output, STORAGE).problems) == 1
        try:
            found = read_embeddings(output).to_table().column("embedding").to_pylist()
        except (OSError, pa.ArrowException):
            noticed += 1
        else:
            pairs = zip(found, vectors, strict=True)
            assert all(vector in (None, wanted) for vector, wanted in pairs), place
    assert noticed > 50


def test_missing_and_cut_parts_are_found_by_one_listing(output: str):
    commits = {"aa": write_shard(output, "bb"), **list_commits(output, STORAGE)}
    assert find_damaged(output, commits, STORAGE) == {}
    part_of(output, 0).unlink()
    part_of(output, 2).write_bytes(part_of(output, 2).read_bytes()[:-1])
    damaged = find_damaged(output, commits, STORAGE)
    assert damaged["aa"].endswith(".parquet is missing")
    assert re.search(r"has [\d,]+ bytes, its commit says [\d,]+$", damaged["bb"])


class Replacing:
    """Replaces shards while they are being listed, each once, as a run does."""

    def __init__(self, output: str, moments: dict[str, tuple[int, str]]) -> None:
        self.output, self.moments, self.listings = output, moments, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(STORAGE, name)

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        listed = {info.uri: info for info in STORAGE.list_objects(uri)}
        for old, (listing, moment) in self.moments.items():
            if listing == self.listings:
                write_shard(self.output, f"{old}-new", supersedes=(old,), sequence=2)
                retire_commit(self.output, old, STORAGE)
                after = {info.uri: info for info in STORAGE.list_objects(uri)}
                # Pages of a listing are of different moments: each name is seen before or after.
                listed |= after if moment in ("after", "both") else {}
                if moment in ("after", "neither"):
                    listed.pop(join_uri(self.output, commit_path(old)))
        self.listings += 1
        return list(listed.values())


@given(
    st.dictionaries(
        st.sampled_from(["a", "m", "z"]),
        st.tuples(st.integers(0, 2), st.sampled_from(["before", "after", "both", "neither"])),
    )
)
@settings(max_examples=40, deadline=None)
def test_a_reader_sees_a_shard_that_is_being_replaced_in_exactly_one_version(moments):
    with tempfile.TemporaryDirectory() as folder:
        for shard_id in ("a", "m", "z"):
            write_shard(folder, shard_id)
        live = list_commits(folder, Replacing(folder, moments))
        assert sorted(shard_id.removesuffix("-new") for shard_id in live) == ["a", "m", "z"]


def test_an_empty_shard_has_a_commit_and_no_parts(output: str):
    commit = write_shard(output, "bb", parts=())
    assert list_commits(output, STORAGE)["bb"] == commit
    assert (commit.rows, commit.statuses) == (0, {})
    assert verify_output(output, STORAGE).problems == ()


def test_a_part_says_what_it_is_in_its_own_metadata(output: str):
    metadata = pq.read_schema(part_of(output, 1)).metadata
    part: PartInfo = list_commits(output, STORAGE)["aa"].parts[1]
    assert metadata[b"space_id"].decode() == SPACE.id
    assert metadata[b"chunk"] == b"1"
    assert metadata[b"rows_sha256"].decode() == part.rows_sha256
    assert part.size_bytes == part_of(output, 1).stat().st_size
