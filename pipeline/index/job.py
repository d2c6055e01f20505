"""The index job: bring up to date, roll back, or clear away."""

from pathlib import Path

from pipeline.config import IndexConfig
from pipeline.errors import CorruptionError, NothingThereError, describe_no_index
from pipeline.index.build.update import update_index
from pipeline.index.export.export import export
from pipeline.index.files import REMEDY, FileStore, default_cache_dir
from pipeline.index.garbage import delete_garbage, find_garbage
from pipeline.index.manifest import Manifest
from pipeline.index.pointer import read_current
from pipeline.index.publish import roll_back
from pipeline.index.report import IndexReport, make_report
from pipeline.storage import Storage, normalise_uri

__all__ = ["IndexReport", "build_index"]


def build_index(config: IndexConfig) -> IndexReport:
    """Bring an index up to date with its embeddings; what ``jobs/index.py`` calls.

    Raises:
        SettingsError: A setting is missing or does not fit.
        SpaceMismatchError: The index holds vectors of another space.
        CorruptionError: The embeddings or the index are damaged.
        PublishError: A gate refused, or another publisher was first.
    """
    storage = Storage(config.storage)
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    cache_bytes = config.cache_size.nbytes
    files = FileStore(normalise_uri(config.index), storage, cache, cache_bytes=cache_bytes)
    if config.roll_back is not None:
        pointer, manifest = roll_back(files, config.roll_back)
        details = {"seq": pointer.seq, "pinned": True}
        return make_report("rolled back", files.index, manifest=manifest, details=details)
    if config.collect_garbage != "no":
        return collect_garbage(config, files)
    if config.embeddings is None and config.verify:
        return verify_only(files)
    if config.embeddings is None and (config.knn or config.near_duplicates):
        return export_only(config, files)
    return update_index(config, files)


def verify_only(files: FileStore) -> IndexReport:
    """Read every file of the generation that serves and compare it with its digest.

    Raises:
        CorruptionError: One is missing or damaged.
    """
    manifest = read_serving(files)
    damage = files.find_damage(manifest.list_files())
    if damage is not None:
        raise CorruptionError(f"{damage}; {REMEDY}")
    size_bytes = sum(file.size_bytes for file in manifest.list_files())
    details = {"files": len(manifest.list_files()), "bytes": size_bytes}
    return make_report("verified", files.index, manifest=manifest, details=details)


def read_serving(files: FileStore) -> Manifest:
    """Return the generation that serves.

    Raises:
        NothingThereError: There is none.
        CorruptionError: The pointer or the manifest is damaged.
    """
    manifest = read_current(files.index, files.storage)
    if manifest is None:
        raise NothingThereError(describe_no_index(files.index))
    return manifest


def export_only(config: IndexConfig, files: FileStore) -> IndexReport:
    """Write the kNN graph or near duplicates of the generation that serves."""
    manifest = read_serving(files)
    return make_report(
        "exported", files.index, manifest=manifest, details=export(config, files, manifest)
    )


def collect_garbage(config: IndexConfig, files: FileStore) -> IndexReport:
    """List, or delete, what no kept generation needs."""
    found = find_garbage(
        files.index,
        keep=config.keep_generations,
        min_age_s=config.min_age_hours * 3600,
        storage=files.storage,
    )
    delete = config.collect_garbage == "delete" and not config.dry_run
    if delete:
        delete_garbage(files.index, found, files.storage)
    details = {
        "generations": list(found.generations),
        "objects": len(found.uris),
        "bytes": found.size_bytes,
        "uris": [] if delete else list(found.uris),
    }
    action = "garbage deleted" if delete else "garbage listed"
    current = read_current(files.index, files.storage)
    return make_report(action, files.index, manifest=current, details=details)
