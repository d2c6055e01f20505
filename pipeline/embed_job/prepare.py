"""What an output is: the space and layout that a run's settings ask for, and its weights."""

from dataclasses import replace

import PIL
import pyarrow as pa

from pipeline.backbones import (
    LoadedWeights,
    create_backbone,
    load_weights,
    save_weights,
    weights_digest,
)
from pipeline.config import EmbedConfig, parse_size
from pipeline.images.gpu import find_gpu_decoder_version
from pipeline.images.transforms import resolve_data_config
from pipeline.input.listing import Listing, make_object_shard
from pipeline.input.reader import carried_schema
from pipeline.output.info import OutputInfo, claim_output, read_output_info
from pipeline.records import Layout, Space
from pipeline.storage import Storage, join_uri

_PREPROCESSING_VERSION = "1"


def describe_output(
    config: EmbedConfig, storage: Storage
) -> tuple[OutputInfo, LoadedWeights | None]:
    """Return what the output is, or will be, and the weights where they had to be loaded."""
    found = read_output_info(config.output, storage)
    source = f"{config.weights} of {config.model}"
    weights = None
    if found is not None and _is_reproducible(config.weights) and found.weights_source == source:
        digest = found.space.weights_sha256
    else:
        weights = load_weights(config.model, config.weights, storage=storage)
        digest = weights_digest(weights.state_dict)
    info = OutputInfo(
        _make_space(config, digest),
        _make_layout(config),
        found.carried if found else pa.schema([]),
        weights=f"weights/{digest[:16]}.safetensors",
        weights_source=source,
        weights_revision=weights.revision if weights else None,
    )
    return info, weights


def _make_space(config: EmbedConfig, digest: str) -> Space:
    data_config = resolve_data_config(config.model, use_test_size=config.image_size == "test")
    if config.image_size.isdecimal():
        data_config = data_config.with_size(int(config.image_size))
    return Space(
        backbone=config.model,
        weights_sha256=digest,
        image_size=data_config.image_size,
        crop_pct=data_config.crop_pct,
        interpolation=data_config.interpolation,
        mean=data_config.mean,
        std=data_config.std,
        exif=config.exif,
        decode=config.decode,
        precision=config.precision,
        dim=create_backbone(config.model, weights=None, num_classes=0).embedding_dim,
        versions=_list_versions(config),
    )


def _make_layout(config: EmbedConfig) -> Layout:
    return Layout(
        chunk_images=config.chunk_images,
        chunk_bytes=parse_size(config.chunk_bytes, setting="chunk_bytes"),
        embedding_dtype=config.embedding_dtype,
        top_k_classes=config.top_k_classes,
        carry=config.carry,
        image_column=config.image_column,
        key_column=config.key_column,
    )


def _list_versions(config: EmbedConfig) -> dict[str, str]:
    """Return the versions of what decides the pixels."""
    versions = {"pillow": PIL.__version__, "preprocessing": _PREPROCESSING_VERSION}
    if config.decode == "gpu":
        versions["torchvision"] = find_gpu_decoder_version()
    return versions


def _is_reproducible(weights: str) -> bool:
    """Tell whether the name alone decides the weights, so that a copy of them will do."""
    return weights == "pretrained" or weights.startswith("random:")


def make_output(
    config: EmbedConfig,
    info: OutputInfo,
    weights: LoadedWeights | None,
    listing: Listing,
    storage: Storage,
) -> OutputInfo:
    """Make the output one of this space, with the weights kept there for actors and lookups."""
    if read_output_info(config.output, storage) is None:
        info = replace(info, carried=_find_carried_schema(info.layout, listing, storage))
    else:
        info = claim_output(config.output, info, storage)
    uri = join_uri(config.output, info.weights)
    if not storage.exists(uri):
        weights = weights or load_weights(config.model, config.weights, storage=storage)
        save_weights(weights.state_dict, uri, storage=storage)
    return claim_output(config.output, info, storage)


def _find_carried_schema(layout: Layout, listing: Listing, storage: Storage) -> pa.Schema:
    """Return the types of the carried columns, as the first Parquet shard has them."""
    for source in listing.sources:
        if layout.carry and source.kind == "parquet":
            shard = make_object_shard(source, chunking=())
            return carried_schema(shard, storage=storage, carry=layout.carry)
    return pa.schema([pa.field(name, pa.string()) for name in layout.carry])
