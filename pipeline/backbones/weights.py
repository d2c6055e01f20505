"""Weights: where they come from, whether they fit, and what identifies them.

A checkpoint fits a backbone exactly or not at all. Nothing here ever falls back to other weights
than those asked for.
"""

import argparse
import hashlib
import io
import os
import pickle
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.backbones.config import BackboneConfig
from pipeline.backbones.registry import find_backbone
from pipeline.backbones.seeded import draw_state_dict
from pipeline.errors import ObjectMissingError, StorageError, WeightsError
from pipeline.storage import Storage, join_uri

_REMEDY = (
    "give weights as a path or URI of a .safetensors file or torch checkpoint, "
    "or as random:<seed> for untrained ones"
)
_RANDOM = "random:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that is there
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_PARENTS = ("model.", "backbone.", "net.", "network.", "encoder.", "student.")
"""What training programs call the network in their own module, as Lightning's do."""

_CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar")
_BATCH_COUNTER = "num_batches_tracked"  # a training-time count; decides no number
_MAX_LISTED_KEYS = 10


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """Weights that fit a backbone.

    Attributes:
        backbone: Name of the backbone.
        state_dict: Tensors by key in the backbone's own order, float32 on the CPU. The classifier
            is as wide as the checkpoint's, and missing where the checkpoint has none.
        source: Where they came from, e.g. ``"s3://bucket/model.safetensors"``.
        revision: Commit on the hub; None for other sources.
    """

    backbone: str
    state_dict: Mapping[str, Tensor]
    source: str
    revision: str | None


def load_weights(
    name: str, weights: str | os.PathLike[str], *, storage: Storage | None = None
) -> LoadedWeights:
    """Find weights, read them and check that they fit.

    Args:
        name: Name of the backbone.
        weights: ``"pretrained"`` (the hub's), a path or URI of a checkpoint, or
            ``"random:<seed>"`` (the same bits for the same seed on the same machine).
        storage: How to reach the URI; with default options where None.

    Raises:
        UnknownBackboneError: No backbone has this name.
        WeightsError: The weights cannot be found, cannot be read, or do not fit the backbone.
    """
    config = find_backbone(name)
    text = os.fspath(weights)
    if text == "pretrained":
        return _load_from_hub(config)
    if text.startswith(_RANDOM):
        state_dict = draw_state_dict(config, _parse_seed(text))
        return LoadedWeights(name, state_dict, source=text, revision=None)
    data = _read_checkpoint(text, storage or Storage())
    return _fit_checkpoint(config, data, source=text, revision=None)


def save_weights(
    state_dict: Mapping[str, Tensor], uri: str, *, storage: Storage | None = None
) -> None:
    """Write weights as one safetensors object that ``load_weights`` reads back."""
    (storage or Storage()).put(uri, encode_weights(state_dict))


