"""One live run per output: a lease object that its holder keeps fresh.

The lease saves work; it is not what keeps rows exact. Content-derived names do that even if two
runs write at once.
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
"""Longest that the end of a run waits for a store that does not take its lease back."""


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
    """

    run_id: str
    host: str
    boot: str
    pid: int
    started: str
    renewed_s: float

    @classmethod
    def here(cls, run_id: str) -> "Holder":
        """Return this process as a holder."""
        pid = os.getpid()
        host = socket.gethostname()
        return cls(run_id, host, _read_boot(), pid, _read_start(pid), time.time())

    def to_json(self) -> bytes:
        """Serialise for the lease object."""
        return json.dumps(asdict(self)).encode()


def _read_boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _read_start(pid: int) -> str:
    """Return when a process started, ``""`` where the system does not tell, or raise if gone."""
    os.kill(pid, 0)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _is_alive(holder: Holder) -> bool:
    try:
        return _read_start(holder.pid) == holder.started
    except ProcessLookupError:
        return False
    except PermissionError:
        return True


class Lease:
    """The right to write to an output; a context manager.

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
        self._version = ""
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
        """Give the lease back; a store in trouble gets it back later, or finds its holder dead."""
        self._stop.set()
        self._thread.join(END_S)

    def check(self) -> None:
        """Raise if another run took the lease over.

        Raises:
            LeaseError: The lease was lost.
        """
        if self._lost is not None:
            raise LeaseError(self._lost)

    def _give_back(self) -> None:
        # A lease that storage will not delete belongs to a dead process soon; no error for that.
        with suppress(StorageError):
            if self._storage.read_versioned(self._uri)[1] == self._version:
                self._storage.delete([self._uri])

    def _acquire(self) -> str:
        mine = Holder.here(self._run_id).to_json()
        for _ in range(3):
            try:
                return self._storage.put_if_absent(self._uri, mine)
            except ConflictError:
                pass
            try:
                data, version = self._storage.read_versioned(self._uri)
            except ObjectMissingError:
                continue
            self._await_death(data, version)
            try:
                return self._storage.put_if_version(self._uri, mine, version)
            except (ConflictError, ObjectMissingError):
                continue
        raise LeaseError(f"{self._uri} keeps changing hands; another run is starting as well")

    def _await_death(self, data: bytes, version: str) -> None:
        holder = self._parse(data)
        if holder is None or holder.boot == _read_boot():
            if holder is None or not _is_alive(holder):
                return
            raise LeaseError(self._describe(holder))
        # Clocks of two machines differ, so only a lease seen unchanged here for long is dead;
        # one that is stale by its own clock by an hour needs no waiting.
        if time.time() - holder.renewed_s > 60 * self._expire_s:
            return
        _log.info(
            "lease of another machine run=%s host=%s; taken over if unchanged for %g s",
            *(holder.run_id, holder.host, self._expire_s),
        )
        deadline = time.monotonic() + self._expire_s
        while time.monotonic() < deadline:
            self._stop.wait(min(RENEW_S, self._expire_s / 4))
            try:
                if self._storage.read_versioned(self._uri)[1] != version:
                    raise LeaseError(self._describe(holder))
            except ObjectMissingError:
                return

    def _parse(self, data: bytes) -> Holder | None:
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def _describe(self, holder: Holder) -> str:
        return (
            f"run {holder.run_id} (process {holder.pid} on {holder.host}) is writing there now: "
            f"{self._uri}; wait for it to end, or stop it"
        )

    def _renew(self) -> None:
        while not self._stop.wait(min(RENEW_S, self._expire_s / 4)):
            try:
                data = Holder.here(self._run_id).to_json()
                self._version = self._storage.put_if_version(self._uri, data, self._version)
            except (ConflictError, ObjectMissingError):
                self._lost = f"another run took {self._uri} over; this one stops"
                return
            except StorageError:
                continue  # a passing fault; the next renewal may pass, and expiry allows several
        self._give_back()
