"""What went wrong in a store: worth another try, or final, and what to tell the user."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from pipeline.errors import (
    AccessError,
    ConflictError,
    CredentialsError,
    ObjectMissingError,
    PipelineError,
    RetryError,
    StorageError,
    UnreachableError,
)

T = TypeVar("T")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 20.0

_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()

_PASSING_CODES = {
    "BadDigest",  # the body was damaged on its way
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_PASSING_ERRORS = (
    ConnectionError,
    TimeoutError,
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
)
_SHORTAGE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PASSING_ERRNOS = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT}
_PASSING_ERRNOS |= _SHORTAGE_ERRNOS
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}

_FRESH_CREDENTIALS = (
    "renew the credentials in the environment, the profile or the machine's role, and run again"
)


def retry(call: Callable[[], T], *, action: str, uri: str, attempts: int) -> T:
    """Return ``call()``, tried again with growing, jittered waits while its faults are passing.

    Args:
        call: One try. May raise whatever its library raises.
        action: What it does, for messages: ``"read"``, ``"write"``, …
        uri: On which object, for messages.
        attempts: How often to try in all.

    Raises:
        StorageError: The fault is final, or all tries failed; subclasses say more.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            fault = translate(error, action=action, uri=uri)
            if fault is None or (fault is error and not isinstance(fault, RetryError)):
                raise
            if not isinstance(fault, RetryError):
                raise fault from error
            if attempt == attempts:
                raise _give_up(fault, action=action, uri=uri, attempts=attempts) from error
        wait_s = _choose_wait(attempt)
        values = (action, uri, attempt, attempts, wait_s, fault)
        _log.warning("storage retry action=%s uri=%s attempt=%d/%d wait_s=%.2f error=%s", *values)
        time.sleep(wait_s)
    raise StorageError(f"cannot {action} {uri!r}: storage_attempts is {attempts}; use at least 1")


def _give_up(fault: RetryError, *, action: str, uri: str, attempts: int) -> UnreachableError:
    return UnreachableError(
        f"cannot {action} {uri!r}: failed {attempts} times, the last time with: {fault}; "
        "check the store and the network, or raise storage_attempts"
    )


def is_passing(error: BaseException) -> bool:
    """Tell whether another try may help."""
    return isinstance(translate(error, action="reach", uri=""), RetryError)


def translate(error: BaseException, *, action: str, uri: str) -> PipelineError | None:
    """Return the project's exception for ``error``, or None if it is none of a store's."""
    if isinstance(error, PipelineError):
        return error
    response = find_response(error)
    if response is not None:
        return _translate_response(response, action=action, uri=uri)
    if isinstance(error, _CREDENTIAL_ERRORS):
        return CredentialsError(
            f"cannot {action} {uri!r}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "a profile or a role, or choose anonymous access for a public bucket"
        )
    if isinstance(error, _PASSING_ERRORS):
        return RetryError(_describe(error))
    if isinstance(error, boto.BotoCoreError):
        return StorageError(f"cannot {action} {uri!r}: {error}; check the URI and the settings")
    if isinstance(error, OSError):
        return _translate_os_error(error, action=action, uri=uri)
    return None


def find_response(error: BaseException) -> dict[str, Any] | None:
    """Return the S3 answer behind ``error`` (``Error.Code``, ``ResponseMetadata``), if any."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return response
    return None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the S3 answer behind ``error``, if any."""
    response = find_response(error)
    if response is None:
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status is not None else None


def code_of(error: BaseException) -> str | None:
    """Return the error code of the S3 answer behind ``error``, if any."""
    response = find_response(error)
    return None if response is None else str(response["Error"].get("Code", ""))


def _translate_response(response: dict[str, Any], *, action: str, uri: str) -> PipelineError:
    code = str(response["Error"].get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    reason = str(response["Error"].get("Message", "")).rstrip(".")
    said = ": ".join(filter(None, [code or f"status {status}", reason]))
    cannot = f"cannot {action} {uri!r}: the store says {said}"
    if code in _PASSING_CODES or status in (408, 429) or (status >= 500 and status != 501):
        return RetryError(said)
    if code in _CREDENTIAL_CODES or (code == "400" and action == "look up"):
        # A HEAD has no body: expired credentials show there as a bare 400.
        return CredentialsError(f"{cannot}; {_FRESH_CREDENTIALS}")
    if code == "InvalidObjectState":
        return StorageError(f"{cannot}; the object is archived: restore it first")
    if status in (401, 403):
        return AccessError(
            f"{cannot}; allow it in the bucket's or the role's policy (without permission to "
            "list, a missing object looks like this too), or fix the credentials"
        )
    if status == 404:
        return ObjectMissingError(f"{cannot}; check the bucket, the key and the endpoint")
    if status == 412:
        return ConflictError(f"{cannot}; another writer was first: read it again")
    if status == 501:
        return StorageError(f"{cannot}; use a store that supports this request")
    return StorageError(f"{cannot}; check the URI and the settings")


def _translate_os_error(error: OSError, *, action: str, uri: str) -> PipelineError:
    cannot = f"cannot {action} {uri!r}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError) or error.errno in _MISSING_ERRNOS:
        return ObjectMissingError(f"{cannot}; check the path")
    if isinstance(error, PermissionError) or error.errno in _DENIED_ERRNOS:
        return AccessError(f"{cannot}; give this user the permission, or choose another path")
    if error.errno in _FULL_ERRNOS:
        return StorageError(f"{cannot}; free some space there, or choose another path")
    if error.errno in _PASSING_ERRNOS:
        return RetryError(_describe(error))
    return StorageError(f"{cannot}; check the disk and the path")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _choose_wait(attempt: int) -> float:
    """Return seconds to wait after a failed try, counted from 1: doubling, half of it random."""
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1))
    return _jitter.uniform(longest / 2, longest)
