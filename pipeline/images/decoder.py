"""The program of a decode process: reads groups of encoded images, writes crops into batches.

It imports neither torch nor pyarrow. Whatever a decoder does to it, it ends alone: the kernel ends
it when an image has used up its CPU time, when the process that owns it is gone, and when it asks
for more memory than any image within the limits needs.
"""

import ctypes
import os
import pickle
import resource
import signal
import socket
import sys
from dataclasses import dataclass

from PIL import AvifImagePlugin, Image

from pipeline.errors import RecordError, ShortageError
from pipeline.images.buffers import Pixels, SharedBuffers
from pipeline.images.decode import image_digest
from pipeline.images.host import CropRecipe, make_crop

GROUP_IMAGES = 16
"""Most images in a task."""

SHORTAGE_EXIT = os.EX_TEMPFAIL
"""Exit code of a process that ran short of memory or descriptors."""

_MESSAGE_BYTES = 2**17
_REASON_CHARS = 1000
_INDEX_BITS = 16
_BYTES_PER_PIXEL = 64  # of the hungriest decoder (JPEG 2000) and conversion (deep grey)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings that a decode process gets when it starts.

    Attributes:
        recipe: How encoded bytes become a crop.
        timeout_s: Most CPU time for one image, seconds.
        batch_size: Crops in a buffer.
    """

    recipe: CropRecipe
    timeout_s: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Task:
    """A group of images to decode; their bytes lie in a file that comes with it.

    Attributes:
        number: Counts the tasks of a process, from 1.
        lengths: Bytes of each encoded image.
        places: Buffer and row where each crop goes.
    """

    number: int
    lengths: tuple[int, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image.

    Attributes:
        status: ``"ok"``, or why there is no crop.
        reason: In words, when it is not.
        width: Width of the original image, pixels; 0 where there is no crop.
        height: Height of the original image, likewise.
        digest: First 16 bytes of the SHA-256 of the encoded image; None without any bytes.
        decode_s: CPU time to decode it.
        transform_s: CPU time for the rest.
    """

    status: str
    reason: str | None = None
    width: int = 0
    height: int = 0
    digest: bytes | None = None
    decode_s: float = 0.0
    transform_s: float = 0.0


def write_note(task: int, index: int) -> int:
    """Return what a process notes when it begins with an image of a task."""
    return task << _INDEX_BITS | index


def read_note(note: int) -> tuple[int, int]:
    """Return the task and the index that were noted; (0, 0) where it was at work on nothing."""
    return note >> _INDEX_BITS, note & (1 << _INDEX_BITS) - 1


def send_task(channel: socket.socket, task: Task, file: int) -> None:
    """Send a task with the file of its images."""
    socket.send_fds(channel, [pickle.dumps(task)], [file])


def receive_outcomes(channel: socket.socket) -> list[Outcome] | None:
    """Return the outcomes of the oldest task; None when the process is gone."""
    try:
        message = channel.recv(_MESSAGE_BYTES)
    except ConnectionResetError:  # said once where a task was never read; what it sent comes next
        message = channel.recv(_MESSAGE_BYTES)
    return pickle.loads(message) if message else None


def main() -> None:
    """Decode until the owner hangs up; its pid, the socket and the memory are the arguments."""
    owner, channel_fd, memory_fd, cell = map(int, sys.argv[1:])
    _depend_on(owner)
    channel = socket.socket(fileno=channel_fd)
    setup: Setup = pickle.loads(channel.recv(_MESSAGE_BYTES))
    buffers = SharedBuffers(setup.batch_size, setup.recipe.data_config.image_size, fd=memory_fd)
    _bound_resources(setup.recipe)
    Image.init()  # loads the formats now, and not in the first image's time
    try:
        _serve(channel, setup, buffers, cell)
    except (ShortageError, MemoryError):
        os._exit(SHORTAGE_EXIT)


def _depend_on(owner: int) -> None:
    """Die when the owner does, even in the middle of an image; end no other way by signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the whole terminal; the owner decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != owner:
        sys.exit()  # it was gone before


def _bound_resources(recipe: CropRecipe) -> None:
    limits = recipe.limits
    needed = _BYTES_PER_PIXEL * limits.max_pixels + 4 * limits.max_image_bytes + 2**30
    for kind, most in ((resource.RLIMIT_AS, needed), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (soft, hard))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as many processes as cores decode already


def _serve(channel: socket.socket, setup: Setup, buffers: SharedBuffers, cell: int) -> None:
    while True:
        message, fds, *_ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
        if not message:
            return
        task: Task = pickle.loads(message)
        outcomes = []
        with open(fds[0], "rb") as file:  # noqa: PTH123 - a descriptor
            for index, length in enumerate(task.lengths):
                data = file.read(length)
                number, row = task.places[index]
                buffers.notes[cell] = write_note(task.number, index)
                # the kernel ends this process when so much CPU time is used up
                signal.setitimer(signal.ITIMER_PROF, setup.timeout_s)
                outcomes.append(_decode(data, setup.recipe, buffers.find(number)[row]))
        buffers.notes[cell] = 0
        channel.send(pickle.dumps(outcomes))


def _decode(data: bytes, recipe: CropRecipe, place: Pixels) -> Outcome:
    try:
        crop = make_crop(data, recipe)
    except RecordError as error:
        digest = image_digest(data) if data else None
        return Outcome(error.status, error.reason[:_REASON_CHARS], digest=digest)
    place[:] = crop.pixels
    return Outcome(
        "ok",
        width=crop.width,
        height=crop.height,
        digest=crop.digest,
        decode_s=crop.decode_s,
        transform_s=crop.transform_s,
    )
