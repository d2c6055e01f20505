"""Bundles of which some images could not be had: committed without them, older rows kept.

An image that is gone, changed or refused when it is read says nothing of its content, so it gets no
row. Those beside it do not wait for it: the bundle is committed with the images that were read. As
its commit takes the place of older ones, the older row of an image that could not be had goes
along, as the image of the older version that it is. So no row is lost, none is replaced by an
absence, and the next run sees by the versions what it still has to read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.embed_job.plan import make_bundle
from pipeline.output.info import OutputInfo
from pipeline.output.parts import write_part
from pipeline.records import Commit, Member, PartInfo, Shard
from pipeline.storage import Storage, join_uri


def settle_members(
    shard: Shard, absent: Iterable[int], older: Sequence[Commit]
) -> tuple[tuple[Member, ...], dict[int, Member]]:
    """Return the images that a bundle has rows for, and which of them only older ones.

    Args:
        shard: The bundle as it was planned.
        absent: Rows of the images that could not be had.
        older: The live commits that it takes the place of.

    Returns:
        The images in row order, and by row those of ``older`` that stand in for absent ones.
    """
    before = {member.uri: member for commit in older for member in commit.members}
    missing = set(absent)
    kept = {
        row: before[member.uri]
        for row, member in enumerate(shard.members)
        if row in missing and member.uri in before
    }
    members = tuple(
        kept.get(row, member)
        for row, member in enumerate(shard.members)
        if row not in missing or row in kept
    )
    return members, kept


def rename_bundle(shard: Shard, members: Sequence[Member], chunking: Sequence[object]) -> Shard:
    """Return a bundle as the one that these members make; its parts stay where they are."""
    renamed = make_bundle(members, shard.root, chunking, times=[shard.modified_s])
    return replace(renamed, supersedes=shard.supersedes, folder=shard.folder)


def keep_rows(
    output: str,
    older: Sequence[Commit],
    kept: Mapping[int, Member],
    *,
    shard: Shard,
    chunk: int,
    info: OutputInfo,
    storage: Storage,
) -> PartInfo:
    """Write older rows once more, as a part of the bundle that goes on with them.

    Args:
        output: The output.
        older: The commits that have the rows.
        kept: Whose rows, by the row that they get.
        shard: The bundle; says where the part goes.
        chunk: Number of the part.
        info: The output's space and columns.
        storage: How to reach the output.
    """
    rows = {member.uri: row for row, member in kept.items()}
    found = [
        table.filter(pc.is_in(table.column("shard"), value_set=pa.array(list(rows))))
        for commit in older
        for table in _read_parts(output, commit, storage)
    ]
    table = pa.concat_tables([part.cast(info.schema) for part in found])
    numbers = pa.array([rows[uri] for uri in table.column("shard").to_pylist()], pa.int32())
    at = table.schema.get_field_index("row")
    table = table.set_column(at, table.schema.field(at), numbers).sort_by("row")
    return write_part(
        output, table, folder=shard.folder, chunk=chunk, space_id=info.space.id, storage=storage
    )


def _read_parts(output: str, commit: Commit, storage: Storage) -> Iterable[pa.Table]:
    for part in commit.parts:
        with storage.open_random(join_uri(output, part.path)) as file:
            yield pq.read_table(file, page_checksum_verification=True)
