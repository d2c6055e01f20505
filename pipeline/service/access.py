"""API keys, and who may listen where."""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SettingsError

MIN_KEY_CHARS = 16


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The accepted keys; an empty set lets everybody in.

    Attributes:
        digests: SHA-256 of each key: all equally long, so that comparing them tells no length.
    """

    digests: tuple[bytes, ...] = ()

    def accept(self, key: str) -> bool:
        """Tell whether ``key`` is one of them, in time that does not depend on it."""
        digest = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return any(matches)


def read_api_keys(path: str | None) -> ApiKeys:
    """Return the keys of a file: one a line, ``#`` starts a comment.

    Raises:
        SettingsError: The file cannot be read, holds no key, or one that is too short.
    """
    if path is None:
        return ApiKeys()
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read --api-key-file {path}: {error}") from error
    keys = [line.split("#")[0].strip() for line in lines]
    keys = [key for key in keys if key]
    if not keys:
        raise SettingsError(f"--api-key-file {path} holds no key; write one a line")
    if min(map(len, keys)) < MIN_KEY_CHARS:
        raise SettingsError(
            f"--api-key-file {path} has a key of fewer than {MIN_KEY_CHARS} characters; "
            "make one with: openssl rand -hex 24"
        )
    return ApiKeys(tuple(hashlib.sha256(key.encode()).digest() for key in keys))


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, has_keys: bool, allow_public: bool) -> None:
    """Refuse to serve strangers by accident.

    Raises:
        SettingsError: ``host`` is reachable from elsewhere, and neither keys nor consent exist.
    """
    if not is_loopback(host) and not has_keys and not allow_public:
        raise SettingsError(
            f"--host {host} is reachable from other machines and there are no API keys; "
            "pass --api-key-file FILE, or --allow-public to let everybody in"
        )
