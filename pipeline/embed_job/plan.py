"""Compares a listing with the commits: what to embed, carry over, restore and remove. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config import EmbedConfig
from pipeline.errors import SettingsError
from pipeline.input.listing import Listing, Source, make_object_shard
from pipeline.records import (
    Commit,
    Layout,
    Member,
    Shard,
    digest_json,
)

BUNDLE_IMAGES = 1024
BUNDLE_BYTES = 256 * 2**20


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


def list_again(config: EmbedConfig, commits: Mapping[str, Commit]) -> frozenset[str]:
    """Return the committed shards to embed once more for the sake of their failed rows."""
    if not (config.retry_failed or config.retry_failed_once):
        return frozenset()
    return frozenset(
        shard_id
        for shard_id, commit in commits.items()
        if set(commit.statuses) - {"ok"} and (config.retry_failed or not _was_retried(commit))
    )


def _was_retried(commit: Commit) -> bool:
    # Parts of a shard that is embedded once more go to a folder of their own.
    return not all(part.path.startswith(f"parts/{commit.shard_id}/") for part in commit.parts)


def count_shards(plan: Plan) -> dict[str, int]:
    """Return the number of shards by what becomes of them."""
    return {
        "embed": len(plan.embed),
        "carried_over": len(plan.carried),
        "restored": len(plan.restored),
        "removed": len(plan.removed),
        "ignored_objects": plan.ignored,
    }


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
