"""A decode process as its owner sees it: started, sent tasks, watched, and its death explained."""

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.images.buffers import SharedBuffers, make_memory_file
from pipeline.images.decoder import (
    SHORTAGE_EXIT,
    Outcome,
    Setup,
    Task,
    read_note,
    receive_outcomes,
    send_task,
)

_PROGRAM = "from pipeline.images.decoder import main; main()"
_LONGEST_SLICE_S = 1.0
_SLICES = 4
_LAST_WORDS_S = 5.0
_OWN_FAULTS = {
    *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
    *(signal.SIGTRAP, signal.SIGSYS),
}

Cause = Literal["overran", "crashed", "shortage"]


@dataclass(frozen=True, slots=True)
class Death:
    """Why a decode process is no more.

    Attributes:
        cause: It overran the time limit, crashed by itself, or was ended from outside or by a
            shortage of memory.
        words: The signal or the exit code.
        task: Number of the task that it was at work on; 0 for none.
        index: Position in that task of the image that it was at work on.
    """

    cause: Cause
    words: str
    task: int
    index: int


class DecodeProcess:
    """A child process that decodes.

    Args:
        setup: What it is told.
        buffers: Where it writes crops.
        cell: Its place among the notes there.

    Raises:
        OSError: The system has no memory, descriptor or process left for it.
    """

    def __init__(self, setup: Setup, buffers: SharedBuffers, cell: int) -> None:
        self._timeout_s = setup.timeout_s
        self._buffers, self._cell = buffers, cell
        self._last_task = 0
        self._killed_at = 0  # the note of the image that it was ended for
        buffers.notes[cell] = 0
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._child = _start_program(theirs.fileno(), buffers.fd, cell)
        except OSError:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._poll = select.poll()
        self._poll.register(self._channel, select.POLLIN)
        with suppress(ConnectionError):  # it is gone already, as receive() will find
            self._channel.send(pickle.dumps(setup))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def send(self, images: Sequence[bytes | memoryview], places: Sequence[tuple[int, int]]) -> int:
        """Hand it a task; return the task's number.

        Raises:
            OSError: There is no memory or descriptor left for the file of the images.
        """
        task = Task(self._last_task + 1, tuple(map(len, images)), tuple(places))
        file = make_memory_file()
        try:
            _write_images(file, images)
            with suppress(ConnectionError):  # it is gone, as receive() will find
                send_task(self._channel, task, file)
        finally:
            os.close(file)
        self._last_task = task.number
        return task.number

    def receive(self) -> list[Outcome] | Death:
        """Wait for the outcomes of the oldest task, or explain why there will be none.

        The time limit counts CPU time, which the kernel holds the process to, and apart from that
        the slices of time in which it waits for something that never happens. Time in which it is
        stopped, swapped out or without a core counts for neither, and a slice that the whole
        machine sleeps through counts once.
        """
        slice_s = min(_LONGEST_SLICE_S, self._timeout_s / _SLICES)
        last_note, waited_s = 0, 0.0
        while not self._poll.poll(1e3 * slice_s):
            note = int(self._buffers.notes[self._cell])
            if note != last_note:
                last_note, waited_s = note, 0.0
            elif note and _read_state(self.pid) == "S":
                waited_s += slice_s
            if waited_s >= self._timeout_s:
                self._killed_at = note
                self._child.kill()
        outcomes = receive_outcomes(self._channel)
        return self._explain_death() if outcomes is None else outcomes

    def kill(self) -> None:
        """End it at once, from any thread; ``receive`` will tell of its death."""
        self._child.kill()

    def end(self) -> None:
        """End it, and leave nothing of it behind."""
        self._child.kill()
        self._child.wait()
        self._channel.close()

    def _explain_death(self) -> Death:
        try:
            code = self._child.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:  # it closed its end, and lives
            code = os.EX_SOFTWARE
        self.end()
        note = int(self._buffers.notes[self._cell])
        if note and note == self._killed_at:
            return Death("overran", "it waits for something", *read_note(note))
        return Death(*explain_exit(code), *read_note(note))


def explain_exit(code: int) -> tuple[Cause, str]:
    """Return the cause of an exit code, or of a signal where it is negative, and its name."""
    if code == -signal.SIGPROF:
        return "overran", "SIGPROF"
    if code == SHORTAGE_EXIT:
        return "shortage", "short of memory"
    if code >= 0:
        return "crashed", f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return ("crashed" if -code in _OWN_FAULTS else "shortage"), name


def _start_program(channel: int, memory: int, cell: int) -> "subprocess.Popen[bytes]":
    """Start a clean interpreter that finds the modules that this one finds."""
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    numbers = [str(number) for number in (os.getpid(), channel, memory, cell)]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, *numbers],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        pass_fds=(channel, memory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def _write_images(file: int, images: Sequence[bytes | memoryview]) -> None:
    """Write images to a file in one call, which needs the interpreter's lock for none of it."""
    written, total = os.writev(file, images), sum(map(len, images))
    while written < total:  # the system writes at most 2 GiB at once
        written += os.write(file, memoryview(b"".join(images))[written:])
    os.lseek(file, 0, os.SEEK_SET)


def _read_state(pid: int) -> str:
    """Return the kernel's letter for what a process does; ``S`` waits for something."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