def encode_weights(state_dict: Mapping[str, Tensor]) -> bytes:
    """Return the weights in the safetensors format."""
    return safetensors.torch.save(
        {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    )


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over keys, dtypes, shapes and values, hex.

    It does not depend on the file format, the order of the keys or the memory layout. The batch
    counters of the batch norms are left out: they are the one entry that files may lack.
    """
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        if not key.endswith(_BATCH_COUNTER):
            tensor = state_dict[key].detach().cpu().contiguous()
            digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def apply_weights(
    network: nn.Module, loaded: LoadedWeights, *, config: BackboneConfig, keep_classifier: bool
) -> None:
    """Copy weights into a network.

    Args:
        network: A network of the backbone, with any number of classes.
        loaded: The weights.
        config: The backbone.
        keep_classifier: Ask for the classifier of the weights. Otherwise it is taken where it has
            the network's number of classes, and the network's own stays where it has not.

    Raises:
        WeightsError: The weights do not fit the network.
    """
    expected = network.state_dict()
    state_dict = dict(loaded.state_dict)
    if not keep_classifier:
        prefix = config.classifier + "."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if key not in expected or expected[key].shape != state_dict[key].shape:
                del state_dict[key]
        own = {key: expected[key] for key in expected if key.startswith(prefix)}
        state_dict = own | state_dict
    _check_fit(state_dict, expected, source=loaded.source, backbone=config.name)
    network.load_state_dict(state_dict)


def _load_from_hub(config: BackboneConfig) -> LoadedWeights:
    try:
        path = _fetch_from_hub(config.hub_id)
    except Exception as error:  # the client lets the errors of its HTTP library through
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"cannot fetch the pretrained weights of {config.name} from the hub repository "
            f"{config.hub_id}: {reason}; {_REMEDY}"
        ) from error
    revision = path.parent.name  # the hub's cache keeps a file under snapshots/<commit>/
    source = f"hf://{config.hub_id}/{path.name}"
    return _fit_checkpoint(config, path.read_bytes(), source=source, revision=revision)


def _fetch_from_hub(hub_id: str) -> Path:
    # asked first: a download of unknown files tries for half a minute before it finds no hub
    filename = _find_cached(hub_id) or _find_on_hub(hub_id)
    return Path(hf_hub_download(hub_id, filename))


def _find_cached(hub_id: str) -> str | None:
    cached = (name for name in _HUB_FILES if isinstance(try_to_load_from_cache(hub_id, name), str))
    return next(cached, None)


def _find_on_hub(hub_id: str) -> str:
    preferred, other = _HUB_FILES
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, preferred))
    except EntryNotFoundError:
        return other
    return preferred


def _parse_seed(text: str) -> int:
    seed = text.removeprefix(_RANDOM)
    if not (seed.isascii() and seed.isdecimal() and int(seed) < 2**63):
        raise WeightsError(f"weights are {text!r}; write random:<seed> with a whole number >= 0")
    return int(seed)


def _read_checkpoint(uri: str, storage: Storage) -> bytes:
    try:
        return storage.read(uri)
    except ObjectMissingError as error:
        return _read_folder(uri, storage, error)
    except StorageError as error:
        raise WeightsError(f"cannot read the weights: {error}") from error


def _read_folder(uri: str, storage: Storage, missing: ObjectMissingError) -> bytes:
    """Read the checkpoint of a folder as timm and the hub's client save a model."""
    for name in _HUB_FILES:
        with suppress(ObjectMissingError):
            return storage.read(join_uri(uri, name))
    with suppress(StorageError):
        found = [o.uri for o in storage.list_objects(uri) if o.uri.endswith(_CHECKPOINT_SUFFIXES)]
        if found:
            raise WeightsError(
                f"{uri!r} is a folder without {' or '.join(_HUB_FILES)}; give the checkpoint "
                f"itself, such as {found[0]}"
            ) from missing
    raise WeightsError(f"no weights at {uri!r}; {_REMEDY}, or as pretrained") from missing


def _fit_checkpoint(
    config: BackboneConfig, data: bytes, *, source: str, revision: str | None
) -> LoadedWeights:
    state_dict = _unwrap(_decode(data, source), source)
    classifier = state_dict.get(f"{config.classifier}.weight")
    num_classes = 0 if classifier is None else classifier.shape[0] if classifier.ndim else 0
    with torch.device("meta"):
        network = config.network(config, num_classes=num_classes, features_only=False)
    expected = network.state_dict()
    for key, tensor in expected.items():
        if key.endswith(_BATCH_COUNTER):
            state_dict.setdefault(key, torch.zeros(tensor.shape, dtype=tensor.dtype))
    _check_fit(state_dict, expected, source=source, backbone=config.name)
    fitted = {key: state_dict[key].to(tensor.dtype) for key, tensor in expected.items()}
    return LoadedWeights(config.name, fitted, source, revision)


def _decode(data: bytes, source: str) -> Any:
    try:
        if data[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            return safetensors.torch.load(data)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training settings
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            "it holds other objects than tensors, or is no checkpoint at all; where you trust it, "
            "load it yourself with weights_only=False and save its state_dict alone"
        )
        raise WeightsError(f"cannot read the weights in {source!r}: {reason}") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise WeightsError(f"cannot read the weights in {source!r}: {error}") from error


def _unwrap(checkpoint: Any, source: str) -> dict[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(checkpoint.get(wrapper), Mapping):
                checkpoint = checkpoint[wrapper]
                break
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise WeightsError(f"no weights in {source!r}: it holds no mapping of names to tensors")
    strays = [key for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if strays:
        raise WeightsError(f"no weights in {source!r}: {_shorten(strays)} are not tensors")
    return _strip_prefixes(checkpoint)


def _strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors as the network itself does; a parent's name goes if all of them have it."""
    stripped = {_strip_wrappers(key): tensor for key, tensor in state_dict.items()}
    for parent in _PARENTS:
        if all(key.startswith(parent) for key in stripped):
            return _strip_prefixes({k.removeprefix(parent): t for k, t in stripped.items()})
    return stripped


def _strip_wrappers(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


def _check_fit(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    source: str,
    backbone: str,
) -> None:
    problems = {
        "missing": [key for key in expected if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in expected],
        "mis-shaped": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in state_dict and state_dict[key].shape != tensor.shape
        ],
        "not floating point": [
            key
            for key, tensor in expected.items()
            if key in state_dict
            and tensor.is_floating_point()
            and not state_dict[key].is_floating_point()
        ],
    }
    found = [f"{kind}: {_shorten(keys)}" for kind, keys in problems.items() if keys]
    if found:
        hint = _find_parent(state_dict, expected)
        raise WeightsError(
            f"the weights in {source!r} do not fit {backbone}; {'; '.join(found)}{hint}"
        )


def _find_parent(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return a hint where the network's keys are all there, under the name of a parent."""
    first = next(iter(expected))
    for parent in (key.removesuffix(first) for key in state_dict if key.endswith(f".{first}")):
        inside = {key.removeprefix(parent) for key in state_dict if key.startswith(parent)}
        if inside >= {key for key in expected if not key.endswith(_BATCH_COUNTER)}:
            return f"; all its keys are there under {parent!r}: save that part alone"
    return ""


def _shorten(keys: Iterable[str]) -> str:
    listed = [str(key) for key in keys]
    shown = ", ".join(listed[:_MAX_LISTED_KEYS])
    rest = len(listed) - _MAX_LISTED_KEYS
    return f"{shown} and {rest} more" if rest > 0 else shown
