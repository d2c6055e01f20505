"""Lists the inputs: which objects there are, what each holds, and what is left out and why.

No shard is opened. Two things are read: a list of URIs, to know what it names, and the first bytes
of objects whose names do not tell what they are.
"""

import csv
import io
import posixpath
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import (
    CorruptionError,
    CredentialsError,
    NoShardsError,
    SettingsError,
    StorageError,
    UnreachableError,
)
from pipeline.input.kinds import (
    HEAD_BYTES,
    SUFFIXES,
    has_suffix,
    is_hidden,
    recognise,
    tell_kind,
    tell_reason,
)
from pipeline.input.patterns import survey_pattern
from pipeline.records import FailedObject, ObjectInfo, Shard, ShardKind, digest_json
from pipeline.storage import Storage, join_uri, normalise_uri

MAX_NAMES = 20
"""Most names that are kept of what is set aside for one reason."""

_THREADS = 32

SourceKind = Literal["tar", "parquet", "image"]
InputKind = Literal["auto", "tar", "parquet", "images", "list"]
Known = Callable[[], Container[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Source:
    """One object of the input, before it is cut into shards.

    Attributes:
        kind: How to read it; ``"image"`` is a loose one.
        root: The input it was found under.
        name: Path under the root; unique over all inputs.
        info: The object as listed.
    """

    kind: SourceKind
    root: str
    name: str
    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class SetAside:
    """Objects that are not read, for one reason.

    Attributes:
        count: How many.
        names: URIs of the first ``MAX_NAMES`` of them.
    """

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything the inputs hold: each object is a source, set aside, or failed.

    Attributes:
        roots: The inputs as URIs.
        sources: What there is to embed, by name.
        aside: What is not read, by reason.
        failed: What cannot be looked at, or would get keys that others have.
        listed: Number of objects that were listed.

    Raises:
        CorruptionError: An object is neither of the three.
    """

    roots: tuple[str, ...]
    sources: tuple[Source, ...]
    aside: Mapping[str, SetAside] = field(default_factory=dict)
    failed: tuple[FailedObject, ...] = ()
    listed: int = -1

    def __post_init__(self) -> None:
        total = len(self.sources) + self.ignored + len(self.failed)
        if self.listed not in (-1, total):
            raise CorruptionError(
                f"the listing does not add up: {self.listed} objects were listed, {total} are "
                "accounted for; this is a defect, please report it"
            )

    @property
    def ignored(self) -> int:
        """Number of objects that are set aside."""
        return sum(aside.count for aside in self.aside.values())


@dataclass(slots=True)
class _Found:
    """What was found under the inputs so far, with the reasons for what is not read."""

    sources: list[Source] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)


def list_sources(
    inputs: Sequence[str], kind: InputKind, storage: Storage, *, known: Known = frozenset
) -> Listing:
    """List the inputs.

    Args:
        inputs: Prefixes, folders, single objects, lists of URIs, or patterns of them (see
            ``patterns``), where nothing has such a name.
        kind: What they hold; ``"auto"`` decides by each object's name, and by its first bytes
            where the name does not tell.
        storage: How to reach them.
        known: Returns (URI, version) of objects that are known to be images; asked only where
            names do not tell.

    Raises:
        NoShardsError: An input holds nothing to embed.
        SettingsError: Two objects of different inputs would get the same keys.
        StorageError: Nothing under an input can be looked at.
    """
    roots = tuple(dict.fromkeys(normalise_uri(text) for text in inputs))
    found = _Found()
    for root in roots:
        own = _list_root(root, kind, storage, known)
        if not own.sources:
            raise _explain_nothing(root, own)
        found.sources += own.sources
        found.aside = own.aside | found.aside
        found.failed = own.failed | found.failed
        found.listed |= own.listed
    return _close(roots, found)


def _explain_nothing(root: str, found: _Found) -> SettingsError | StorageError:
    if found.failed:
        uri, reason = next(iter(found.failed.items()))
        return StorageError(
            f"nothing under {root!r} can be read: {len(found.failed)} objects fail, the first: "
            f"{uri}: {reason}"
        )
    reasons = _group(found.aside)
    others = ", ".join(f"{aside.count} {reason}" for reason, aside in reasons.items())
    advice = "check the prefix, or say what it holds with --input-kind"
    if set(reasons) == {"hidden"}:
        advice = "to read what is hidden, give the hidden folder itself as --input"
    return NoShardsError(
        f"no image shards under {root!r}"
        + (f" ({len(found.aside)} objects of other kinds: {others})" if others else "")
        + f"; {advice}"
    )


def _close(roots: tuple[str, ...], found: _Found) -> Listing:
    """Count each object once, whichever inputs hold it: as a source if it is one for any."""
    sources, clashes = _merge_sources(found.sources)
    taken = {source.info.uri for source in sources} | set(clashes)
    failed = {uri: why for uri, why in found.failed.items() if uri not in taken} | clashes
    taken |= set(failed)
    aside = {uri: why for uri, why in found.aside.items() if uri not in taken}
    return Listing(
        roots,
        sources,
        _group(aside),
        tuple(FailedObject(uri, why) for uri, why in sorted(failed.items())),
        len(found.listed),
    )


def _group(aside: Mapping[str, str]) -> dict[str, SetAside]:
    names: dict[str, list[str]] = {}
    for uri, reason in aside.items():
        names.setdefault(reason, []).append(uri)
    return {
        reason: SetAside(len(uris), tuple(sorted(uris)[:MAX_NAMES]))
        for reason, uris in sorted(names.items())
    }


def _list_root(root: str, kind: InputKind, storage: Storage, known: Known) -> _Found:
    base, objects, failed = _survey(root, storage)
    found = _Found(listed={o.uri for o in objects} | {o.uri for o in failed})
    unknown: list[Source] = []
    for info in objects:
        name = _name_under(base, info.uri)
        verdict, reason = _classify(name, info, kind, explicit=info.uri == root)
        if verdict == "list":
            found.listed.discard(info.uri)  # what it names is listed, not the list
            _read_list(info, storage, found)
        elif verdict == "unknown":
            unknown.append(Source("image", root, name, info))
        elif verdict is not None:
            found.sources.append(Source(verdict, root, name, info))
        else:
            found.aside[info.uri] = reason
    for entry in failed:
        if why := _why_not_wanted(_name_under(base, entry.uri)):
            found.aside[entry.uri] = why
        else:
            found.failed[entry.uri] = entry.reason
    _look_inside(unknown, kind, storage, known, found)
    return found


def _why_not_wanted(path: str) -> str | None:
    """Return why nothing of this name is read, or None if it might be."""
    told = tell_kind(path)
    if is_hidden(path, parquet=told == "parquet"):
        return "hidden"
    if told is not None:
        return "text or metadata" if told == "list" else None
    return tell_reason(path)


def _survey(root: str, storage: Storage) -> tuple[str, list[ObjectInfo], list[FailedObject]]:
    """List an input; return with it the folder under which its objects have their names."""
    objects, failed = storage.survey(root)
    if not objects and not failed:
        return survey_pattern(root, storage) or (root, [], [])
    return root, objects, failed


def _name_under(base: str, uri: str) -> str:
    # One slash only: ``a//b`` and ``a/b`` are two objects to a store.
    return posixpath.basename(base) if uri == base else uri[len(base) :].removeprefix("/")


_Verdict = Literal["tar", "parquet", "image", "list", "unknown"]


def _classify(
    name: str, info: ObjectInfo, kind: InputKind, *, explicit: bool
) -> tuple[_Verdict | None, str]:
    """Return what an object is by its name, or None and why it is not read."""
    told, reason = tell_kind(name), tell_reason(name)
    wanted = "image" if kind == "images" else kind
    if info.size_bytes < 0:
        return None, "not a file"
    if explicit:
        chosen: _Verdict | None = told or (None if reason else "unknown")
        return (chosen if wanted == "auto" else wanted), reason or ""
    if is_hidden(name, parquet=told == "parquet"):
        return None, "hidden"
    if told == "list":
        return None, "text or metadata"
    if wanted == "image" and not has_suffix(name):
        return "image", ""
    if told is None and reason is None and wanted in ("auto", "image"):
        return "unknown", ""
    if told is not None and wanted in ("auto", told):
        return told, ""
    return None, reason or "not what --input-kind asks for"


def _look_inside(
    unknown: Sequence[Source], kind: InputKind, storage: Storage, known: Known, found: _Found
) -> None:
    """Decide by their first bytes what objects are whose names do not tell."""
    images = known() if unknown else ()
    with ThreadPoolExecutor(_THREADS) as pool:
        told = pool.map(lambda source: _look_at(source.info, images, storage), unknown)
        for source, content in zip(unknown, told, strict=True):
            uri = source.info.uri
            if isinstance(content, FailedObject):
                found.failed[uri] = content.reason
            elif content is None:
                found.aside[uri] = "not an image" if source.info.size_bytes else "empty"
            elif kind == "images" and content != "image":
                found.aside[uri] = "not what --input-kind asks for"
            elif is_hidden(source.name, parquet=content == "parquet") and uri != source.root:
                found.aside[uri] = "hidden"
            else:
                found.sources.append(Source(content, source.root, source.name, source.info))


def _look_at(
    info: ObjectInfo, images: Container[tuple[str, str]], storage: Storage
) -> Literal["tar", "parquet", "image"] | FailedObject | None:
    if (info.uri, info.version) in images:
        return "image"
    nbytes = min(HEAD_BYTES, info.size_bytes)
    try:
        return recognise(storage.read_range(info.uri, 0, nbytes, version=info.version or None))
    except (CredentialsError, UnreachableError):
        raise
    except StorageError as error:
        return FailedObject(info.uri, str(error))


def _read_list(info: ObjectInfo, storage: Storage, found: _Found) -> None:
    """Look up what a list names; what cannot be looked up has failed, as it may come back."""

    def look_up(uri: str) -> Source | FailedObject:
        name = uri.split("://", 1)[-1].lstrip("/")
        told = tell_kind(name)
        kind: SourceKind = told if told in ("tar", "parquet") else "image"
        try:
            return Source(kind, info.uri, name, storage.stat(uri))
        except (CredentialsError, UnreachableError):
            raise
        except StorageError as error:
            return FailedObject(uri, str(error))

    texts = _parse_list(info.uri, storage.read(info.uri))
    uris = _unique(_resolve(text, info.uri) for text in texts)
    with ThreadPoolExecutor(_THREADS) as pool:
        for entry in pool.map(look_up, uris):
            if isinstance(entry, FailedObject):
                found.failed[entry.uri] = entry.reason
            else:
                found.sources.append(entry)
    found.listed |= set(uris)


def _resolve(text: str, list_uri: str) -> str:
    """Return the URI of an entry, which is relative to the folder of its list."""
    if "://" in text or text.startswith(("/", "~")):
        return normalise_uri(text)
    return normalise_uri(join_uri(list_uri.rpartition("/")[0], text.removeprefix("./")))


def _parse_list(uri: str, data: bytes) -> list[str]:
    """Return the URIs in a text, CSV/TSV or Parquet list, in order, without repetitions."""
    name = uri.lower()
    if name.endswith(SUFFIXES["parquet"]):
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


def _merge_sources(sources: Sequence[Source]) -> tuple[tuple[Source, ...], dict[str, str]]:
    """Drop objects that two inputs share, and name those whose keys could be another one's.

    The keys of a shard's rows start with its name and a slash, so that no other source may be
    called like that: ``s.tar/t.tar`` beside ``s.tar``, which object stores allow.

    Returns:
        The sources by name, and by URI the reasons of those that clash.

    Raises:
        SettingsError: Different objects have one name.
    """
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
    shards = {name: source for name, source in by_name.items() if source.kind != "image"}
    clashes = {
        source.info.uri: f"its keys could be those of {shards[parent].info.uri}, whose name it "
        "has as a folder; rename one of them, or embed it to another output"
        for source in by_name.values()
        if (parent := next(filter(shards.__contains__, list_parents(source.name)), None))
    }
    kept = [source for source in by_name.values() if source.info.uri not in clashes]
    return tuple(sorted(kept, key=lambda source: source.name)), clashes


def list_parents(name: str) -> Iterator[str]:
    """Yield the folders of a path, from the innermost: ``"a/b/c"`` gives ``"a/b"``, ``"a"``."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


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
