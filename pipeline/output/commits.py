"""Commits: which shards are done, and which rows a reader sees.

A shard is done if and only if ``commits/<shard id>.json`` exists. Everything a reader sees goes
through ``list_commits``; nothing else decides what is live.
"""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import pyarrow.dataset

from pipeline.errors import (
    ConflictError,
    CorruptionError,
    NothingThereError,
    ObjectMissingError,
    describe_no_embeddings,
)
from pipeline.output.info import read_output_info
from pipeline.records import Commit
from pipeline.storage import Storage, join_uri, normalise_uri

IO_THREADS = 32
PRUNE_AGE_S = 24 * 3600.0
PRUNE_STEP = 1000

Item = TypeVar("Item")
Result = TypeVar("Result")


_DOOMED = "pruning"


def commit_path(shard_id: str) -> str:
    """Return the path of a live commit under the output."""
    return f"commits/{shard_id}.json"


def retired_path(shard_id: str) -> str:
    """Return where the commit of a removed or superseded shard is kept until it is pruned."""
    return f"retired/{shard_id}.json"


def write_commit(
    output: str, commit: Commit, storage: Storage, *, replaces: Commit | None = None
) -> None:
    """Make a shard's rows visible, and those it supersedes invisible, in one conditional write.

    A process that was paused, and wakes up after another run committed the shard, changes nothing.

    Args:
        output: The output.
        commit: The commit.
        storage: How to reach the output.
        replaces: The shard's present commit where it is embedded once more; None where it has none.

    Raises:
        ConflictError: The shard has another commit by now: another run wrote it.
    """
    uri = join_uri(output, commit_path(commit.shard_id))
    if replaces is None:
        storage.put_if_absent(uri, commit.to_json())
        return
    try:
        data, version = storage.read_versioned(uri)
    except ObjectMissingError as error:
        raise ConflictError(f"{uri} is gone; another run wrote to {output}") from error
    if Commit.from_json(data) != replaces:
        raise ConflictError(f"{uri} has changed; another run wrote to {output}")
    storage.put_if_version(uri, commit.to_json(), version)


def retire_commit(
    output: str, shard_id: str, storage: Storage, *, expected: Commit | None = None
) -> None:
    """Take a shard out of the live rows, reversibly: its parts stay until they are pruned.

    A process that was paused, and wakes up after another run committed the shard again, leaves that
    commit alone.

    Args:
        output: The output.
        shard_id: The shard.
        storage: How to reach the output.
        expected: The commit to retire; any where None.
    """
    uri = join_uri(output, commit_path(shard_id))
    try:
        data, version = storage.read_versioned(uri)
    except ObjectMissingError:
        return
    if expected is not None and Commit.from_json(data) != expected:
        return
    storage.put(join_uri(output, retired_path(shard_id)), data)
    storage.delete_if_version(uri, version)


def restore_commit(output: str, commit: Commit, storage: Storage) -> None:
    """Bring a retired shard back; ``commit`` is its record with the new sequence."""
    write_commit(output, commit, storage)
    storage.delete([join_uri(output, retired_path(commit.shard_id))])


def list_commits(output: str, storage: Storage) -> dict[str, Commit]:
    """Return the live commits by shard id, in the order of their ids.

    Superseded commits that still lie there are left out. While a run replaces a shard, this returns
    its old commit or its new one, never neither and never both.

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
    an older version brings back a commit that the newer version's had superseded. So is one by a
    later one of the same object or image, whether named or not: a process that was paused may have
    written it after another run had taken over. Where two runs share a sequence number, their names
    decide, so that one of two commits is live and not both.
    """
    newest: dict[str, tuple[int, str]] = {}
    for commit in commits.values():
        age = (commit.sequence, commit.run_id)
        for name in (*commit.supersedes, *_list_sources(commit)):
            newest[name] = max(newest.get(name, age), age)
    live = {
        key: commit
        for key, commit in commits.items()
        if all(
            newest.get(name, (0, "")) <= (commit.sequence, commit.run_id)
            for name in (key, *_list_sources(commit))
        )
    }
    return live, {key: c for key, c in commits.items() if key not in live}


def _list_sources(commit: Commit) -> Iterable[str]:
    return (member.uri for member in commit.members) if commit.members else (commit.source,)


