"""The plan: what the inputs hold, what of it is already committed, what is left to embed.

Planning looks at listings and commits only; no shard is opened. The one exception is a list of
URIs, which has to be read to know what it names.
"""

import csv
import io
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import NoShardsError, ObjectMissingError, SettingsError
from pipeline.records import Commit, Layout, Member, ObjectInfo, Shard, ShardKind, digest_json
from pipeline.storage import Storage, normalise_uri

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PARQUET_SUFFIXES = (".parquet", ".pq")
LIST_SUFFIXES = (".txt", ".csv", ".tsv")
# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".tga", ".ico", ".icns", ".jp2", ".j2k",
    ".jpx", ".j2c", ".avif", ".avifs", ".heic", ".heif", ".qoi", ".pcx", ".sgi", ".xbm", ".dds",
    ".psd", ".hdr", ".exr", ".svg",
)
# fmt: on
"""Names that make a loose object an image of the input; unreadable kinds become failed rows."""

BUNDLE_IMAGES = 1024
BUNDLE_BYTES = 256 * 2**20
_THREADS = 32

InputKind = Literal["auto", "tar", "parquet", "images", "list"]


@dataclass(frozen=True, slots=True)
class Source:
    """One object of the input, before it is cut into shards.

    Attributes:
        kind: How to read it; ``"image"`` is a loose one.
        root: The input it was found under.
        name: Path under the root; unique over all inputs.
        info: The object as listed.
    """

    kind: Literal["tar", "parquet", "image"]
    root: str
    name: str
    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything the inputs hold.

    Attributes:
        roots: The inputs as URIs.
        sources: What there is to embed, by name.
        ignored: Number of objects that are neither shards nor images.
    """

    roots: tuple[str, ...]
    sources: tuple[Source, ...]
    ignored: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do; ``plan_shards`` makes it.

    Attributes:
        embed: Shards to embed, largest first.
        carried: Commits that are up to date.
        restored: Retired commits whose source is back unchanged, with what they supersede now.
        removed: Commits whose source is gone.
        listed_bytes: Size of everything listed.
        ignored: Number of objects that are neither shards nor images.
    """

    embed: tuple[Shard, ...]
    carried: tuple[Commit, ...]
    restored: tuple[tuple[Commit, tuple[str, ...]], ...]
    removed: tuple[Commit, ...]
    listed_bytes: int = 0
    ignored: int = 0


def list_sources(inputs: Sequence[str], kind: InputKind, storage: Storage) -> Listing:
    """List the inputs.

    Args:
        inputs: Prefixes, folders, single objects, or lists of URIs.
        kind: What they hold; ``"auto"`` decides by each object's name.
        storage: How to reach them.

    Raises:
        NoShardsError: An input holds nothing to embed.
        SettingsError: Two objects of different inputs would get the same keys.
    """
    roots = tuple(dict.fromkeys(normalise_uri(text) for text in inputs))
    sources: list[Source] = []
    ignored = 0
    for root in roots:
        found, others = _list_root(root, kind, storage)
        if not found:
            raise NoShardsError(
                f"no image shards under {root!r}"
                + (f" ({others} objects of other kinds)" if others else "")
                + "; check the prefix, or say what it holds with --input-kind"
            )
        sources += found
        ignored += others
    return Listing(roots, _merge_sources(sources), ignored)


def _list_root(root: str, kind: InputKind, storage: Storage) -> tuple[list[Source], int]:
    infos = [info for info in storage.list_objects(root) if info.size_bytes >= 0]
    sources: list[Source] = []
    ignored = 0
    for info in infos:
        found = _classify(info, kind, explicit=info.uri == root)
        name = posixpath.basename(root) if info.uri == root else info.uri[len(root) :].lstrip("/")
        if found == "list" and info.uri == root:
            sources += _read_list(info, storage)
        elif found in ("tar", "parquet", "image"):
            sources.append(Source(found, root, name, info))  # type: ignore[arg-type]
        else:
            ignored += 1
    return sources, ignored


def _classify(info: ObjectInfo, kind: InputKind, *, explicit: bool) -> str | None:
    name = info.uri.lower()
    if any(part.startswith((".", "_")) for part in (posixpath.basename(name),)) and not explicit:
        return None  # _SUCCESS, ._x.jpg, .DS_Store: what other tools leave beside data
    by_suffix = {
        "tar": name.endswith(TAR_SUFFIXES),
        "parquet": name.endswith(PARQUET_SUFFIXES),
        "image": name.endswith(IMAGE_SUFFIXES),
        "list": name.endswith(LIST_SUFFIXES),
    }
    if kind == "auto":
        return next((found for found, fits in by_suffix.items() if fits), None)
    wanted = "image" if kind == "images" else kind
    if explicit or by_suffix[wanted]:
        return wanted
    # Loose images often have names without a suffix; any other suffix is something else.
    return "image" if wanted == "image" and "." not in posixpath.basename(name) else None


