"""Commits: which shards are done, and which rows a reader sees.

A shard is done if and only if ``commits/<shard id>.json`` exists. Everything a reader sees goes
through ``list_commits``; nothing else decides what is live.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import pyarrow.dataset

from pipeline.errors import CorruptionError, ObjectMissingError
from pipeline.output.info import read_output_info
from pipeline.records import Commit
from pipeline.storage import Storage, join_uri, normalise_uri

IO_THREADS = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def commit_path(shard_id: str) -> str:
    """Return the path of a live commit under the output."""
    return f"commits/{shard_id}.json"


def retired_path(shard_id: str) -> str:
    """Return where the commit of a removed or superseded shard is kept until it is pruned."""
    return f"retired/{shard_id}.json"


def write_commit(output: str, commit: Commit, storage: Storage) -> None:
    """Make a shard's rows visible, and those it supersedes invisible, in one write."""
    storage.put(join_uri(output, commit_path(commit.shard_id)), commit.to_json())


def retire_commit(output: str, shard_id: str, storage: Storage) -> None:
    """Take a shard out of the live rows, reversibly: its parts stay until they are pruned."""
    uri = join_uri(output, commit_path(shard_id))
    try:
        data = storage.read(uri)
    except ObjectMissingError:
        return
    storage.put(join_uri(output, retired_path(shard_id)), data)
    storage.delete([uri])


def restore_commit(output: str, commit: Commit, storage: Storage) -> None:
    """Bring a retired shard back; ``commit`` is its record with the new sequence."""
    write_commit(output, commit, storage)
    storage.delete([join_uri(output, retired_path(commit.shard_id))])


def list_commits(output: str, storage: Storage) -> dict[str, Commit]:
    """Return the live commits by shard id, in the order of their ids.

    Superseded commits that still lie there are left out.

    Raises:
        CorruptionError: A commit cannot be understood.
    """
    return split_commits(_read_commits(output, "commits", storage))[0]


def list_present_commits(
    output: str, storage: Storage
) -> tuple[dict[str, Commit], dict[str, Commit]]:
    """Return the live commits, and the superseded ones that still lie among them."""
    return split_commits(_read_commits(output, "commits", storage))


def list_retired(output: str, storage: Storage) -> dict[str, Commit]:
    """Return the commits of removed and superseded shards by shard id."""
    return _read_commits(output, "retired", storage)


def split_commits(commits: Mapping[str, Commit]) -> tuple[dict[str, Commit], dict[str, Commit]]:
    """Split commits into live and superseded ones.

    A commit is superseded by a later one that names it; later, because a source that went back to
    an older version brings back a commit that the newer version's had superseded.
    """
    newest: dict[str, int] = {}
    for commit in commits.values():
        for shard_id in commit.supersedes:
            newest[shard_id] = max(newest.get(shard_id, 0), commit.sequence)
    live = {key: c for key, c in commits.items() if newest.get(key, 0) <= c.sequence}
    return live, {key: c for key, c in commits.items() if key not in live}


def _read_commits(output: str, folder: str, storage: Storage) -> dict[str, Commit]:
    listed = storage.list_objects(join_uri(output, folder))
    uris = [info.uri for info in listed if info.uri.endswith(".json")]
    read = partial(_read_commit, storage=storage)
    found = [commit for commit in map_threads(read, uris) if commit is not None]
    return {commit.shard_id: commit for commit in found}


def _read_commit(uri: str, *, storage: Storage) -> Commit | None:
    try:
        data = storage.read(uri)
    except ObjectMissingError:  # retired between the listing and now
        return None
    try:
        return Commit.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{uri} is not a commit ({error}); delete it, and the next run embeds its shard again"
        ) from error


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function that waits for storage to all items at once, in order."""
    with ThreadPoolExecutor(IO_THREADS) as pool:
        return list(pool.map(function, items))


def read_embeddings(uri: str, storage: Storage | None = None) -> pyarrow.dataset.Dataset:
    """Open the committed rows of an output as a dataset; parts without a commit are not seen.

    Args:
        uri: The output.
        storage: How to reach it; credentials from the environment otherwise.

    Returns:
        One row per image, columns as in ``records.part_schema``; the order of rows is the shards'
        in the order of their ids, and the images' within them.

    Raises:
        ObjectMissingError: There is no output at ``uri``.
    """
    storage = storage or Storage()
    output = normalise_uri(uri)
    info = read_output_info(output, storage)
    if info is None:
        raise ObjectMissingError(
            f"no embeddings at {uri!r}: space.json is missing; check the URI, or run embed first"
        )
    filesystem, base = storage.arrow_filesystem(output)
    paths = [
        f"{base}/{part.path}"
        for commit in list_commits(output, storage).values()
        for part in commit.parts
    ]
    if not paths:
        return pyarrow.dataset.dataset(info.schema.empty_table())
    return pyarrow.dataset.dataset(
        paths, schema=info.schema, filesystem=filesystem, format="parquet"
    )


def prune_output(output: str, storage: Storage) -> int:
    """Delete the files of retired shards and parts that no commit names; return how many.

    Only the holder of the output's lease may call this: a run that is writing has parts that no
    commit names yet.
    """
    live = {part.path for commit in list_commits(output, storage).values() for part in commit.parts}
    base = len(output) + 1
    parts = [
        info.uri
        for info in storage.list_objects(join_uri(output, "parts"))
        if info.uri[base:] not in live
    ]
    retired = [info.uri for info in storage.list_objects(join_uri(output, "retired"))]
    storage.delete(retired)  # first: a retired commit promises that its parts are there
    storage.delete(parts)
    return len(retired) + len(parts)


def renew_commit(
    commit: Commit, *, sequence: int, run_id: str, supersedes: Sequence[str]
) -> Commit:
    """Return a retired commit as it is restored by a later run."""
    return replace(commit, sequence=sequence, run_id=run_id, supersedes=tuple(supersedes))
