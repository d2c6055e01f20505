"""Tells a machine that is short of memory or descriptors from data that asks for too much."""

import errno
import mmap

_ERRORS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOSPC}
_SPARE_BYTES = 64 * 2**20


def is_shortage(error: Exception, *, needed_bytes: int = 0) -> bool:
    """Return whether the machine may be to blame for a failure, rather than the data.

    Libraries report a failed allocation in many ways, or as damage. So whatever an error says, it
    is the data's only if the memory that good data would have needed is there to be had.

    Args:
        error: What was raised while data was decoded.
        needed_bytes: Memory that good data of this size can need.
    """
    if isinstance(error, OSError) and error.errno in _ERRORS:
        return True
    try:
        mmap.mmap(-1, _SPARE_BYTES + needed_bytes).close()
    except (OSError, MemoryError):
        return True
    return False
