"""Works out the space, layout and weights of an output from a run's settings."""

from collections.abc import Sequence
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
from pipeline.config import EmbedConfig
from pipeline.images.gpu import find_gpu_decoder_version
from pipeline.images.transforms import resolve_data_config
from pipeline.input.container import ReadOptions
from pipeline.input.footers import find_carried_schema
from pipeline.input.listing import Listing, make_object_shard
from pipeline.log import LOG
from pipeline.output.info import OutputInfo, claim_output, read_output_info, write_output_info
from pipeline.records import Layout, Shard, Space
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
        chunk_bytes=config.chunk_bytes.nbytes,
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
    storage: Storage,
) -> OutputInfo:
    """Make the output one of this space, with the weights kept there for actors and lookups."""
    if read_output_info(config.output, storage) is not None:
        info = claim_output(config.output, info, storage)
    uri = join_uri(config.output, info.weights)
    if not storage.exists(uri):
        weights = weights or load_weights(config.model, config.weights, storage=storage)
        save_weights(weights.state_dict, uri, storage=storage)
    return claim_output(config.output, info, storage)


def describe_columns(info: OutputInfo, listing: Listing, storage: Storage) -> OutputInfo:
    """Find the types of the carried columns, where the output is yet to be made.

    Raises:
        SettingsError: A carried column is certain to be nowhere in the input.
    """
    if info.carried.names:
        return info
    objects = [source for source in listing.sources if source.kind != "image"]
    shards = [make_object_shard(source, chunking=()) for source in objects]
    options = make_read_options(info)
    found = find_carried_schema(shards, storage=storage, options=options, check_names=True)
    return replace(info, carried=found)


def complete_output(
    output: str, info: OutputInfo, shards: Sequence[Shard], storage: Storage
) -> OutputInfo:
    """Record the types of carried columns that had nulls only, where new shards tell them."""
    unknown = [field.name for field in info.carried if pa.types.is_null(field.type)]
    if not unknown or not shards:
        return info
    options = replace(make_read_options(info), carry=tuple(unknown))
    found = find_carried_schema(shards, storage=storage, options=options)
    types = {field.name: field.type for field in info.carried} | dict(
        zip(found.names, found.types, strict=True)
    )
    completed = replace(info, carried=pa.schema(list(types.items())))
    if completed.carried != info.carried:
        LOG.info("columns completed=%s", ",".join(name for name in unknown))
        write_output_info(output, completed, storage)
    return completed


def make_read_options(info: OutputInfo) -> ReadOptions:
    """Return how shards are read for an output."""
    layout = info.layout
    return ReadOptions(
        chunk_images=layout.chunk_images,
        chunk_bytes=layout.chunk_bytes,
        carry=layout.carry,
        carried=info.carried,
        image_column=layout.image_column,
        key_column=layout.key_column,
    )
