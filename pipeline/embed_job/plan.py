"""Compares a listing with the commits: what to embed, carry over, restore and remove. Pure."""

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config import EmbedConfig
from pipeline.errors import SettingsError
from pipeline.input.listing import Listing, Source, list_parents, make_object_shard
from pipeline.records import (
    Commit,
    Layout,
    Member,
    Shard,
    digest_json,
)

IsGone = Callable[[str, str], bool]
"""Takes the input that a committed object was found under, and its URI."""

_ALWAYS_REMOVABLE = 16
"""Rows that may leave whatever share they are: small folders are tidied up by hand."""

BUNDLE_IMAGES = 1024
BUNDLE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a run: shards to embed, to carry over, to restore, to remove.

    Attributes:
        embed: Shards to embed, largest first.
        carried: Commits that are up to date.
        restored: Retired commits whose source is back unchanged, with what they supersede now.
        removed: Commits whose source is gone.
        listed_bytes: Size of everything listed.
        ignored: Number of objects that are neither shards nor images.
        removed_rows: Rows that leave because their source is gone, of bundles too.
        covered_rows: Committed rows whose sources the inputs would list.
        withheld_rows: Rows whose source is gone and that stay all the same; see ``guard_removal``.
    """

    embed: tuple[Shard, ...]
    carried: tuple[Commit, ...]
    restored: tuple[tuple[Commit, tuple[str, ...]], ...]
    removed: tuple[Commit, ...]
    listed_bytes: int = 0
    ignored: int = 0
    removed_rows: int = 0
    covered_rows: int = 0
    withheld_rows: int = 0

    @property
    def takes_away(self) -> bool:
        """Whether rows that are live leave, or make way for others."""
        return bool(self.removed or self.restored or any(s.supersedes for s in self.embed))


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
    # Parts of a shard that is embedded once more go to a folder of their own, "<id>.<sequence>".
    return any("." in part.path.split("/")[1] for part in commit.parts)


def count_shards(plan: Plan) -> dict[str, int]:
    """Return the number of shards by what becomes of them."""
    return {
        "embed": len(plan.embed),
        "carried_over": len(plan.carried),
        "restored": len(plan.restored),
        "removed": len(plan.removed),
        "ignored_objects": plan.ignored,
    }


def list_chunking(space_id: str, layout: Layout) -> list[object]:
    """Return what decides a shard's identity besides its source."""
    return [space_id, layout.chunk_images, layout.chunk_bytes]


