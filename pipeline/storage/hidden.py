"""Names of the files that storage makes for itself, beside the objects they are about."""

import re
import uuid
from hashlib import sha256

_OWN = re.compile(r"\.~(?:lock-)?[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.~[0-9a-f]{32}")


def name_unfinished() -> str:
    """Return a new name for a file that is still being written; short, so that it always fits."""
    return f".~{uuid.uuid4().hex}"


def name_lock(name: str) -> str:
    """Return the name of the lock of the object ``name`` in the same folder."""
    return f".~lock-{sha256(name.encode()).hexdigest()[:32]}"


def is_listed(path: str) -> bool:
    """Tell whether a listing shows ``path``: neither a folder marker nor one of our own files."""
    name = path.rpartition("/")[2]
    return bool(name) and _OWN.fullmatch(name) is None


def is_unfinished(path: str) -> bool:
    """Tell whether ``path`` names a file being written; it stays if its writer is killed."""
    return _UNFINISHED.fullmatch(path.rpartition("/")[2]) is not None
