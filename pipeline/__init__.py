"""Batch image embeddings on Ray: shards in, Parquet embeddings and nearest neighbours out.

The names here are the public interface; everything else may change. They are imported on first
use, so that a command that needs no torch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.backbones import create_backbone, list_backbones
    from pipeline.config import EmbedConfig, IndexConfig
    from pipeline.index.build import build_index
    from pipeline.index.search import SearchIndex
    from pipeline.parts import read_embeddings
    from pipeline.run import embed
    from pipeline.service.client import Client
    from pipeline.transforms import create_transform, resolve_data_config

_HOMES = {
    "Client": "pipeline.service.client",
    "EmbedConfig": "pipeline.config",
    "IndexConfig": "pipeline.config",
    "SearchIndex": "pipeline.index.search",
    "build_index": "pipeline.index.build",
    "create_backbone": "pipeline.backbones",
    "create_transform": "pipeline.transforms",
    "embed": "pipeline.run",
    "list_backbones": "pipeline.backbones",
    "read_embeddings": "pipeline.parts",
    "resolve_data_config": "pipeline.transforms",
}

__all__ = [
    "Client",
    "EmbedConfig",
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
    return __all__