def _read_commits(output: str, folder: str, storage: Storage) -> dict[str, Commit]:
    """Read all commits of a folder, listing it until a listing shows none that is new.

    A listing takes time, and a shard may be replaced meanwhile: its new commit written where the
    listing has been already, its old one deleted before the listing gets there. Whoever deletes an
    old commit has written the new one before, so the next listing shows it. (A run replaces a shard
    once, so no shard changes twice under two listings in a row.)
    """
    read = partial(_read_commit, storage=storage)
    found: dict[str, Commit | None] = {}
    for listing in itertools.count():
        listed = storage.list_objects(join_uri(output, folder))
        new = [info.uri for info in listed if info.uri.endswith(".json") and info.uri not in found]
        if listing and not new:
            break
        found |= zip(new, map_threads(read, new), strict=True)
    commits = [found[uri] for uri in sorted(found)]
    return {commit.shard_id: commit for commit in commits if commit is not None}


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
        in the order of their ids, and the images' within them. Reading it verifies the checksum of
        every page, and raises ``OSError`` where one is wrong; ``verify_output`` also compares the
        whole part with its digest.

    Raises:
        NothingThereError: There is no output at ``uri``.
    """
    storage = storage or Storage()
    output = normalise_uri(uri)
    info = read_output_info(output, storage)
    if info is None:
        raise NothingThereError(describe_no_embeddings(uri))
    filesystem, base = storage.arrow_filesystem(output)
    checked = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    paths = [
        f"{base}/{part.path}"
        for commit in list_commits(output, storage).values()
        for part in commit.parts
    ]
    if not paths:
        return pyarrow.dataset.dataset(info.schema.empty_table())
    return pyarrow.dataset.dataset(
        paths,
        schema=info.schema,
        filesystem=filesystem,
        format=pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=checked),
    )


def find_damaged(output: str, commits: Mapping[str, Commit], storage: Storage) -> dict[str, str]:
    """Return the shards with a part that is missing or has another size, and what is wrong.

    One listing tells; no part is read. ``verify_output`` reads them.
    """
    listed = storage.list_objects(join_uri(output, "parts"))
    sizes = {info.uri[len(output) + 1 :]: info.size_bytes for info in listed}
    damaged = {}
    for shard_id, commit in commits.items():
        for part in commit.parts:
            size_bytes = sizes.get(part.path)
            if size_bytes is None:
                damaged[shard_id] = f"{join_uri(output, part.path)} is missing"
            elif size_bytes != part.size_bytes:
                damaged[shard_id] = (
                    f"{join_uri(output, part.path)} has {size_bytes:,} bytes, "
                    f"its commit says {part.size_bytes:,}"
                )
    return damaged


def prune_output(
    output: str,
    storage: Storage,
    *,
    check: Callable[[], None],
    min_age_s: float = PRUNE_AGE_S,
) -> int:
    """Delete retired commits with their parts, and old parts that no commit names.

    The list of what is doomed is written first, and deleted last. Should this process be paused in
    between and another run take over, that run uses nothing on the list: it brings no commit back
    whose parts are doomed, and gives no part such a name.

    Args:
        output: The output.
        storage: How to reach it.
        check: Called before every deletion; raises when the lease of the output is lost, since
            another run may then be writing what looks unused here.
        min_age_s: A part that no commit ever named is kept until it is this old, seconds: it may be
            one that a process is about to report.

    Returns:
        Number of objects deleted.
    """
    retired = list_retired(output, storage)
    live = {part.path for commit in list_commits(output, storage).values() for part in commit.parts}
    left = {part.path for commit in retired.values() for part in commit.parts} - live
    oldest_s = time.time() - min_age_s
    unused = [
        info.uri
        for info in storage.list_objects(join_uri(output, "parts"))
        if (path := info.uri[len(output) + 1 :]) in left
        or (path not in live and (info.modified_s or 0.0) < oldest_s)
    ]
    unused += [join_uri(output, path) for path in list_doomed(output, storage) - left - live]
    # Commits first: a retired commit promises that its parts are there.
    doomed = [join_uri(output, retired_path(shard_id)) for shard_id in retired] + unused
    own = join_uri(output, _DOOMED, f"{uuid.uuid4().hex[:16]}.json")
    if doomed:
        storage.put(own, json.dumps([uri[len(output) + 1 :] for uri in unused]).encode())
    for start in range(0, len(doomed), PRUNE_STEP):
        check()
        storage.delete(doomed[start : start + PRUNE_STEP])
    lists = storage.list_objects(join_uri(output, _DOOMED))
    storage.delete(i.uri for i in lists if i.uri == own or (i.modified_s or 0.0) < oldest_s)
    return len(doomed)


def list_doomed(output: str, storage: Storage) -> frozenset[str]:
    """Return the paths of the parts that a pruning deletes just now, or died over."""
    found: set[str] = set()
    for info in storage.list_objects(join_uri(output, _DOOMED)):
        with suppress(ObjectMissingError):  # that pruning has ended since
            found.update(json.loads(storage.read(info.uri)))
    return frozenset(found)


def renew_commit(
    commit: Commit, *, sequence: int, run_id: str, supersedes: Sequence[str]
) -> Commit:
    """Return a retired commit as it is restored by a later run."""
    return replace(commit, sequence=sequence, run_id=run_id, supersedes=tuple(supersedes))
