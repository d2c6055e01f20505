"""What became of every object that was listed: nothing is left out without a word."""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from pipeline.embed_job.plan import covers
from pipeline.errors import CorruptionError, NoImagesError
from pipeline.input.listing import MAX_NAMES, Listing, SetAside
from pipeline.records import Commit

MAX_FAILED_SHOWN = 100
"""Most failed objects that a report names."""

WITHOUT_IMAGES = "Parquet without a column of images"


@dataclass(frozen=True, slots=True)
class ObjectCounts:
    """What became of the objects of a listing; ``listed`` is the sum of the others.

    Attributes:
        listed: Objects that were listed.
        images: Loose images that have a row.
        shards: Tar and Parquet objects that are committed.
        set_aside: Objects that are not read; ``EmbedReport.set_aside`` says why.
        failed: Objects that could not be read; what was committed of them before stays.
        unfinished: Objects that a run which stopped early has not come to.
    """

    listed: int = 0
    images: int = 0
    shards: int = 0
    set_aside: int = 0
    failed: int = 0
    unfinished: int = 0

    def __post_init__(self) -> None:
        parts = (self.images, self.shards, self.set_aside, self.failed, self.unfinished)
        if sum(parts) != self.listed:
            raise CorruptionError(
                f"the run's books do not balance: {self.listed} objects listed, {sum(parts)} "
                "accounted for; this is a defect, please report it with the run's report"
            )


def account_objects(
    listing: Listing, live: Iterable[Commit], *, failed: Container[str], stopped: bool
) -> tuple[ObjectCounts, dict[str, SetAside]]:
    """Compare a listing with what is committed now.

    Args:
        listing: What the inputs hold.
        live: The output's live commits.
        failed: URIs of the sources that this run could not read.
        stopped: Whether the run ended before it was through.

    Returns:
        The counts, and what is set aside, by reason.

    Raises:
        CorruptionError: A source has no row and no reason, although the run was not stopped.
    """
    done: dict[tuple[str, str], str] = {}
    for commit in live:
        done |= {(member.uri, member.version): "images" for member in commit.members}
        if commit.kind != "bundle":
            empty = "without_images" in commit.notes
            done[commit.source, commit.version] = WITHOUT_IMAGES if empty else "shards"
    found: Counter[str] = Counter()
    bare: list[str] = []
    for source in listing.sources:
        uri = source.info.uri
        became = "failed" if uri in failed else done.get((uri, source.info.version), "unfinished")
        if became == "unfinished" and not stopped:
            raise CorruptionError(
                f"{uri} was listed but has neither a commit nor a reason; run again, and report "
                "this with the run's report"
            )
        found[became] += 1
        if became == WITHOUT_IMAGES:
            bare.append(uri)
    aside = dict(listing.aside)
    if bare:
        aside[WITHOUT_IMAGES] = SetAside(len(bare), tuple(bare[:MAX_NAMES]))
    counts = ObjectCounts(
        listed=listing.listed if listing.listed >= 0 else len(listing.sources) + listing.ignored,
        images=found["images"],
        shards=found["shards"],
        set_aside=listing.ignored + len(bare),
        failed=found["failed"] + len(listing.failed),
        unfinished=found["unfinished"],
    )
    return counts, aside


def describe_objects(
    counts: ObjectCounts, aside: Mapping[str, SetAside], notes: Mapping[str, int]
) -> str:
    """Return one line that accounts for everything that was listed."""
    reasons = ", ".join(f"{kind.count:,} {reason}" for reason, kind in aside.items())
    parts = [
        f"{counts.images:,} images",
        f"{counts.shards:,} shards",
        f"{counts.set_aside:,} set aside" + (f" ({reasons})" if reasons else ""),
        f"{counts.failed:,} failed",
    ]
    if counts.unfinished:
        parts.append(f"{counts.unfinished:,} not reached")
    noted = _describe_notes({name: n for name, n in notes.items() if name != "without_images"})
    return f"{counts.listed:,} objects listed: {', '.join(parts)}" + (f"; {noted}" if noted else "")


def _describe_notes(notes: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in notes.items())


def check_images_found(listing: Listing, live: Iterable[Commit]) -> None:
    """Refuse to call a run done whose input gave no image at all.

    Raises:
        NoImagesError: None of the shards under an input holds an image.
    """
    commits = list(live)
    for root in listing.roots:
        own = [c for c in commits if covers([root], c.root, c.source)]
        if own and not any(commit.rows for commit in own):
            notes: Counter[str] = Counter()
            for commit in own:
                notes.update(commit.notes)
            noted = _describe_notes(notes)
            raise NoImagesError(
                f"no image was found in the {len(own)} shards under {root!r}"
                + (f" ({noted})" if noted else "")
                + "; look at the names of their members or columns, and give another --input"
            )
