"""The values that cross the borders between stages."""

import json
import pickle
from dataclasses import fields, replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecordError
from pipeline.records import (
    PART_COLUMNS,
    STATUSES,
    Commit,
    Layout,
    Member,
    PartInfo,
    Space,
    count_statuses,
    digest_json,
    part_schema,
)

SPACE = Space(
    "resnetv2_50.a1h_in1k",
    "0f" * 32,
    224,
    0.95,
    "bicubic",
    (0.5, 0.5, 0.5),
    (0.25, 0.25, 0.25),
    "apply",
    "exact",
    "fp32",
    dim=2048,
    versions={"pillow": "13.0.0"},
)
LAYOUT = Layout(chunk_images=256, chunk_bytes=2**26)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.floats(0, 1))))
def test_a_digest_depends_on_the_content_and_not_on_the_order(value: dict[str, object]):
    turned = dict(reversed(list(value.items())))
    assert digest_json(value) == digest_json(turned)
    assert digest_json(value) != digest_json([value])
    assert len(digest_json(value, length=32)) == 32


@pytest.mark.parametrize("name", [field.name for field in fields(Space)])
def test_every_field_of_a_space_is_part_of_its_identity(name: str):
    value = getattr(SPACE, name)
    other = {"x": "1"} if name == "versions" else (9.0, 9.0, 9.0) if name in ("mean", "std") else 9
    assert value != other
    assert replace(SPACE, **{name: other}).id != SPACE.id


def test_a_space_survives_json():
    values = json.loads(json.dumps(SPACE.to_dict())) | {"written_by": "a newer version"}
    assert Space.from_dict(values) == SPACE
    assert Space.from_dict(values).id == SPACE.id


def test_a_layout_survives_json():
    layout = replace(LAYOUT, carry=("json", "txt"), top_k_classes=5, key_column="id")
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_a_commit_survives_json():
    part = PartInfo("parts/aa/00000.parquet", 3, "d" * 64, 99, {"ok": 2, "truncated": 1})
    member = Member("ü a.jpg", "s3://b/ü a.jpg", 5, "etag")
    commit = Commit(
        *("aa", "bundle", "s3://b/ü a.jpg", "s3://b", "", "v", 5, SPACE.id, (part,)),
        members=(member,),
        supersedes=("bb",),
        notes={"duplicate_keys": 1},
        sequence=4,
        run_id="r",
        committed_s=1.5,
        modified_s=None,
    )
    assert Commit.from_json(commit.to_json()) == commit
    assert json.loads(commit.to_json())["rows"] == 3
    newer = json.dumps(json.loads(commit.to_json()) | {"colour": "red"}).encode()
    assert Commit.from_json(newer) == commit


def test_statuses_are_added_up_in_their_order():
    counts = count_statuses([{"truncated": 1}, {"ok": 2}, {"truncated": 3, "bad_shard": 1}])
    assert list(counts.items()) == [("ok", 2), ("truncated", 4), ("bad_shard", 1)]
    assert count_statuses([]) == {}
    assert STATUSES[0] == "ok"


def test_the_columns_of_a_part_are_these():
    """A ratchet: other programs read these columns."""
    columns = [
        (field.name, str(field.type), field.nullable) for field in part_schema(SPACE, LAYOUT)
    ]
    assert columns == [
        ("key", "string", False),
        ("shard", "string", False),
        ("row", "int32", False),
        ("status", "string", False),
        ("error", "string", True),
        ("width", "int32", True),
        ("height", "int32", True),
        ("offset", "int64", True),
        ("nbytes", "int32", False),
        ("sha256", "fixed_size_binary[16]", True),
        ("embedding", "fixed_size_list<item: float>[2048]", True),
    ]


def test_classes_and_carried_columns_follow_in_order():
    layout = replace(LAYOUT, top_k_classes=3, carry=("txt", "n"), embedding_dtype="float16")
    carried = pa.schema([pa.field("txt", pa.string()), pa.field("n", pa.int16())])
    schema = part_schema(SPACE, layout, carried)
    assert schema.names[-4:] == ["class_index", "class_prob", "txt", "n"]
    assert schema.field("class_index").type == pa.list_(pa.int16())
    assert schema.field("class_prob").type == pa.list_(pa.float32())
    assert schema.field("embedding").type == pa.list_(pa.float16(), 2048)
    assert schema.field("n").type == pa.int16()
    assert part_schema(SPACE, layout).field("n").type == pa.string()


def test_names_of_a_parts_own_columns_are_known_to_the_settings():
    layout = replace(LAYOUT, top_k_classes=1)
    assert set(part_schema(SPACE, layout).names) == PART_COLUMNS


def test_a_record_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(RecordError("truncated", "cut short")))
    assert (error.status, error.reason, str(error)) == (
        "truncated",
        "cut short",
        "truncated: cut short",
    )
