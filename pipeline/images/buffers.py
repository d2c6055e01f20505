"""Buffers for batches of crops, in memory that decode processes write and this process reads."""

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ShortageError

Pixels = NDArray[np.uint8]

MAX_PROCESSES = 8192
_NOTE_BYTES = 8 * MAX_PROCESSES


@dataclass(frozen=True, slots=True)
class Buffer:
    """Room for one batch.

    Attributes:
        number: Position in the shared memory.
        pixels: uint8 (batch size, S, S, 3).
    """

    number: int
    pixels: Pixels


class SharedBuffers:
    """A file without a name, in memory, that grows by one buffer at a time.

    It begins with a note for each decode process: which image it is at work on. A process that
    was handed ``fd`` maps the same memory with ``SharedBuffers(batch_size, image_size, fd=fd)``,
    each buffer when it is first asked for.

    Args:
        batch_size: Crops in a buffer.
        image_size: Side of a crop, pixels.
        fd: The file, where another process made it.
        pin: Called with each new buffer's pixels, e.g. to make it known to a GPU's driver.

    Attributes:
        batch_size: Crops in a buffer.
        fd: The file.
        notes: int64 (MAX_PROCESSES,); 0 where a process is at work on nothing.
    """

    def __init__(
        self,
        batch_size: int,
        image_size: int,
        *,
        fd: int | None = None,
        pin: Callable[[Pixels], None] = lambda _: None,
    ) -> None:
        self.batch_size = batch_size
        self._shape = (batch_size, image_size, image_size, 3)
        self._stride = -(-int(np.prod(self._shape)) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pin = pin
        self._lock = threading.Lock()
        self._mapped: list[Pixels] = []
        self._spare: list[Buffer] = []
        self.fd = make_memory_file() if fd is None else fd
        self._close = weakref.finalize(self, os.close, self.fd)
        if fd is None:
            _reserve(self.fd, 0, _NOTE_BYTES)
        self.notes = np.frombuffer(mmap.mmap(self.fd, _NOTE_BYTES), np.int64)

    def take(self) -> Buffer:
        """Return a buffer that nobody uses, of any content; makes one if there is none.

        Raises:
            ShortageError: There is no memory for it.
        """
        with self._lock:
            if self._spare:
                return self._spare.pop()
            number = len(self._mapped)
            try:
                _reserve(self.fd, self._locate(number), self._stride)
                pixels = self._map(number)
            except OSError as error:
                raise ShortageError(
                    f"there is no memory for a batch of {self.batch_size} crops ({error}); give "
                    "the machine more memory, or lower --batch-size"
                ) from error
            self._pin(pixels)
            return Buffer(number, pixels)

    def give_back(self, buffer: Buffer) -> None:
        """Let others use a buffer."""
        with self._lock:
            self._spare.append(buffer)

    def find(self, number: int) -> Pixels:
        """Return the pixels of a buffer that the process at the other end has taken."""
        while len(self._mapped) <= number:
            self._map(len(self._mapped))
        return self._mapped[number]

    def close(self) -> None:
        """Close the file; what is mapped stays until nobody holds it any more."""
        self._close()

    def _locate(self, number: int) -> int:
        return _NOTE_BYTES + number * self._stride

    def _map(self, number: int) -> Pixels:
        memory = mmap.mmap(self.fd, self._stride, offset=self._locate(number))
        flat = np.frombuffer(memory, np.uint8, count=int(np.prod(self._shape)))
        self._mapped.append(flat.reshape(self._shape))
        return self._mapped[-1]


def _reserve(fd: int, start: int, nbytes: int) -> None:
    """Let a file grow, with its memory at once: later, a shortage would kill whoever writes."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, start, nbytes)
    else:
        os.truncate(fd, start + nbytes)


def make_memory_file() -> int:
    """Return the descriptor of a new file in memory, or on disk where the system has no such.

    Raises:
        OSError: There is no memory or no descriptor left.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
