"""Reads every committed part again and compares it with what its commit recorded."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from pipeline.errors import (
    NothingThereError,
    ObjectMissingError,
    StorageError,
    describe_no_embeddings,
)
from pipeline.output.commits import IO_THREADS, list_commits, map_threads
from pipeline.output.info import OutputInfo, read_output_info
from pipeline.output.parts import digest_rows
from pipeline.records import (
    Commit,
    PartInfo,
    count_statuses,
    describe_job,
)
from pipeline.storage import Storage, join_uri


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``verify_output``.

    Attributes:
        commits: Number of live commits looked at.
        parts: Number of parts read.
        rows: Number of rows read.
        statuses: Rows by status.
        problems: One sentence per problem, with the object it is about; empty if all is well.
    """

    commits: int
    parts: int
    rows: int
    statuses: Mapping[str, int]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return describe_job("verify") | {
            "commits": self.commits,
            "parts": self.parts,
            "rows": self.rows,
            "statuses": dict(self.statuses),
            "problems": list(self.problems),
        }


def verify_output(output: str, storage: Storage) -> VerifyReport:
    """Read every part of every live commit and compare it with what the commit recorded.

    Checks that parts are there, whole (page checksums), of the recorded space, schema, row count
    and row digest, that vectors are null exactly where the status is not ``ok``, and that no key
    occurs twice.

    Raises:
        NothingThereError: There is no output at that URI.
    """
    info = read_output_info(output, storage)
    if info is None:
        raise NothingThereError(describe_no_embeddings(output))
    commits = list_commits(output, storage)
    problems: list[str] = []
    keys: set[bytes] = set()
    checks = [(commit, part) for commit in commits.values() for part in commit.parts]
    for found, part_keys in _check_parts(output, info, checks, storage):
        problems += found
        for key in part_keys:
            digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
            if digest in keys:
                problems.append(f"key {key!r} occurs more than once")
            keys.add(digest)
    return VerifyReport(
        commits=len(commits),
        parts=len(checks),
        rows=sum(commit.rows for commit in commits.values()),
        statuses=count_statuses(commit.statuses for commit in commits.values()),
        problems=tuple(problems),
    )


def _check_parts(
    output: str, info: OutputInfo, checks: Sequence[tuple[Commit, PartInfo]], storage: Storage
) -> Iterator[tuple[list[str], list[str]]]:
    def check(item: tuple[Commit, PartInfo]) -> tuple[list[str], list[str]]:
        uri = join_uri(output, item[1].path)
        try:
            data = storage.read(uri)
            if item[1].sha256 not in ("", hashlib.sha256(data).hexdigest()):
                return [f"{uri} is damaged: it has other bytes than its commit recorded"], []
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        except ObjectMissingError:
            return [f"{uri} is missing"], []
        except (pa.ArrowException, OSError, StorageError, ValueError) as error:
            return [f"{uri} cannot be read: {error}"], []
        problems = [f"{uri} {problem}" for problem in _check_table(table, info, *item)]
        return problems, [] if problems else table.column("key").to_pylist()

    step = 4 * IO_THREADS
    for start in range(0, len(checks), step):
        yield from map_threads(check, checks[start : start + step])


def _check_table(
    table: pa.Table, info: OutputInfo, commit: Commit, part: PartInfo
) -> Iterator[str]:
    metadata = table.schema.metadata or {}
    if not _complete(table.schema, info.schema).equals(info.schema, check_metadata=False):
        yield "has another schema than space.json describes"
        return
    if metadata.get(b"space_id", b"").decode() != commit.space_id:
        yield f"is of space {metadata.get(b'space_id', b'').decode()!r}, not {commit.space_id!r}"
    if commit.space_id != info.space.id:
        yield f"was committed for space {commit.space_id!r}; the output is of {info.space.id!r}"
    if table.num_rows != part.rows:
        yield f"has {table.num_rows} rows, its commit says {part.rows}"
    if digest_rows(table) != part.rows_sha256:
        yield "does not hold the rows that its commit recorded"
    valid = pc.is_valid(table.column("embedding"))
    if not valid.equals(pc.equal(table.column("status"), "ok")):
        yield "has embeddings that do not go with their status"


def _complete(schema: pa.Schema, wanted: pa.Schema) -> pa.Schema:
    """Return the schema with the types that its columns of nothing but nulls got later."""
    return pa.schema(
        wanted.field(item.name)
        if pa.types.is_null(item.type) and item.name in wanted.names
        else item
        for item in schema
    )
