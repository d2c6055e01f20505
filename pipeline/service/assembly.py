"""The service as its settings describe it: index, backbone, limits, application."""

from typing import TYPE_CHECKING

from pipeline.config import ServeConfig, parse_size
from pipeline.errors import SettingsError
from pipeline.images import ImageLimits
from pipeline.index.search import IndexInfo, Neighbour, SearchIndex
from pipeline.readers import read_record_bytes
from pipeline.service.app import Access, create_app
from pipeline.service.guard import LOOPBACK_HOSTS, Asgi, GuardLimits
from pipeline.service.keys import ApiKeys, is_loopback, read_api_keys
from pipeline.service.lookups import LookupLimits, Lookups
from pipeline.service.metrics import Metrics
from pipeline.service.pictures import PictureLoader
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.embedder import Embedder


def build_app(config: ServeConfig) -> Asgi:
    """Open the index, load the backbone, and return the application.

    Raises:
        SettingsError: A setting is wrong, or does not fit the index.
        ObjectMissingError: There is no index.
        CorruptionError: The index is damaged, or the weights are not those of its space.
    """
    keys = read_api_keys(config.api_key_file)
    storage = Storage(config.storage)
    index = SearchIndex.open(config.index, storage, cache_dir=config.cache_dir)
    metrics = Metrics()
    lookups = Lookups(
        index,
        embedder=open_embedder(config, index.info, storage) if config.image_queries else None,
        pictures=_open_pictures(config, storage, metrics) if config.show_images else None,
        limits=_make_lookup_limits(config),
        metrics=metrics,
    )
    return create_app(lookups, metrics, _make_access(config, keys))


def open_embedder(config: ServeConfig, info: IndexInfo, storage: Storage) -> "Embedder":
    """Load the backbone of the index's space.

    Raises:
        SettingsError: Nobody says where the weights are.
        CorruptionError: They are other weights than the space's.
    """
    weights = config.weights or info.weights
    if weights is None:
        raise SettingsError(
            f"the index {info.uri} does not say where the weights of {info.space.backbone} are; "
            "pass --weights, or --no-image-queries to serve without image queries"
        )
    import torch  # takes seconds, and a service without image queries needs none

    from pipeline.embedder import Embedder, EmbedderOptions

    options = EmbedderOptions(
        device="cuda" if torch.cuda.is_available() else "cpu",
        limits=_make_image_limits(config),
        image_timeout_s=config.request_timeout_s,
        top_k_classes=config.top_k_classes,
    )
    return Embedder(info.space, weights=weights, options=options, storage=storage)


def _open_pictures(config: ServeConfig, storage: Storage, metrics: Metrics) -> PictureLoader:
    def read_image(hit: Neighbour) -> bytes:
        return read_record_bytes(
            hit.shard, row=hit.row, offset=hit.offset, nbytes=hit.nbytes, storage=storage
        )

    return PictureLoader(
        read_image,
        limits=_make_image_limits(config),
        cache_bytes=parse_size(config.image_cache, setting="image_cache"),
        metrics=metrics,
    )


def _make_image_limits(config: ServeConfig) -> ImageLimits:
    return ImageLimits(
        max_pixels=config.max_pixels,
        max_image_bytes=parse_size(config.max_body, setting="max_body"),
    )


def _make_lookup_limits(config: ServeConfig) -> LookupLimits:
    return LookupLimits(
        max_waiting=config.max_waiting,
        search_workers=config.threads,
        refresh_s=config.refresh_s,
    )


def _make_access(config: ServeConfig, keys: ApiKeys) -> Access:
    hosts = frozenset(name.lower() for name in config.allowed_hosts)
    if is_loopback(config.host) and not keys.digests:
        hosts |= LOOPBACK_HOSTS
    limits = GuardLimits(
        max_body_bytes=parse_size(config.max_body, setting="max_body"),
        max_concurrent=2 * config.max_waiting,
        timeout_s=config.request_timeout_s,
        requests_per_s=config.requests_per_s,
        hosts=hosts or None,
    )
    return Access(keys, limits, config.cors_origins)
