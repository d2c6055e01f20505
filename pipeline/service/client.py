"""A client of the lookup service."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt

from pipeline.errors import AccessError, QueryError, ServiceError, UnknownKeyError
from pipeline.service.schema import (
    BatchResponse,
    EmbedResponse,
    Info,
    Item,
    Result,
    SampleResponse,
    SearchResponse,
    decode_vector,
    encode_image,
    encode_vector,
)

Filter = Mapping[str, Any] | str
_RETRIED = frozenset({429, 502, 503, 504})
_MAX_WAIT_S = 10.0


class Client:
    """Asks a lookup service; safe to share between threads.

    Requests that were turned away because too much was going on are tried again, as the service
    says when.

    Example:
        >>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
        ...     found = client.search(image="cat.jpg", k=5, filter="width >= 400")
        ...     for result in found.results:
        ...         print(result.key, result.score)
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        attempts: int = 4,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: Where the service listens.
            api_key: Sent with every request.
            timeout_s: Longest wait for an answer.
            attempts: How often a request is tried while the service is busy.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._attempts = attempts
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout_s, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(
        self,
        *,
        key: str | None = None,
        vector: npt.ArrayLike | None = None,
        image: bytes | str | Path | None = None,
        k: int = 10,
        **options: Any,
    ) -> SearchResponse:
        """Return the nearest neighbours of one of: an indexed image, a vector, a picture.

        Args:
            key: Key of an indexed image; it is left out of its own neighbours.
            vector: An embedding of the index's space, shape (dim,).
            image: An encoded image, or the path of one.
            k: Neighbours to return.
            options: ``offset``, ``filter``, ``score_threshold``, ``include``, ``exact``,
                ``space``, as the API has them.

        Raises:
            QueryError: The service cannot answer this; the message says why.
            UnknownKeyError: No image of this key is indexed.
            AccessError: The API key is missing or wrong.
            ServiceError: The service cannot be reached, is broken, or stayed busy.
        """
        body = make_search(key=key, vector=vector, image=image, k=k, **options)
        return SearchResponse.model_validate_json(self._post("v1/search", body))

    def search_batch(self, searches: Sequence[Mapping[str, Any]]) -> list[SearchResponse]:
        """Return the answers to several searches, all from one generation.

        Args:
            searches: Keyword arguments of ``search``, one mapping a search.

        Raises:
            QueryError: One of them cannot be answered. As ``search`` for the others.
        """
        body = {"searches": [make_search(**search) for search in searches]}
        data = self._post("v1/search/batch", body)
        return BatchResponse.model_validate_json(data).responses

    def embed(self, images: Sequence[bytes | str | Path]) -> npt.NDArray[np.float32]:
        """Return the embeddings of images, float32, shape (n, dim).

        Raises:
            QueryError: One cannot be decoded, or the service has no backbone loaded.
        """
        body = {"images_base64": [encode_image(_read(image)) for image in images]}
        answer = EmbedResponse.model_validate_json(self._post("v1/embed", body))
        texts = answer.vectors_base64
        return np.stack([decode_vector(text, where="vectors_base64") for text in texts])

    def item(self, key: str, *, neighbours: int = 0, vector: bool = False) -> Item:
        """Return what is known of an indexed image.

        Raises:
            UnknownKeyError: No image of this key is indexed.
        """
        wanted = {"key": key, "neighbours": neighbours, "vector": vector}
        return Item.model_validate_json(self._get("v1/item", wanted))

    def image(self, key: str, *, size: int | None = None) -> bytes:
        """Return an indexed image as it is stored, or a thumbnail of 64, 256 or 512 pixels.

        Raises:
            UnknownKeyError: No image of this key is indexed.
            QueryError: Its source has changed or is gone, or images are not shown.
        """
        return self._get("v1/image", {"key": key, "size": str(size or "original")})

    def sample(self, n: int = 12, *, filter: str = "") -> list[Result]:  # noqa: A002
        """Return some indexed images, drawn at random; only those that fulfil ``filter``."""
        wanted = {"n": n, "filter": filter}
        return SampleResponse.model_validate_json(self._get("v1/sample", wanted)).items

    def info(self) -> Info:
        """Return what is being served."""
        return Info.model_validate_json(self._get("v1/info", {}))

    def is_ready(self) -> bool:
        """Tell whether the service is there and answers."""
        try:
            return self._http.get("readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _get(self, path: str, params: Mapping[str, Any]) -> bytes:
        return self._send(self._http.build_request("GET", path, params=dict(params)))

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        return self._send(self._http.build_request("POST", path, json=dict(body)))

    def _send(self, request: httpx.Request) -> bytes:
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                response = self._http.send(request)
            except httpx.TransportError as error:
                if last or isinstance(error, httpx.TimeoutException):
                    raise ServiceError(f"no answer from {request.url}: {error}") from error
                time.sleep(min(_MAX_WAIT_S, 0.2 * 2**attempt))
                continue
            if response.is_success:
                return response.content
            if response.status_code not in _RETRIED or last:
                raise _explain(response)
            time.sleep(_find_wait(response, attempt))
        raise ServiceError(f"{request.url} was not asked; attempts must be at least 1")


def make_search(
    *,
    key: str | None = None,
    vector: npt.ArrayLike | None = None,
    image: bytes | str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the body of a search.

    Raises:
        QueryError: Not exactly one of ``key``, ``vector`` and ``image`` is given.
    """
    query: dict[str, str] = {}
    if key is not None:
        query["key"] = key
    if vector is not None:
        query["vector_base64"] = encode_vector(np.asarray(vector, np.float32).reshape(-1))
    if image is not None:
        query["image_base64"] = encode_image(_read(image))
    if len(query) != 1:
        raise QueryError("give exactly one of key, vector and image to search with")
    return {"query": query} | {name: _to_json(value) for name, value in options.items()}


def _to_json(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value


def _read(image: bytes | str | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise QueryError(f"cannot read the image {image}: {error.strerror}") from error


def _find_wait(response: httpx.Response, attempt: int) -> float:
    text = response.headers.get("retry-after", "")
    wait_s = float(text) if text.isdecimal() else 0.2 * 2**attempt
    return min(_MAX_WAIT_S, wait_s)


def _explain(response: httpx.Response) -> Exception:
    """Return the error of the project that fits an answer."""
    try:
        problem = response.json()
        code, detail, where = problem["code"], problem["detail"], problem.get("where")
    except (ValueError, KeyError, TypeError):
        code, detail, where = "", response.reason_phrase, None
    place = f" ({where})" if where else ""
    message = f"{response.request.url.host} answers {response.status_code}: {detail}{place}"
    if code == "unknown_key":
        return UnknownKeyError(message)
    if response.status_code in (401, 403):
        return AccessError(f"{message}; give Client(api_key=…)")
    if response.status_code in _RETRIED or response.status_code in (500, 501):
        return ServiceError(message)
    return QueryError(message)