def _read_list(info: ObjectInfo, storage: Storage) -> list[Source]:
    def look_up(uri: str) -> Source:
        name = uri.split("://", 1)[-1].lstrip("/")
        try:
            return Source("image", info.uri, name, storage.stat(uri))
        except ObjectMissingError:  # becomes a row that says so, until the object appears
            return Source("image", info.uri, name, ObjectInfo(uri, 0, "missing"))

    uris = [normalise_uri(uri) for uri in _parse_list(info.uri, storage.read(info.uri))]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look_up, uris))


def _parse_list(uri: str, data: bytes) -> list[str]:
    """Return the URIs in a text, CSV/TSV or Parquet list, in order, without repetitions."""
    name = uri.lower()
    if name.endswith(PARQUET_SUFFIXES):
        table = pq.read_table(pa.BufferReader(data))
        return _unique(table.column(_find_uri_column(uri, table.column_names)).to_pylist())
    text = data.decode("utf-8-sig", errors="replace")
    if name.endswith((".csv", ".tsv")):
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if name.endswith("tsv") else ","))
        column = rows[0].index(_find_uri_column(uri, rows[0])) if rows else 0
        return _unique(row[column] for row in rows[1:] if len(row) > column)
    return _unique(line for line in text.splitlines() if not line.startswith("#"))


def _find_uri_column(uri: str, names: Sequence[str]) -> str:
    for wanted in ("uri", "url", "path", "file", "image", "filename"):
        for name in names:
            if name.strip().lower() == wanted:
                return name
    raise SettingsError(
        f"{uri} has no column named uri, url, path, file or image; its columns are {list(names)}"
    )


def _unique(uris: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(uri.strip() for uri in uris if uri and uri.strip()))


