"""Conditional writes on S3 stores, which differ in the conditions that they honour.

``If-None-Match: *`` and ``If-Match`` are one request each on AWS and most others. Two kinds of
store differ, and are found out by one harmless request per bucket and process:

- One that refuses ``If-Match`` (Swift; its ``If-None-Match`` also lets two simultaneous writers
  both win). Writers there take turns: who makes a guard object, waits a moment and still finds
  their own guard may compare and write.
- One that accepts conditions and ignores them. Nothing is safe there, and it is an error.

Each write carries an id in its metadata. When the answer to a write is lost, and whoever noticed
sent it again (the HTTP library does so unasked), the second one meets the first: the id tells
that conflict from a real one.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import ConflictError, RetryError, StorageError
from pipeline.storage.hidden import name_lock
from pipeline.storage.retry import code_of, retry, status_of

_log = logging.getLogger(__name__)

GUARD_LIFE_S = 180.0
"""A guard this old is a dead writer's. A write under a guard begins within a third of that, and its
own time-out (``storage_timeout_s``) has to end it within another."""

SETTLE_S = 0.5
"""Longest time in which a writer that saw no guard may still make one."""

_GONE_CODES = ("NoSuchKey", "404")
_NO_SUCH_ETAG = "0" * 32
_CREATE = ("If-None-Match", "*")


@dataclass(frozen=True, slots=True)
class Head:
    """Version, writer and age of an object, as a HEAD request returns them.

    Attributes:
        etag: The object's version.
        write_id: Id of the write that made it; empty if it had none.
        age_s: Seconds since then, by the store's clock.
    """

    etag: str
    write_id: str
    age_s: float


class Writer(Protocol):
    """The methods of ``S3Store`` that conditional writes call."""

    def write(  # noqa: D102
        self, uri: str, data: bytes, *, condition: tuple[str, str] | None = None, write_id: str = ""
    ) -> str: ...
    def look_up(self, uri: str) -> Head | None: ...  # noqa: D102
    def delete(self, uris: Iterable[str]) -> None: ...  # noqa: D102


class ConditionalWrites:
    """Create-only and compare-and-swap writes; remembers what each bucket honours."""

    def __init__(self, store: Writer, *, attempts: int) -> None:
        self._store = store
        self._attempts = attempts
        self._refuses_match: dict[str, bool] = {}
        self._honours_create: set[str] = set()

    def put_if(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        """Write if the etag is still ``version``, or nothing is there where None; return the etag.

        Args:
            uri: The object.
            data: Its new content.
            version: Its present etag.
            write_id: The same for every try of one write.

        Raises:
            ConflictError: Something else is there.
            RetryError: This process was paused while it held the guard.
        """
        bucket = uri.removeprefix("s3://").partition("/")[0]
        if bucket not in self._refuses_match:
            self._refuses_match[bucket] = self._find_refusal(_guard_of(uri))
        if self._refuses_match[bucket]:
            return self._put_guarded(uri, data, version=version, write_id=write_id)
        if version is None:
            return self._create(uri, data, write_id=write_id)
        condition = ("If-Match", f'"{version}"')
        return self._write_or_recognise(uri, data, condition=condition, write_id=write_id)

    def _find_refusal(self, uri: str) -> bool:
        """Tell whether the store refuses ``If-Match``, by a write that cannot happen."""
        try:
            self._store.write(uri, b"", condition=("If-Match", f'"{_NO_SUCH_ETAG}"'))
        except Exception as error:
            if status_of(error) == 501:
                return True
            if status_of(error) == 412 or code_of(error) in _GONE_CODES:
                return False
            raise
        self._store.delete([uri])
        raise _make_ignored_error(uri, "If-Match")

    def _create(self, uri: str, data: bytes, *, write_id: str) -> str:
        etag = self._write_or_recognise(uri, data, condition=_CREATE, write_id=write_id)
        bucket = uri.removeprefix("s3://").partition("/")[0]
        if bucket not in self._honours_create:
            etag = self._repeat_create(uri, data, write_id=write_id) or etag
            self._honours_create.add(bucket)
        return etag

    def _repeat_create(self, uri: str, data: bytes, *, write_id: str) -> str | None:
        """Create again what is there by now; that must fail, unless it was deleted meanwhile.

        Returns:
            The etag where it had been deleted, and is there once more.
        """
        try:
            etag = self._store.write(uri, data, condition=_CREATE, write_id=write_id)
        except Exception as error:
            if status_of(error) not in (409, 412):
                raise
            return None
        probe = _guard_of(f"{uri}.{write_id}")  # nobody else knows this name
        self._store.write(probe, b"", condition=_CREATE)
        try:
            self._store.write(probe, b"", condition=_CREATE)
        except Exception as error:
            if status_of(error) not in (409, 412):
                raise
            return etag
        finally:
            self._store.delete([probe])
        raise _make_ignored_error(uri, "If-None-Match")

    def _write_or_recognise(
        self, uri: str, data: bytes, *, condition: tuple[str, str], write_id: str
    ) -> str:
        try:
            return self._store.write(uri, data, condition=condition, write_id=write_id)
        except Exception as error:
            is_gone = condition[0] == "If-Match" and code_of(error) in _GONE_CODES
            if status_of(error) != 412 and not is_gone:
                raise
        return self._recognise(uri, self._store.look_up(uri), write_id=write_id)

    def _recognise(self, uri: str, head: Head | None, *, write_id: str) -> str:
        """Return the etag if an earlier try of the same write did it; a conflict otherwise."""
        if head is not None and head.write_id == write_id:
            return head.etag
        state = "is gone" if head is None else "exists or has changed"
        raise ConflictError(
            f"cannot write {uri!r}: it {state}; another writer was first: read it again"
        )

    def _put_guarded(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        head = self._store.look_up(uri)
        if _etag_of(head) != version:  # lost already, no need to queue
            return self._recognise(uri, head, write_id=write_id)
        with self._guard(_guard_of(uri), write_id) as check:
            head = self._store.look_up(uri)
            if _etag_of(head) != version:
                return self._recognise(uri, head, write_id=write_id)
            check()  # the last thing before the write: it may have been paused since
            return self._store.write(uri, data, write_id=write_id)

    @contextlib.contextmanager
    def _guard(self, guard: str, write_id: str) -> Iterator[Callable[[], None]]:
        """Hold the guard; give a check that raises ``RetryError`` once others may take it over."""
        taken_s = self._take_guard(guard, write_id)

        def check() -> None:
            if _now_s() - taken_s > GUARD_LIFE_S / 3:
                raise RetryError(f"paused for too long while holding {guard!r}")

        time.sleep(SETTLE_S)
        head = self._store.look_up(guard)
        if head is None or head.write_id != write_id:
            raise RetryError(f"another writer holds {guard!r}")
        try:
            yield check
        finally:
            release = functools.partial(self._store.delete, [guard])
            retry(release, action="delete", uri=guard, attempts=self._attempts)

    def _take_guard(self, guard: str, write_id: str) -> float:
        """Create the guard, waiting while another writer's is alive; return when, since boot."""
        waiting = False
        while True:
            taken_s = _now_s()
            try:
                self._create(guard, b"", write_id=write_id)
            except ConflictError:
                head = self._store.look_up(guard)
            else:
                return taken_s
            if head is not None and head.age_s > GUARD_LIFE_S:
                self._store.delete([guard])
            elif head is not None:
                if not waiting and head.age_s > GUARD_LIFE_S / 3:
                    waiting = True
                    left_s = GUARD_LIFE_S - head.age_s
                    _log.warning(
                        "%s was left by a writer that is paused or dead; waiting for up to %.0f s",
                        *(guard, left_s),
                    )
                time.sleep(SETTLE_S)


def _now_s() -> float:
    """Return seconds since boot, counting the time that the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _guard_of(uri: str) -> str:
    folder, _, name = uri.rpartition("/")
    return f"{folder}/{name_lock(name)}"


def _etag_of(head: Head | None) -> str | None:
    return None if head is None else head.etag


def _make_ignored_error(uri: str, header: str) -> StorageError:
    return StorageError(
        f"cannot write {uri!r} conditionally: this store ignores {header}, so two writers could "
        "both win; use a store that honours it"
    )
