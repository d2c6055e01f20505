"""Exports a generation: kNN graph, near-duplicates, plain FAISS files."""

from typing import Any

from pipeline.config import IndexConfig
from pipeline.index.export.neighbours import TASK_ROWS, write_neighbours
from pipeline.index.files import FileStore
from pipeline.index.manifest import Manifest
from pipeline.index.workers import open_workers, wants_ray


def export(config: IndexConfig, files: FileStore, manifest: Manifest) -> dict[str, Any]:
    """Write what ``--knn`` and ``--near-duplicates`` ask for; return where it is."""
    if config.knn is None and config.near_duplicates is None:
        return {}
    tasks = -(-manifest.rows // TASK_ROWS)
    use_ray = wants_ray(config, manifest.rows)
    with open_workers(use_ray=use_ray, address=config.ray_address, tasks=tasks) as workers:
        return write_neighbours(
            files, manifest, knn=config.knn, threshold=config.near_duplicates, workers=workers
        )
