"""Errors as ``application/problem+json`` (RFC 9457): a code for programs, a sentence for people."""

from typing import Any

from starlette.responses import JSONResponse

from pipeline.errors import QueryError, UnknownKeyError

TITLES = {
    400: "Bad request",
    401: "No valid API key",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    408: "Request timeout",
    409: "Conflict",
    410: "Gone",
    413: "Body too large",
    415: "Unsupported media type",
    421: "Unknown host",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    501: "Not offered here",
    503: "Not available now",
    504: "Time limit passed",
}


class Problem(Exception):  # noqa: N818  # the name the standard gives it
    """An answer other than success; ``detail`` may be shown to anybody.

    Attributes:
        status: HTTP status.
        code: Stable word for programs, e.g. ``"unknown_key"``.
        detail: A sentence for people; never a path, an address or a traceback.
        retry_after_s: When trying again makes sense, or None.
        where: Path into the request body, e.g. ``"query.vector"``, or None.
    """

    def __init__(
        self,
        status: int,
        code: str,
        *,
        detail: str,
        retry_after_s: float | None = None,
        where: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.where = where

    def locate(self, path: str) -> "Problem":
        """Return the same problem of a request that is at ``path`` in a larger one."""
        where = path if self.where is None else f"{path}.{self.where}"
        return Problem(
            self.status,
            self.code,
            detail=self.detail,
            retry_after_s=self.retry_after_s,
            where=where if self.status < 500 else self.where,  # those are not the request's fault
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        return body if self.where is None else body | {"where": self.where}

    def to_response(self) -> JSONResponse:
        """Return the answer, ``Retry-After`` in whole seconds included."""
        headers = {"Cache-Control": "no-store"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(
            self.to_dict(),
            status_code=self.status,
            headers=headers,
            media_type="application/problem+json",
        )


def explain_query(error: QueryError | UnknownKeyError) -> Problem:
    """Return the answer to a query that the index refuses."""
    if isinstance(error, UnknownKeyError):
        return Problem(404, "unknown_key", detail="no image of this key is indexed")
    return Problem(422, "invalid_query", detail=str(error))


def overloaded(what: str, *, retry_after_s: float = 1.0) -> Problem:
    """Return the answer of a full queue."""
    return Problem(
        503,
        "overloaded",
        detail=f"too many {what} are waiting; try again in a moment",
        retry_after_s=retry_after_s,
    )
