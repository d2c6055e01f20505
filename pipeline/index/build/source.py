"""The embeddings that an index is built from, as they are when a build begins."""

from dataclasses import dataclass

from pipeline.errors import NothingThereError, SettingsError, describe_no_embeddings
from pipeline.index.manifest import EmbeddingsInfo
from pipeline.output.commits import list_commits
from pipeline.output.info import OutputInfo, read_output_info
from pipeline.records import Commit, count_statuses
from pipeline.storage import Storage, join_uri, normalise_uri


@dataclass(frozen=True, slots=True)
class Source:
    """The commits of an embeddings output at the start of a build.

    Attributes:
        uri: The embeddings output.
        info: Its space and layout.
        commits: Its live commits, in the order of their shards' names.
    """

    uri: str
    info: OutputInfo
    commits: tuple[Commit, ...]

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.info.space.dim

    @property
    def ok_rows(self) -> int:
        """Rows with a vector."""
        return sum(commit.statuses.get("ok", 0) for commit in self.commits)

    def describe(self) -> EmbeddingsInfo:
        """Return what a manifest records."""
        times = [c.modified_s for c in self.commits if c.modified_s is not None]
        return EmbeddingsInfo(
            uri=self.uri,
            space=self.info.space,
            weights=join_uri(self.uri, self.info.weights),
            statuses=count_statuses(commit.statuses for commit in self.commits),
            newest_image_s=max(times, default=None),
        )


def read_source(embeddings: str | None, storage: Storage) -> Source:
    """Read what is committed.

    Raises:
        SettingsError: No embeddings were given, or they hold no vector.
        NothingThereError: There are no embeddings at that URI.
    """
    if embeddings is None:
        raise SettingsError("no embeddings given; pass --embeddings with the embed job's output")
    uri = normalise_uri(embeddings)
    info = read_output_info(uri, storage)
    if info is None:
        raise NothingThereError(describe_no_embeddings(uri))
    commits = list_commits(uri, storage).values()
    # Neighbouring names in one segment: the key ranges of segments then seldom overlap.
    source = Source(uri, info, tuple(sorted(commits, key=lambda c: (c.root, c.name, c.shard_id))))
    if not source.ok_rows:
        raise SettingsError(f"the embeddings at {uri!r} hold no committed vector; run embed first")
    return source
