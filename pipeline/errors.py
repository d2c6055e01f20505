"""Every exception raised on purpose, as a tree whose first level is the policy.

``AbortError`` ends the run, ``RetryError`` is worth another try, ``RecordError`` becomes a row of
the output. Who catches an exception needs to know the policy only; who reads it finds in the
message what, which value, where, and what to do.
"""


class PipelineError(Exception):
    """Base of all errors that the project raises on purpose."""


class AbortError(PipelineError):
    """The run cannot go on.

    Attributes:
        exit_code: What a job exits with.
        report: The job's report, where it got as far as having one.
    """

    exit_code = 1
    report: object | None = None


class SettingsError(AbortError):
    """A setting is wrong, or does not fit the data it is applied to."""

    exit_code = 2


class NoShardsError(SettingsError):
    """The input holds nothing to embed; a mistyped prefix more often than an empty dataset."""


class ShardError(SettingsError):
    """One shard does not fit the settings or the output; it is left out, all others are done."""


class NoImagesError(AbortError):
    """A shard is of a kind that has images, and has none: no column of them, no such member."""


class UnknownBackboneError(SettingsError):
    """A backbone name that is not in the registry; the message names the nearest one."""


class WeightsError(SettingsError):
    """Weights that cannot be found, read, or fitted to the backbone."""


class SpaceMismatchError(SettingsError):
    """Vectors of two spaces would meet; the message names the fields that differ."""


class QueryError(SettingsError):
    """A search was asked for something that the index cannot answer."""


class UnknownKeyError(QueryError):
    """A key that the index does not hold; the message names the nearest ones."""


class TooManyFailuresError(AbortError):
    """More images failed than ``--max-failures`` allows."""

    exit_code = 3


class LeaseError(AbortError):
    """Another live run holds the output."""


class ClusterError(AbortError):
    """Ray gave the run up: a process kept dying, or something failed that is no known fault."""


class ShortageError(AbortError):
    """This machine kept running short of memory, descriptors or processes; no image's fault."""


class CorruptionError(AbortError):
    """Stored data does not match its recorded digest, count or schema."""


class NewerFormatError(CorruptionError):
    """Stored data that a newer version of this program wrote; nothing is wrong with it."""


class PublishError(AbortError):
    """A generation was not published: a gate refused it, or another publisher won."""


class StorageError(AbortError):
    """Object storage refused for good, or kept failing until the retries were used up."""


class ObjectMissingError(StorageError):
    """An object that should be there is not."""


class NothingThereError(SettingsError, ObjectMissingError):
    """A setting names an output or an index that is not there; most often a mistyped URI."""


class ProtocolError(SettingsError, StorageError):
    """A URI starts with a protocol that is unknown, or that cannot be read here."""


class ObjectChangedError(StorageError):
    """An object is no longer the version that was listed or first read."""


class AccessError(StorageError):
    """The permission is lacking, for one object or for all of them."""


class CredentialsError(AccessError):
    """Credentials are missing, wrong or expired: they open no object at all."""


class UnreachableError(StorageError):
    """Storage kept failing until the retries were used up; the object itself may be sound."""


class IncompleteError(StorageError):
    """A run did everything but for some objects, which its report names."""


class RemovalError(IncompleteError):
    """More committed rows have lost their source than ``--max-removed`` allows; they stay."""


class ConflictError(StorageError):
    """A conditional write lost: somebody else wrote the object first."""


class ServiceError(AbortError):
    """The lookup service cannot be reached, has failed, or stayed overloaded."""


class RetryError(PipelineError):
    """A passing fault (throttling, reset, time-out, short read); trying again may help."""


class RecordError(PipelineError):
    """A fault of one record; it becomes a row with this status and reason.

    Attributes:
        status: One of ``records.STATUSES`` other than ``"ok"``.
        reason: A sentence for people, without the status.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str]]:
        return type(self), (self.status, self.reason)


def describe_excess_bytes(nbytes: int, max_image_bytes: int) -> str:
    """Return the reason of an encoded image that is longer than the limit."""
    return f"the encoded image has {nbytes:,} bytes; max_image_bytes is {max_image_bytes:,}"


def describe_no_index(uri: str) -> str:
    """Return the message for a URI that holds no index."""
    return f"no index at {uri!r}: CURRENT is missing; check the URI, or run index first"


def describe_no_embeddings(uri: str) -> str:
    """Return the message for a URI that holds no output of the embed job."""
    return f"no embeddings at {uri!r}: space.json is missing; check the URI, or run embed first"
