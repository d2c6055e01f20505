"""A search from the command line that asks a running service instead of opening the index."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import SearchConfig
from pipeline.errors import QueryError, SettingsError
from pipeline.index.search.command import read_vector_file
from pipeline.records import describe_job
from pipeline.service.client import Client
from pipeline.service.schema import MAX_SEARCHES, SearchResponse
from pipeline.storage import Storage


@dataclass(frozen=True, slots=True)
class RemoteReport:
    """The answer of a service to a search.

    Attributes:
        url: The service.
        names: What was searched with: key, path, or row of a file.
        answers: The answer to each.
        seconds: Time until all were there.
    """

    url: str
    names: Sequence[str]
    answers: Sequence[SearchResponse]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a search of an opened index would give it."""
        results = [
            {"query": name, "neighbours": list(list_rows(answer))}
            for name, answer in zip(self.names, self.answers, strict=True)
        ]
        generation = self.answers[0].generation if self.answers else None
        head = describe_job("search") | {"index": self.url, "generation": generation}
        body = results[0] if len(results) == 1 else {"results": results}
        return head | {"seconds": round(self.seconds, 6)} | body


def list_rows(answer: SearchResponse) -> Iterator[dict[str, Any]]:
    """Give the neighbours of an answer as flat rows: key, score, metadata."""
    for result in answer.results:
        yield {"key": result.key, "score": result.score} | (result.metadata or {})


def ask_service(config: SearchConfig) -> RemoteReport:
    """Search as ``config`` says, by way of the service at ``config.url``.

    Raises:
        SettingsError: The API key cannot be read.
        QueryError: The service cannot answer this.
        ServiceError: The service cannot be reached, or stayed busy.
    """
    searches = list(make_searches(config))
    names = [name for name, _ in searches]
    started = time.perf_counter()
    with Client(config.url, api_key=read_key(config.api_key_file)) as client:
        answers: list[SearchResponse] = []
        for first in range(0, len(searches), MAX_SEARCHES):
            batch = [search for _, search in searches[first : first + MAX_SEARCHES]]
            try:
                answers += client.search_batch(batch)
            except QueryError as error:
                raise QueryError(f"{error}; searches.0 is {names[first]}") from error
    return RemoteReport(config.url, names, answers, time.perf_counter() - started)


def make_searches(config: SearchConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the name and the arguments of each search that ``config`` asks for."""
    options = {"k": config.k, "filter": config.where, "exact": config.exact}
    storage = Storage(config.storage)
    if config.key is not None:
        yield config.key, {"key": config.key} | options
    elif config.image is not None:
        yield config.image, {"image": storage.read(config.image)} | options
    elif config.vector is not None:
        vectors = np.atleast_2d(read_vector_file(config.vector, storage))
        for row, vector in enumerate(vectors):
            yield f"{config.vector}[{row}]", {"vector": vector} | options
    else:
        raise QueryError("nothing to search with; pass --image, --key or --vector")


def read_key(path: str | None) -> str | None:
    """Return the API key in a file: its first line.

    Raises:
        SettingsError: The file cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        key = Path(path).read_text().split("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read --api-key-file {path}: {error}") from error
    if not key:
        raise SettingsError(f"--api-key-file {path} is empty; write the key on its first line")
    return key