def plan_shards(
    listing: Listing,
    *,
    space_id: str,
    layout: Layout,
    commits: Mapping[str, Commit],
    retired: Mapping[str, Commit],
    again: frozenset[str] = frozenset(),
    doomed: Iterable[str] = (),
    sequence: int = 1,
    keep_missing: bool = False,
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
        doomed: Paths of parts that may be deleted at any time; no part gets into their folders.
        sequence: Number of this run; names the parts of the shards in ``again``, so that their
            committed parts stay untouched until the new commit replaces the old one.
        keep_missing: Leave the rows alone whose source is no longer listed.

    Raises:
        SettingsError: A new object would get keys that a committed one of another input has.
    """
    chunking = list_chunking(space_id, layout)
    objects = [s for s in listing.sources if s.kind != "image"]
    wanted = [make_object_shard(source, chunking=chunking) for source in objects]
    is_gone = _judge_absence(listing, keep_missing=keep_missing)
    bundles, kept = _plan_bundles(listing, commits, chunking, again, is_gone)
    wanted += bundles
    here = {shard.id for shard in wanted} | kept
    superseded = _find_superseded(wanted, commits)
    taken = {path.split("/")[1] for path in doomed}
    embed, restored = [], []
    for shard in wanted:
        old = tuple(sorted(set(shard.supersedes) | superseded.get(shard.id, set())))
        if shard.id in again:
            folder = _choose_folder(f"{shard.id}.{sequence}", taken)
            embed.append(replace(shard, supersedes=old, folder=folder))
        elif shard.id in retired and shard.id not in commits:
            restored.append((retired[shard.id], old))
        elif shard.id not in commits:
            folder = _choose_folder(shard.id, taken)
            embed.append(replace(shard, supersedes=old, folder=folder))
    leaving = {old for shard in embed for old in shard.supersedes}
    leaving |= {old for _, olds in restored for old in olds}
    removed = [
        commit
        for shard_id, commit in commits.items()
        if shard_id not in here | leaving and is_gone(commit.root, commit.source)
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
        removed_rows=sum(c.rows for c in removed) + _count_dropped(bundles, commits),
        covered_rows=sum(
            c.rows for c in commits.values() if covers(listing.roots, c.root, c.source)
        ),
    )


def _choose_folder(name: str, taken: Container[str]) -> str:
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(1)))
    return next(candidate for candidate in names if candidate not in taken)


def guard_removal(make_plan: Callable[..., Plan], *, max_removed: float) -> Plan:
    """Return a plan that removes no more than a share of the committed rows, or else none.

    A mount that is gone, a prefix that another program is about to write again or a subfolder
    that was renamed looks like so many deletions. What is embedded, changed or brought back does
    not depend on it, and is planned either way.

    Args:
        make_plan: Makes the plan; takes ``keep_missing``.
        max_removed: Largest share of the rows that the inputs cover. A few rows may always leave.
    """
    plan = make_plan(keep_missing=False)
    if plan.removed_rows <= max(_ALWAYS_REMOVABLE, max_removed * plan.covered_rows):
        return plan
    return replace(make_plan(keep_missing=True), withheld_rows=plan.removed_rows)


def _count_dropped(bundles: Sequence[Shard], commits: Mapping[str, Commit]) -> int:
    return sum(
        len(commits[old].members) - len(shard.members)
        for shard in bundles
        for old in shard.supersedes
    )


def _plan_bundles(
    listing: Listing,
    commits: Mapping[str, Commit],
    chunking: Sequence[object],
    again: frozenset[str],
    is_gone: IsGone,
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
        members = _renew_members(commit, listed, is_gone)
        if members == commit.members and not (listed and shard_id in again):
            kept.add(shard_id)
        elif members:
            times = [commit.modified_s, *(source.info.modified_s for source in listed.values())]
            shard = make_bundle(members, commit.root, chunking, times=times)
            old = () if shard.id == shard_id else (shard_id,)
            shards.append(replace(shard, supersedes=old))
    for root in listing.roots:
        new = [source for source in loose.values() if source.root == root]
        shards += [_bundle_sources(group, chunking) for group in _cut_bundles(new)]
    return shards, kept


def _renew_members(
    commit: Commit, listed: Mapping[str, Source], is_gone: IsGone
) -> tuple[Member, ...]:
    """Return the images of a committed bundle as they are now, without those that are gone."""
    members = []
    for member in commit.members:
        if member.uri in listed:
            info = listed[member.uri].info
            members.append(replace(member, size_bytes=info.size_bytes, version=info.version))
        elif not is_gone(commit.root, member.uri):
            members.append(member)
    return tuple(members)


def _judge_absence(listing: Listing, *, keep_missing: bool) -> IsGone:
    """Return what tells that an object which is not among the sources is really gone.

    One that no input covers is not, nor one that the listing could not look at, by itself or
    with the folder that it lies in: its rows stay.
    """
    if keep_missing:
        return lambda _root, _uri: False
    failed = {entry.uri for entry in listing.failed}

    def is_gone(root: str, uri: str) -> bool:
        hidden = failed and (uri in failed or any(map(failed.__contains__, list_parents(uri))))
        return not hidden and covers(listing.roots, root, uri)

    return is_gone


def covers(roots: Sequence[str], root: str, uri: str) -> bool:
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
    return make_bundle(members, sources[0].root, chunking, times=times)


def make_bundle(
    members: Sequence[Member],
    root: str,
    chunking: Sequence[object],
    *,
    times: Iterable[float | None],
) -> Shard:
    """Return the bundle that loose images make; its id follows from what they are, in order."""
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