def _merge_sources(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Drop objects that two inputs share; refuse different objects of one name."""
    by_uri: dict[str, Source] = {}
    for source in sources:
        by_uri.setdefault(source.info.uri, source)
    by_name: dict[str, Source] = {}
    for source in by_uri.values():
        other = by_name.setdefault(source.name, source)
        if other is not source:
            raise SettingsError(
                f"{other.info.uri} and {source.info.uri} would both get the key {source.name!r}; "
                "give their common parent as --input, or embed them to two outputs"
            )
    return tuple(sorted(by_name.values(), key=lambda source: source.name))


def plan_shards(
    listing: Listing,
    *,
    space_id: str,
    layout: Layout,
    commits: Mapping[str, Commit],
    retired: Mapping[str, Commit],
    again: frozenset[str] = frozenset(),
    sequence: int = 1,
) -> Plan:
    """Compare the listing with the commits.

    Pure: reads nothing. Largest shards first keeps the tail of a run short.

    Args:
        listing: What the inputs hold.
        space_id: The output's space.
        layout: The output's layout; its chunking is part of a shard's identity.
        commits: The live commits.
        retired: Commits of removed and superseded shards.
        again: Ids of committed shards to embed once more (``--retry-failed``).
        sequence: Number of this run; names the parts of the shards in ``again``, so that their
            committed parts stay untouched until the new commit replaces the old one.

    Raises:
        SettingsError: A new object would get keys that a committed one of another input has.
    """
    chunking = [space_id, layout.chunk_images, layout.chunk_bytes]
    objects = [s for s in listing.sources if s.kind != "image"]
    wanted = [make_object_shard(source, chunking=chunking) for source in objects]
    bundles, kept = _plan_bundles(listing, commits, chunking, again)
    wanted += bundles
    here = {shard.id for shard in wanted} | kept
    superseded = _find_superseded(wanted, commits)
    embed, restored = [], []
    for shard in wanted:
        old = tuple(sorted(set(shard.supersedes) | superseded.get(shard.id, set())))
        if shard.id in again:
            embed.append(replace(shard, supersedes=old, folder=f"{shard.id}.{sequence}"))
        elif shard.id in retired and shard.id not in commits:
            restored.append((retired[shard.id], old))
        elif shard.id not in commits:
            embed.append(replace(shard, supersedes=old, folder=shard.id))
    leaving = {old for shard in embed for old in shard.supersedes}
    leaving |= {old for _, olds in restored for old in olds}
    removed = [
        commit
        for shard_id, commit in commits.items()
        if shard_id not in here | leaving and _covers(listing.roots, commit.root, commit.source)
    ]
    leaving |= {commit.shard_id for commit in removed} | {shard.id for shard in embed}
    carried = [commit for shard_id, commit in commits.items() if shard_id not in leaving]
    _check_names(embed, [*carried, *(commit for commit, _ in restored)])
    return Plan(
        embed=tuple(sorted(embed, key=lambda shard: (-shard.size_bytes, shard.source))),
        carried=tuple(carried),
        restored=tuple(restored),
        removed=tuple(removed),
        listed_bytes=sum(max(0, source.info.size_bytes) for source in listing.sources),
        ignored=listing.ignored,
    )


def make_object_shard(source: Source, *, chunking: Sequence[object]) -> Shard:
    """Return the shard that an object is; ``chunking`` is what else decides its identity."""
    info = source.info
    kind: ShardKind = "parquet" if source.kind == "parquet" else "tar"
    return Shard(
        id=digest_json([info.uri, info.version, *chunking]),
        kind=kind,
        source=info.uri,
        root=source.root,
        name=source.name,
        size_bytes=info.size_bytes,
        version=info.version,
        modified_s=info.modified_s,
    )


def _plan_bundles(
    listing: Listing,
    commits: Mapping[str, Commit],
    chunking: Sequence[object],
    again: frozenset[str],
) -> tuple[list[Shard], set[str]]:
    """Cut loose images into bundles; return the new ones, and the ids of those that still hold.

    A committed bundle holds while all its images are listed unchanged. Otherwise those that are
    left of it, changed or not, make one bundle that supersedes it: no reader ever misses one of
    them or sees two versions of it. New images are cut in order of their names; each cut depends
    on the bundle's own images only, so a run after an interruption cuts the rest exactly as the
    interrupted one would have.
    """
    loose = {source.info.uri: source for source in listing.sources if source.kind == "image"}
    kept: set[str] = set()
    shards: list[Shard] = []
    for shard_id, commit in commits.items():
        if commit.kind != "bundle":
            continue
        listed = {m.uri: loose.pop(m.uri) for m in commit.members if m.uri in loose}
        members = _renew_members(commit, listed, listing.roots)
        if members == commit.members and not (listed and shard_id in again):
            kept.add(shard_id)
        elif members:
            times = [commit.modified_s, *(source.info.modified_s for source in listed.values())]
            shard = _make_bundle(members, commit.root, chunking, times=times)
            old = () if shard.id == shard_id else (shard_id,)
            shards.append(replace(shard, supersedes=old))
    for root in listing.roots:
        new = [source for source in loose.values() if source.root == root]
        shards += [_bundle_sources(group, chunking) for group in _cut_bundles(new)]
    return shards, kept


def _renew_members(
    commit: Commit, listed: Mapping[str, Source], roots: Sequence[str]
) -> tuple[Member, ...]:
    """Return the images of a committed bundle as they are now, without those that are gone."""
    members = []
    for member in commit.members:
        if member.uri in listed:
            info = listed[member.uri].info
            members.append(replace(member, size_bytes=info.size_bytes, version=info.version))
        elif not _covers(roots, commit.root, member.uri):
            members.append(member)
    return tuple(members)


def _covers(roots: Sequence[str], root: str, uri: str) -> bool:
    """Tell whether inputs would list an object of another input ``root`` if it were there."""
    return root in roots or any(uri == r or uri.startswith(f"{r.rstrip('/')}/") for r in roots)


def _cut_bundles(sources: Iterable[Source]) -> Iterator[list[Source]]:
    group: list[Source] = []
    size_bytes = 0
    for source in sources:
        group.append(source)
        size_bytes += source.info.size_bytes
        if len(group) == BUNDLE_IMAGES or size_bytes >= BUNDLE_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _bundle_sources(sources: Sequence[Source], chunking: Sequence[object]) -> Shard:
    members = [
        Member(source.name, source.info.uri, source.info.size_bytes, source.info.version)
        for source in sources
    ]
    times = [source.info.modified_s for source in sources]
    return _make_bundle(members, sources[0].root, chunking, times=times)


def _make_bundle(
    members: Sequence[Member],
    root: str,
    chunking: Sequence[object],
    *,
    times: Iterable[float | None],
) -> Shard:
    version = digest_json([[member.uri, member.version] for member in members])
    return Shard(
        id=digest_json([members[0].uri, version, *chunking]),
        kind="bundle",
        source=members[0].uri,
        root=root,
        name="",
        size_bytes=sum(member.size_bytes for member in members),
        version=version,
        modified_s=max((time for time in times if time is not None), default=None),
        members=tuple(members),
    )


def _find_superseded(shards: Sequence[Shard], commits: Mapping[str, Commit]) -> dict[str, set[str]]:
    """Return for each shard the committed ones of the same object in another version."""
    by_source: dict[str, set[str]] = {}
    for shard_id, commit in commits.items():
        if commit.kind != "bundle":
            by_source.setdefault(commit.source, set()).add(shard_id)
    return {
        shard.id: by_source[shard.source] - {shard.id}
        for shard in shards
        if shard.kind != "bundle" and shard.source in by_source
    }


def _check_names(embed: Sequence[Shard], carried: Sequence[Commit]) -> None:
    """Refuse new shards whose keys would be those of another input's committed rows."""
    taken = {commit.name: commit.source for commit in carried if commit.name}
    taken |= {member.key: member.uri for commit in carried for member in commit.members}
    for shard in embed:
        own = [(shard.name, shard.source)] if shard.name else []
        for name, uri in own + [(member.key, member.uri) for member in shard.members]:
            if taken.get(name, uri) != uri:
                raise SettingsError(
                    f"{uri} would get the key {name!r}, which this output has from {taken[name]}; "
                    "give their common parent as --input, or another --output"
                )
