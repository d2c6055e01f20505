"""Conditional writes on S3 stores, which differ in the conditions that they honour.

``If-None-Match: *`` and ``If-Match`` are one request on AWS and most others. A store that refuses
``If-Match`` (Swift does) gets a guard object instead, made with ``If-None-Match: *``: whoever
holds it compares and writes. A store that accepts a condition and ignores it is found out by a
second write that must fail, made once per bucket, condition and process.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from pipeline.errors import ConflictError, RetryError, StorageError
from pipeline.records import ObjectInfo
from pipeline.stores import faults
from pipeline.stores.names import name_lock
from pipeline.stores.spans import Span

GUARD_LIFE_S = 60.0
"""A guard this old is a dead writer's. A write under a guard ends well before that."""

_NO_SUCH_ETAG = "0" * 32


class Writer(Protocol):
    """What is needed of ``S3Store``."""

    def write(self, uri: str, data: bytes, condition: dict[str, str]) -> str: ...  # noqa: D102
    def stat(self, uri: str) -> ObjectInfo: ...  # noqa: D102
    def fetch(self, uri: str, start: int, stop: int | None, version: str | None) -> Span: ...  # noqa: D102
    def delete(self, uris: Iterable[str]) -> None: ...  # noqa: D102
    def find_age(self, uri: str) -> float: ...  # noqa: D102


class ConditionalWrites:
    """Create-only and compare-and-swap writes; remembers what each bucket honours."""

    def __init__(self, store: Writer, *, attempts: int) -> None:
        self._store = store
        self._attempts = attempts
        self._honoured: set[tuple[str, str]] = set()
        self._refusing: set[str] = set()

    def create(self, uri: str, data: bytes) -> str:
        """Write an object that must not exist; return its etag."""
        etag = self._store.write(uri, data, {"IfNoneMatch": "*"})
        self._check_honoured(uri, data, {"IfNoneMatch": "*"})
        return etag

    def replace(self, uri: str, data: bytes, version: str) -> str:
        """Write an object whose etag must be ``version``; return its new etag."""
        if _bucket_of(uri) in self._refusing:
            return self._replace_guarded(uri, data, version)
        try:
            etag = self._store.write(uri, data, {"IfMatch": f'"{version}"'})
        except Exception as error:
            if faults.status_of(error) == 501:
                self._refusing.add(_bucket_of(uri))
                return self._replace_guarded(uri, data, version)
            if faults.code_of(error) in ("NoSuchKey", "404"):
                raise ConflictError(f"cannot write {uri!r}: it is gone; read it again") from error
            raise
        self._check_honoured(uri, data, {"IfMatch": f'"{_NO_SUCH_ETAG}"'})
        return etag

    def _check_honoured(self, uri: str, data: bytes, condition: dict[str, str]) -> None:
        """Repeat a write that has just been done, under a condition that cannot hold any more."""
        name = next(iter(condition))
        if (_bucket_of(uri), name) in self._honoured:
            return
        try:
            self._store.write(uri, data, condition)
        except Exception as error:
            if faults.status_of(error) in (404, 409, 412):
                self._honoured.add((_bucket_of(uri), name))
            return  # after any other fault the next write checks again
        raise StorageError(
            f"cannot write {uri!r} conditionally: this store ignores {name}, so two writers could "
            "both win; use a store that honours it"
        )

    def _replace_guarded(self, uri: str, data: bytes, version: str) -> str:
        with self._guard(uri):
            found = self._store.stat(uri).version
            if found != version:
                raise ConflictError(
                    f"cannot write {uri!r}: it has changed; another writer was first: read it again"
                )
            return self._store.write(uri, data, {})

    @contextlib.contextmanager
    def _guard(self, uri: str) -> Iterator[None]:
        folder, _, name = uri.rpartition("/")
        guard = f"{folder}/{name_lock(name)}"
        token = uuid.uuid4().hex.encode()
        self._insist(lambda: self._take(guard, token), action="take", uri=guard)
        try:
            yield
        finally:
            self._insist(lambda: self._store.delete([guard]), action="delete", uri=guard)

    def _take(self, guard: str, token: bytes) -> None:
        try:
            self.create(guard, token)
        except Exception as error:
            if faults.status_of(error) != 412:
                raise
            if self._store.fetch(guard, 0, None, None).data == token:
                return  # made by an earlier try, whose answer was lost
            if self._store.find_age(guard) > GUARD_LIFE_S:
                self._store.delete([guard])
            raise RetryError(f"another writer holds {guard!r}") from error

    def _insist(self, call: Callable[[], None], *, action: str, uri: str) -> None:
        faults.retry(call, action=action, uri=uri, attempts=self._attempts)


def _bucket_of(uri: str) -> str:
    return uri.removeprefix("s3://").partition("/")[0]
