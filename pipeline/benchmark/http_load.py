"""How fast the service answers: many clients on loopback, next to the bare search and embedding.

The clients are bare sockets: a comfortable HTTP library costs more than the service it measures.
"""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from pipeline.index.search.search_index import SearchIndex
from pipeline.service.lookups import ImageEmbedder
from pipeline.service.schema import encode_vector

CLIENTS = (1, 16, 64)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Rate and latency for a number of clients, each sending its next request once answered.

    Attributes:
        kind: What they asked with: ``"vector"``, ``"key"`` or ``"image"``.
        clients: How many there were.
        requests: Answers in all.
        seconds: How long it took.
        requests_per_s: Answers per second.
        p50_ms: Half of the answers took at most this long.
        p99_ms: All but one in a hundred took at most this long.
        statuses: Answers by HTTP status.
    """

    kind: str
    clients: int
    requests: int
    seconds: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    statuses: Mapping[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def make_bodies(
    kind: str,
    *,
    k: int = 10,
    vectors: npt.NDArray[np.float32] | None = None,
    keys: Sequence[str] = (),
    images: Sequence[bytes] = (),
) -> list[bytes]:
    """Return JSON bodies of searches of a kind, one per vector, key or image."""
    queries: list[dict[str, str]]
    if kind == "vector":
        rows = [] if vectors is None else list(vectors)
        queries = [{"vector_base64": encode_vector(row)} for row in rows]
    elif kind == "key":
        queries = [{"key": key} for key in keys]
    else:
        queries = [{"image_base64": base64.b64encode(data).decode()} for data in images]
    return [json.dumps({"query": query, "k": k}).encode() for query in queries]


def measure_load(
    url: str,
    bodies: Sequence[bytes],
    *,
    kind: str,
    clients: int,
    seconds: float = 5.0,
    api_key: str | None = None,
) -> LoadResult:
    """Send searches from ``clients`` connections for some seconds, after one each to warm up.

    Args:
        url: The service; only loopback is allowed, this is no tool against strangers.
        bodies: What to send, in turn.
        kind: What they are, for the result.
        clients: Connections, each with one request under way.
        seconds: How long.
        api_key: Sent with every request.
    """
    return asyncio.run(_measure(url, bodies, kind, clients, seconds=seconds, api_key=api_key))


async def _measure(
    url: str,
    bodies: Sequence[bytes],
    kind: str,
    clients: int,
    *,
    seconds: float,
    api_key: str | None,
) -> LoadResult:
    target = urlsplit(url)
    if target.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"{url} is not on this machine; load is measured on loopback only")
    statuses: Counter[int] = Counter()
    times: list[float] = []
    requests = [_make_request(body, target.netloc, api_key) for body in bodies]
    turns = count()
    streams = [await asyncio.open_connection(target.hostname, target.port) for _ in range(clients)]
    await asyncio.gather(*(_ask(*s, requests[next(turns) % len(requests)]) for s in streams))
    started_s = time.perf_counter()
    end_s = started_s + seconds

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (sent_s := time.perf_counter()) < end_s:
            status = await _ask(reader, writer, requests[next(turns) % len(requests)])
            statuses[status] += 1
            times.append(time.perf_counter() - sent_s)
        writer.close()

    await asyncio.gather(*(repeat(*stream) for stream in streams))
    took_s = time.perf_counter() - started_s
    return _summarise(kind, clients, times, took_s, statuses)


def _make_request(body: bytes, host: str, api_key: str | None) -> bytes:
    key = f"X-API-Key: {api_key}\r\n" if api_key else ""
    head = (
        f"POST /v1/search HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{key}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Send one request and read its answer whole; return its status."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = head.split("content-length:")[1].split("\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split(" ")[1])


def _summarise(
    kind: str, clients: int, times: Sequence[float], took_s: float, statuses: Mapping[int, int]
) -> LoadResult:
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return LoadResult(
        kind=kind,
        clients=clients,
        requests=len(times),
        seconds=round(took_s, 3),
        requests_per_s=round(len(times) / took_s, 1),
        p50_ms=round(float(p50), 2),
        p99_ms=round(float(p99), 2),
        statuses=dict(sorted(statuses.items())),
    )


def measure_service(
    url: str,
    *,
    vectors: npt.NDArray[np.float32],
    keys: Sequence[str],
    images: Sequence[bytes] = (),
    clients: Sequence[int] = CLIENTS,
    seconds: float = 5.0,
) -> Iterator[LoadResult]:
    """Measure every kind of query that there is material for, at every number of clients."""
    for kind in ("vector", "key", "image"):
        bodies = make_bodies(kind, vectors=vectors, keys=keys, images=images)
        for number in clients if bodies else ():
            yield measure_load(url, bodies, kind=kind, clients=number, seconds=seconds)


def measure_bare(
    index: SearchIndex,
    vectors: npt.NDArray[np.float32],
    *,
    embedder: ImageEmbedder | None = None,
    images: Sequence[bytes] = (),
    k: int = 10,
    seconds: float = 5.0,
) -> list[LoadResult]:
    """Measure the same work without HTTP: one search, and one embedding, at a time."""
    one_by_one = [vector[None] for vector in vectors]
    results = [_time_calls("search", lambda vector: index.search(vector, k), one_by_one, seconds)]
    if embedder is not None and images:
        singles = [[data] for data in images]
        results.append(_time_calls("embed", embedder.embed_images, singles, seconds))
    return results


def _time_calls(kind: str, call: Any, items: Sequence[Any], seconds: float) -> LoadResult:
    call(items[0])
    times: list[float] = []
    started_s = time.perf_counter()
    for turn in count():
        begun_s = time.perf_counter()
        if begun_s - started_s > seconds:
            break
        call(items[turn % len(items)])
        times.append(time.perf_counter() - begun_s)
    return _summarise(kind, 1, times, time.perf_counter() - started_s, {})
