"""One live run per output: a lease object that its holder keeps fresh.

The lease saves work; it is not what keeps rows exact. Names from content and conditional commits do
that even if two runs write at once.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pipeline.errors import ConflictError, LeaseError, ObjectMissingError, StorageError
from pipeline.storage import Storage, join_uri

_log = logging.getLogger(__name__)

RENEW_S = 10.0
EXPIRE_S = 60.0
END_S = 30.0
"""Longest that the end of a run waits for a store in trouble to release its lease."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease.

    Attributes:
        run_id: The run.
        host: Name of its machine.
        boot: Identity of that machine's boot and process namespace; process ids mean something
            only within it.
        pid: Its process.
        started: When that process started, in clock ticks since boot; ids are reused.
        renewed_s: When it last renewed the lease, in seconds since 1970 by its own clock.
        takeovers: How many holders before it, one after the other, did not give the lease back.
    """

    run_id: str
    host: str
    boot: str
    pid: int
    started: str
    renewed_s: float
    takeovers: int = 0

    @classmethod
    def here(cls, run_id: str, *, takeovers: int = 0) -> "Holder":
        """Return this process as a holder."""
        pid = os.getpid()
        host = socket.gethostname()
        return cls(run_id, host, _read_boot(), pid, _read_start(pid), time.time(), takeovers)

    def to_json(self) -> bytes:
        """Serialise for the lease object."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Holder | None":
        """Read ``to_json``; None where the object holds anything else."""
        try:
            values = json.loads(data)
            holder = cls(**values)
        except (ValueError, TypeError):
            return None
        texts = (holder.run_id, holder.host, holder.boot, holder.started)
        numbers = (type(holder.pid), type(holder.takeovers))
        fits = all(isinstance(text, str) for text in texts) and numbers == (int, int)
        return holder if fits and holder.pid > 0 else None


def _read_boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _read_start(pid: int) -> str:
    """Return when a process started, in clock ticks since boot.

    Returns:
        ``""`` where the system does not tell.

    Raises:
        ProcessLookupError: There is no such process, or only its exit status is left (a zombie).
    """
    os.kill(pid, 0)
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    if values[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return values[19]


def _now_s() -> float:
    """Return seconds since boot, counting the time that the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _is_alive(holder: Holder) -> bool:
    try:
        return _read_start(holder.pid) == holder.started
    except ProcessLookupError:
        return False
    except PermissionError:
        return True


class Lease:
    """The right to write to an output; a context manager.

    Attribute ``takeovers`` counts the holders before, one after the other, that did not give it
    back.

    Args:
        output: The output.
        run_id: The run that wants it.
        storage: How to reach the output.
        name: Name of the lease object under the output.
        expire_s: A lease of another machine that stays unchanged for this long is dead.
    """

    def __init__(
        self,
        output: str,
        run_id: str,
        *,
        storage: Storage,
        name: str = "lease.json",
        expire_s: float = EXPIRE_S,
    ) -> None:
        self._uri = join_uri(output, name)
        self._run_id = run_id
        self._storage = storage
        self._expire_s = expire_s
        self.takeovers = 0
        self._version = ""
        self._renewed_s = _now_s()
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            LeaseError: A live run holds it; says which, where, and what to do.
        """
        self._version = self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lease; if the store fails, it expires."""
        self._stop.set()
        self._thread.join(END_S)

    def check(self) -> None:
        """Return only while this run holds the lease; call it before every write that counts.

        A process that was paused (a virtual machine, SIGSTOP, swapping) for longer than a lease
        lives may have lost it without having heard. So a lease that was not renewed for half that
        time is renewed here, and that fails if another run has taken it over.

        Raises:
            LeaseError: Another run took the lease over.
            StorageError: The store does not let it be renewed.
        """
        if self._lost is None and _now_s() - self._renewed_s > self._expire_s / 2:
            self._renew_once()
        if self._lost is not None:
            raise LeaseError(self._lost)

    def _give_back(self) -> None:
        # A lease that storage does not delete expires; that is no error.
        with suppress(StorageError):
            data, version = self._storage.read_versioned(self._uri)
            if self._is_own(data):
                self._storage.delete_if_version(self._uri, version)

    def _is_own(self, data: bytes) -> bool:
        holder = Holder.from_json(data)
        return holder is not None and holder.run_id == self._run_id

    def _acquire(self) -> str:
        for _ in range(3):
            self.takeovers = 0
            self._renewed_s = _now_s()
            try:
                return self._storage.put_if_absent(self._uri, self._describe_self())
            except ConflictError:
                pass
            try:
                data, version = self._storage.read_versioned(self._uri)
            except ObjectMissingError:
                continue
            self._await_death(data, version)
            dead = Holder.from_json(data)
            self.takeovers = 1 + (dead.takeovers if dead else 0)
            self._renewed_s = _now_s()
            try:
                return self._storage.put_if_version(self._uri, self._describe_self(), version)
            except (ConflictError, ObjectMissingError):
                continue
        raise LeaseError(f"{self._uri} keeps changing hands; another run is starting as well")

    def _describe_self(self) -> bytes:
        return Holder.here(self._run_id, takeovers=self.takeovers).to_json()

    def _await_death(self, data: bytes, version: str) -> None:
        """Return once the holder is dead.

        A process of this machine can be looked up. Any other is dead when its lease stays unchanged
        for ``expire_s`` by this machine's clock; what its own clock says does not count.

        Raises:
            LeaseError: The holder lives.
        """
        holder = Holder.from_json(data)
        if holder is not None and holder.boot == _read_boot():
            if not _is_alive(holder):
                return
            raise LeaseError(self._describe(holder))
        who = "an unknown holder" if holder is None else f"run {holder.run_id} on {holder.host}"
        _log.warning(
            "%s is held by %s; waiting %g s to see whether it is renewed, then taking it over",
            *(self._uri, who, self._expire_s),
        )
        deadline = time.monotonic() + self._expire_s
        while time.monotonic() < deadline:
            self._stop.wait(min(RENEW_S, self._expire_s / 4))
            try:
                if self._storage.read_versioned(self._uri)[1] != version:
                    raise LeaseError(self._describe(holder))
            except ObjectMissingError:
                return

    def _describe(self, holder: Holder | None) -> str:
        if holder is None:
            return f"another program keeps changing {self._uri}; stop it, or use another --output"
        return (
            f"run {holder.run_id} (process {holder.pid} on {holder.host}) is writing there now: "
            f"{self._uri}; wait for it to end, or stop it"
        )

    def _renew(self) -> None:
        while not self._stop.wait(min(RENEW_S, self._expire_s / 4)):
            with suppress(StorageError):  # the next renewal may pass; expiry allows several
                self._renew_once()
            if self._lost is not None:
                return
        self._give_back()

    def _renew_once(self) -> None:
        with self._renewing:
            asked_s = _now_s()
            data = self._describe_self()
            try:
                self._version = self._write_again(data)
            except (ConflictError, ObjectMissingError):
                self._lost = f"another run took {self._uri} over; this one stops"
                return
            self._renewed_s = asked_s

    def _write_again(self, data: bytes) -> str:
        """Replace the lease while it is this run's; return its version.

        The reply to an earlier renewal may have been lost, so that its version is not known here.
        """
        try:
            return self._storage.put_if_version(self._uri, data, self._version)
        except ConflictError:
            found, version = self._storage.read_versioned(self._uri)
            if not self._is_own(found):
                raise
            return self._storage.put_if_version(self._uri, data, version)
