"""An embeddings output that can be added to, changed and taken from, as the embed job would."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.benchmark import synthetic
from pipeline.benchmark.synthetic import commit_table, generate_vectors, make_commit
from pipeline.config import IndexConfig
from pipeline.index.job import build_index
from pipeline.index.search.search_index import SearchIndex
from pipeline.output.commits import list_commits, retire_commit
from pipeline.output.info import OutputInfo, claim_output
from pipeline.records import Layout, Space
from pipeline.storage import Storage

STORAGE = Storage()
CLUSTERS = 40


def make_space(dim: int, **changes: object) -> Space:
    return synthetic.make_space(dim, **{"backbone": "resnetv2_50.a1h_in1k"} | changes)


@dataclass
class Corpus:
    """Writes shards of vectors; ``vectors`` holds what should be searchable, by key.

    ``label`` makes the ``cls`` of vectors; their place in the shard does where it is None.
    """

    output: str
    dim: int
    carry: tuple[str, ...] = ("cls",)
    storage: Storage = STORAGE
    part_rows: int = 500
    label: Callable[[np.ndarray], list[str]] | None = None
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    _versions: int = 0

    def __post_init__(self) -> None:
        carried = pa.schema([pa.field(name, pa.string()) for name in self.carry])
        layout = Layout(chunk_images=self.part_rows, chunk_bytes=1 << 26, carry=self.carry)
        space = make_space(self.dim)
        self.info = OutputInfo(space, layout, carried, "weights/ab.safetensors", "random:0 of it")
        claim_output(self.output, self.info, self.storage)

    def add_shard(
        self,
        name: str,
        vectors: np.ndarray,
        *,
        names: list[str] | None = None,
        statuses: dict[int, str] | None = None,
        contents: list[str] | None = None,
        rows: list[int] | None = None,
    ) -> str:
        """Commit a shard; an existing one of that name is superseded. Returns its id."""
        self._versions += 1
        shard_id = hashlib.sha256(f"{name} {self._versions}".encode()).hexdigest()[:16]
        return self.commit_shard(
            name,
            shard_id,
            vectors,
            names=names,
            statuses=statuses,
            contents=contents,
            rows=rows,
        )

    def commit_shard(
        self,
        name: str,
        shard_id: str,
        vectors: np.ndarray,
        *,
        names: list[str] | None = None,
        statuses: dict[int, str] | None = None,
        contents: list[str] | None = None,
        rows: list[int] | None = None,
    ) -> str:
        names = names or [f"{row:06d}.jpg" for row in range(len(vectors))]
        keys = [f"{name}/{item}" for item in names]
        table = self._make_table(name, keys, vectors, statuses or {}, contents, rows)
        live = list_commits(self.output, self.storage).values()
        old = [c.shard_id for c in live if c.name == name and c.shard_id != shard_id]
        commit = make_commit(
            name,
            self.info.space.id,
            shard_id=shard_id,
            source=f"/pictures/{name}",
            root="/pictures",
            version=str(self._versions),
            supersedes=tuple(old),
            sequence=self._versions,
            modified_s=1e9 + self._versions,
        )
        commit_table(
            self.output, table, commit=commit, part_rows=self.part_rows, storage=self.storage
        )
        for key in self.keys.pop(name, []):
            self.vectors.pop(key, None)
        usable = [row for row in range(len(keys)) if row not in (statuses or {})]
        self.keys[name] = [keys[row] for row in usable]
        self.vectors |= {keys[row]: vectors[row] for row in usable}
        return shard_id

    def remove_shard(self, name: str) -> None:
        for commit in list_commits(self.output, self.storage).values():
            if commit.name == name:
                retire_commit(self.output, commit.shard_id, self.storage)
        for key in self.keys.pop(name):
            self.vectors.pop(key, None)

    def extend(self, name: str, *, rows: int, seed: int) -> str:
        """Add a shard of new images of the same collection."""
        return self.add_shard(name, draw_vectors(rows, self.dim, seed=seed))

    def drop_rows(self, name: str, *, every: int) -> str:
        """Replace a shard by one without every n-th image; the others stay as they were."""
        keep = [row for row in range(len(self.keys[name])) if row % every]
        names = [self.keys[name][row].split("/", 1)[1] for row in keep]
        vectors = np.stack([self.vectors[self.keys[name][row]] for row in keep])
        return self.add_shard(name, vectors, names=names, rows=keep)

    def _make_table(
        self,
        name: str,
        keys: list[str],
        vectors: np.ndarray,
        statuses: dict[int, str],
        contents: list[str] | None,
        places: list[int] | None,
    ) -> pa.Table:
        contents = contents or keys
        places = places or list(range(len(keys)))
        rows = range(len(keys))
        embeddings = [None if row in statuses else vectors[row].tolist() for row in rows]
        columns = {
            "key": keys,
            "shard": [f"/pictures/{name}"] * len(keys),
            "row": places,
            "status": [statuses.get(row, "ok") for row in rows],
            "error": ["broken" if row in statuses else None for row in rows],
            "width": [64] * len(keys),
            "height": [48] * len(keys),
            "offset": [512 * place for place in places],
            "nbytes": [100] * len(keys),
            "sha256": [hashlib.sha256(item.encode()).digest()[:16] for item in contents],
            "embedding": pa.array(embeddings, pa.list_(pa.float32(), self.dim)),
        }
        for column in self.carry:
            untold = pa.types.is_null(self.info.schema.field(column).type)
            columns[column] = [None if untold else f"class {place % 10}" for place in places]
        if self.label is not None:
            columns["cls"] = self.label(vectors)
        return pa.table(columns, schema=self.info.schema)


@dataclass(frozen=True)
class Built:
    """An index and what should be in it."""

    corpus: Corpus
    index: str


def build(corpus: Corpus, index: str, **settings: object) -> dict:
    """Run the index job; return its report."""
    config = IndexConfig(index=index, embeddings=corpus.output, **settings)
    return build_index(config).to_dict()


def draw_vectors(rows: int, dim: int, *, seed: int) -> np.ndarray:
    return generate_vectors(rows, dim, seed=seed, clusters=CLUSTERS)


def make_corpus(
    folder: Path, *, rows: int = 2000, dim: int = 64, shards: int = 4, seed: int = 0
) -> Corpus:
    corpus = Corpus(str(folder), dim)
    vectors = draw_vectors(rows, dim, seed=seed)
    for number, block in enumerate(np.array_split(vectors, shards)):
        corpus.add_shard(f"shard-{number:03d}.tar", block)
    return corpus


def rank_exactly(corpus: Corpus, query: np.ndarray, k: int) -> list[tuple[str, float]]:
    """Return the true nearest keys and cosines."""
    keys = list(corpus.vectors)
    matrix = np.stack([corpus.vectors[key] for key in keys]).astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    scores = matrix @ (query / np.linalg.norm(query))
    order = np.argsort(-scores)[:k]
    return [(keys[i], float(scores[i])) for i in order]


def check_healthy(corpus: Corpus, uri: str, **settings: object) -> None:
    """Keys are those of the embeddings, searches find the truth, and nothing is left to mend."""
    found = SearchIndex.open(uri)
    assert sorted(item.key for item in found.snapshot.sample(10**6)) == sorted(corpus.vectors)
    for key in list(corpus.vectors)[:: len(corpus.vectors) // 5]:
        truth = rank_exactly(corpus, corpus.vectors[key], 5)
        hits = found.search(corpus.vectors[key], 5, exact=True)[0]
        np.testing.assert_allclose([h.score for h in hits], [s for _, s in truth], atol=1e-3)
        assert hits[0].key == key
    assert build_index(IndexConfig(index=uri, verify=True)).action == "verified"
    assert build(corpus, uri, verify=True, **settings)["action"] == "unchanged"
