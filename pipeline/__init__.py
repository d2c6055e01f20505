"""Batch image embeddings on Ray: shards in, Parquet embeddings and nearest neighbours out.

The names here are the public interface; everything else may change. They are imported on first
use, so that a command that needs no torch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.backbones import create_backbone, list_backbones
    from pipeline.config import EmbedConfig, IndexConfig
    from pipeline.embed_job.run import embed
    from pipeline.images.transforms import create_transform, resolve_data_config
    from pipeline.index.job import build_index
    from pipeline.index.search.search_index import SearchIndex
    from pipeline.inference.embedder import Embedder
    from pipeline.output.commits import read_embeddings
    from pipeline.service.client import Client

__version__ = "0.1.0"

_HOMES = {
    "Client": "pipeline.service.client",
    "EmbedConfig": "pipeline.config",
    "Embedder": "pipeline.inference.embedder",
    "IndexConfig": "pipeline.config",
    "SearchIndex": "pipeline.index.search.search_index",
    "build_index": "pipeline.index.job",
    "create_backbone": "pipeline.backbones",
    "create_transform": "pipeline.images.transforms",
    "embed": "pipeline.embed_job.run",
    "list_backbones": "pipeline.backbones",
    "read_embeddings": "pipeline.output.commits",
    "resolve_data_config": "pipeline.images.transforms",
}

__all__ = [
    "Client",
    "EmbedConfig",
    "Embedder",
    "IndexConfig",
    "SearchIndex",
    "build_index",
    "create_backbone",
    "create_transform",
    "embed",
    "list_backbones",
    "read_embeddings",
    "resolve_data_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
