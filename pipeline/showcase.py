"""What the run report shows of the index: recall, some neighbours, the map of the collection."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import IndexConfig
from pipeline.errors import PipelineError
from pipeline.images import ImageLimits
from pipeline.index.current import read_current
from pipeline.index.files import FileStore, default_cache_dir
from pipeline.index.manifest import Manifest
from pipeline.index.projection import read_map
from pipeline.index.search import Neighbour, SearchIndex
from pipeline.readers import read_record_bytes
from pipeline.report_page import IndexSection, ShownImage, encode_picture
from pipeline.storage import Storage, normalise_uri
from pipeline.thumbnails import make_thumbnail

_QUERIES = 4
_NEIGHBOURS = 7
_MAP_POINTS = 800
_MAP_PICTURES = 60
_MAP_SIZE = (1000, 700)
_THUMBNAIL_PX = 124


def describe_index(config: IndexConfig) -> IndexSection | None:
    """Return what there is to show of the generation that serves; None without one."""
    storage = Storage(config.storage)
    uri = normalise_uri(config.index)
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    manifest = read_current(uri, storage)
    if manifest is None:
        return None
    index = SearchIndex.open(
        uri, storage, generation=manifest.generation, cache_dir=config.cache_dir
    )
    return IndexSection(
        generation=manifest.generation,
        kind=manifest.codec.kind,
        rows=manifest.rows,
        recall=manifest.measured.get("recall"),
        curve=_list_curve(manifest),
        neighbours=[_show_query(index, query, storage) for query in _sample(index)],
        map=_show_map(index, manifest, FileStore(uri, storage, cache)),
    )


def _list_curve(manifest: Manifest) -> list[tuple[float, float, bool]]:
    chosen = manifest.measured.get("params")
    return [
        (point["latency_ms"]["p50"], point["recall"], point["params"] == chosen)
        for point in manifest.curve
        if point.get("latency_ms")
    ]


def _sample(index: SearchIndex) -> Sequence[Neighbour]:
    return index.snapshot.sample(_QUERIES, seed=0)


def _show_query(index: SearchIndex, query: Neighbour, storage: Storage) -> list[ShownImage]:
    found = index.snapshot.neighbours_of(query.key, _NEIGHBOURS)
    return [ShownImage(n.key, _show_picture(n, storage), n.score) for n in [query, *found]]


def _show_picture(neighbour: Neighbour, storage: Storage) -> str | None:
    try:
        data = read_record_bytes(
            neighbour.shard,
            row=neighbour.row,
            offset=neighbour.offset,
            nbytes=neighbour.nbytes,
            storage=storage,
        )
        return encode_picture(make_thumbnail(data, _THUMBNAIL_PX, limits=ImageLimits()))
    except PipelineError:  # the page does without; the image may be gone since
        return None


def _show_map(index: SearchIndex, manifest: Manifest, files: FileStore) -> list[ShownImage]:
    points = read_map(manifest.map, files)
    if points is None:
        return []
    step = max(1, len(points.keys) // _MAP_POINTS)
    keys, places = points.keys[::step], points.xy[::step] * _MAP_SIZE
    pictured = set(keys[:: max(1, len(keys) // _MAP_PICTURES)])
    shown = [
        ShownImage(
            key,
            _show_picture(index.snapshot.find(key), files.storage) if key in pictured else None,
            x=round(float(x), 1),
            y=round(float(y), 1),
        )
        for key, (x, y) in zip(keys, places, strict=True)
    ]
    return sorted(shown, key=lambda image: image.picture is not None)  # pictures on top
