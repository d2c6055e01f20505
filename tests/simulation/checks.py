"""What must hold in every state of an output, told from the bytes in the store and the input's.

Nothing of the product's own reading is trusted here but the format of a commit and the rule which
commits are live.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output.commits import split_commits
from pipeline.records import Commit
from pipeline.storage.hidden import is_unfinished
from simulation.store import Blob
from simulation.world import World

_STATUSES = {b"bad": "unreadable", b"slow": "slow"}

Rows = dict[str, tuple[str, str]]
"""Status and digest of the image, by key."""


def list_input(objects: Mapping[str, Blob]) -> Rows:
    """Return the rows that an input should have, by tarfile and by the rule of the stand-in."""
    rows: Rows = {}
    for uri, blob in objects.items():
        _, inside, name = uri.partition("/in/")
        if not inside or is_unfinished(name):
            continue
        for key, data in _list_images(name, blob.data):
            status = _STATUSES.get(data[:4].strip(), "ok")
            rows[key] = (status, hashlib.sha256(data).hexdigest()[:32])
    return rows


@lru_cache(maxsize=256)
def _list_images(name: str, data: bytes) -> tuple[tuple[str, bytes], ...]:
    if not name.endswith(".tar"):
        return ((name, data),)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [(entry.name, tar.extractfile(entry)) for entry in tar]
        return tuple((f"{name}/{name_}", file.read()) for name_, file in files if file)


@lru_cache(maxsize=4096)
def _read_commit(data: bytes) -> Commit:
    return Commit.from_json(data)


@lru_cache(maxsize=4096)
def read_part(data: bytes) -> tuple[str, tuple[tuple[str, str, str], ...]]:
    """Return the digest of a part, and key, status and image digest of its rows."""
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["key", "status", "sha256"])
    except pa.ArrowInvalid as error:
        raise AssertionError(f"a part is no Parquet file: {error}") from error
    columns = [table.column(name).to_pylist() for name in ("key", "status", "sha256")]
    rows = tuple((key, status, image.hex()) for key, status, image in zip(*columns, strict=True))
    return hashlib.sha256(data).hexdigest(), rows


def list_live(objects: Mapping[str, Blob]) -> dict[str, Commit]:
    """Return the live commits by shard id."""
    found = [
        _read_commit(blob.data)
        for uri, blob in objects.items()
        if "/out/commits/" in uri and uri.endswith(".json")
    ]
    return split_commits({commit.shard_id: commit for commit in found})[0]


def list_rows(objects: Mapping[str, Blob], *, whole: bool = True) -> Rows:
    """Return the live rows, each key once.

    Args:
        objects: The store.
        whole: Whether each part has to be there as it was committed; else damaged ones are left
            out.
    """
    rows: Rows = {}
    place = next((uri.partition("/out/")[0] for uri in objects if "/out/" in uri), "")
    for commit in list_live(objects).values():
        for part in commit.parts:
            blob = objects.get(f"{place}/out/{part.path}")
            if not whole and (blob is None or len(blob.data) != part.size_bytes):
                continue
            assert blob is not None, f"{part.path} of a live commit of {commit.source} is gone"
            sha256, own = read_part(blob.data)
            assert sha256 == part.sha256, f"{part.path} is not what was committed"
            assert len(own) == part.rows, f"{part.path} has {len(own)} rows, not {part.rows}"
            for key, status, digest in own:
                assert key not in rows, f"{key} has two live rows"
                rows[key] = (status, digest)
    return rows


class Watch:
    """Looks at the output after every write and deletion.

    Args:
        world: The world.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._versions: dict[str, set[str]] = {}
        self._followed: list[Rows] = []
        self._lease: Blob | None = None
        self._commits: dict[str, Commit] = {}
        self.learn_input()
        self._rows = list_rows(world.objects, whole=False)
        self._whole = self._is_whole()
        self._present = set(list_input(world.objects))  # all the time: runs act on their listings
        for key, (_, digest) in self._rows.items():
            self._versions.setdefault(key, set()).add(digest)
        world.watch = self

    def learn_input(self) -> None:
        """Take note of the present input: its images may be embedded from now on."""
        for key, (_, digest) in list_input(self._world.objects).items():
            self._versions.setdefault(key, set()).add(digest)

    def __call__(self, uri: str) -> None:
        """Check the state after a write to ``uri``."""
        if "/in/" in uri:
            self.learn_input()
        elif uri.endswith("/out/lease.json"):
            self._check_lease(uri)
        elif "/out/commits/" not in uri and "/out/parts/" not in uri:
            return
        self._check_commit(uri)
        self._whole = self._whole or self._is_whole()
        rows = list_rows(self._world.objects, whole=self._whole)
        for key, (_, digest) in rows.items():
            assert digest in self._versions.get(key, ()), f"{key} has a row of no version it had"
        self._present &= list_input(self._world.objects).keys()
        lost = self._rows.keys() & self._present - rows.keys()
        assert not lost, f"rows were lost although their images are there: {sorted(lost)}"
        self._rows = rows
        for steady in self._followed:
            for key in steady.keys() - rows.keys():
                del steady[key]

    def _check_lease(self, uri: str) -> None:
        """Check that a live holder lost its lease to nobody, where no process was ever paused."""
        before, now = self._lease, self._world.objects.get(uri)
        self._lease = now
        held = json.loads(before.data) if before else {}
        if not held or (now and json.loads(now.data)["run_id"] == held["run_id"]):
            return
        holder = next(p for p in self._world.processes if p.pid == held["pid"])
        asleep = any(process.paused_until_s for process in self._world.processes)
        own = self._world.trace[-1].process == holder.name
        assert own or asleep or not holder.alive, f"{holder.name} lost its lease while it held it"

    def _check_commit(self, uri: str) -> None:
        """Check that a later run's commit is not replaced by an earlier run's."""
        blob = self._world.objects.get(uri)
        before = self._commits.get(uri)
        if blob is None or not uri.endswith(".json") or "/out/commits/" not in uri:
            self._commits.pop(uri, None)
            return
        commit = self._commits[uri] = _read_commit(blob.data)
        if before is not None and before != commit:
            ages = [(each.sequence, each.run_id) for each in (before, commit)]
            assert ages == sorted(ages), f"{uri}: an earlier run's commit replaced a later one's"

    def _is_whole(self) -> bool:
        try:
            list_rows(self._world.objects)
        except AssertionError:
            return False
        return True

    def follow(self) -> Rows:
        """Return the live rows, from which those drop out that cease to be live."""
        self._followed.append(dict(self._rows))
        return self._followed[-1]


def check_end(objects: Mapping[str, Blob]) -> None:
    """Check that the output has come to where an undisturbed history would be."""
    expected, found = list_input(objects), list_rows(objects)
    for key, row in expected.items():
        if row[0] == "slow" and found.get(key, ("", ""))[1] == row[1]:
            expected[key] = found[key]  # embedded or not, as it came
    assert found == expected, _compare(found, expected)


def _compare(found: Rows, expected: Rows) -> str:
    lines: list[Any] = [f"missing {key}" for key in expected.keys() - found.keys()]
    lines += [f"left over {key}" for key in found.keys() - expected.keys()]
    both = found.keys() & expected.keys()
    lines += [f"{key} is {found[key]}, not {expected[key]}" for key in both]
    return "; ".join(lines)
