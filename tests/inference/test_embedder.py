"""Encoded images to embeddings: the plain backbone's numbers, and a status for everything else."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, make_hostile_pictures, make_jpeg, make_picture
from PIL import Image
from runs import MODEL

from pipeline.backbones import create_backbone, load_weights, save_weights, weights_digest
from pipeline.config import EmbedConfig
from pipeline.embed_job.prepare import describe_output
from pipeline.errors import CorruptionError
from pipeline.images.crops import data_config_of
from pipeline.images.decode import image_digest
from pipeline.images.transforms import create_transform
from pipeline.inference.embedder import Embedder, EmbedderOptions
from pipeline.records import Record, Space
from pipeline.storage import Storage

OPTIONS = EmbedderOptions(batch_size=4, torch_threads=1, top_k_classes=3)


@pytest.fixture(scope="module")
def space(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Space:
    output = str(tmp_path_factory.mktemp("none"))
    config = EmbedConfig(("in",), output, MODEL, weights=str(weights), image_size="64")
    return describe_output(config, Storage())[0].space


@pytest.fixture(scope="module")
def embedder(space: Space, weights: Path) -> Iterator[Embedder]:
    made = Embedder.load(space, weights=str(weights), options=OPTIONS)
    yield made
    made.close()


def make_records(*images: bytes) -> list[Record]:
    return [Record(str(i), i, "s.tar", data, None) for i, data in enumerate(images)]


def embed_plainly(image: bytes, space: Space, weights: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the embedding and the class probabilities of one picture, step by step."""
    transform = create_transform(data_config_of(space))
    batch = transform(Image.open(io.BytesIO(image)).convert("RGB"))[None]
    with torch.no_grad():
        bare = create_backbone(MODEL, weights=str(weights), num_classes=0)
        full = create_backbone(MODEL, weights=str(weights))
        return bare(batch)[0].numpy(), full(batch).softmax(dim=1)[0].numpy()


def test_embeddings_and_classes_are_those_of_the_plain_backbone(
    embedder: Embedder, space: Space, weights: Path
):
    images = [make_jpeg(seed, (90, 60)) for seed in range(5)]
    embeddings = embedder.embed_images(images)
    for image, embedding in zip(images, embeddings, strict=True):
        vector, probabilities = embed_plainly(image, space, weights)
        assert embedding.status == "ok"
        assert np.linalg.norm(embedding.vector - vector) <= 1e-4 * np.linalg.norm(vector)
        assert (embedding.width, embedding.height) == (90, 60)
        assert embedding.digest == image_digest(image)
        indices, values = embedding.classes
        assert indices.tolist() == np.argsort(-probabilities)[:3].tolist()
        np.testing.assert_allclose(values, np.sort(probabilities)[::-1][:3], rtol=1e-3)


def test_every_record_gets_its_status_in_its_place(embedder: Embedder):
    hostile = make_hostile_pictures()
    names = ("half.jpg", "html.jpg", "lie.png", "empty.jpg")
    images = []
    for seed, name in enumerate(names):
        images += [hostile[name].data, make_jpeg(seed)]
    embeddings = embedder.embed(make_records(*images)).embeddings
    assert [e.status for e in embeddings[::2]] == [hostile[name].status for name in names]
    assert [e.status for e in embeddings[1::2]] == ["ok"] * 4
    for image, failed in zip(images[::2], embeddings[::2], strict=True):
        assert failed.vector is None
        assert failed.classes is None
        assert failed.error
        assert failed.digest == (image_digest(image) if image else None)
    alone = [embedder.embed_images([image])[0].vector for image in images[1::2]]
    np.testing.assert_allclose(
        np.stack([e.vector for e in embeddings[1::2]]), np.stack(alone), rtol=1e-4, atol=1e-5
    )


def test_what_failed_in_reading_is_passed_on(embedder: Embedder):
    (record,) = make_records(b"")
    failed = replace(record, status="truncated", error="the archive ends")
    (embedding,) = embedder.embed([failed]).embeddings
    assert (embedding.status, embedding.error) == ("truncated", "the archive ends")


def test_nothing_to_embed_is_fine(embedder: Embedder):
    assert embedder.embed([]).embeddings == []


def test_an_image_that_takes_too_long_costs_its_own_row_only(space: Space, weights: Path):
    """Really slow: 90 megapixels to inflate and to shrink, in a fraction of a second."""
    slow = io.BytesIO()
    Image.new("L", (10_000, 9_000)).save(slow, "PNG")
    options = replace(OPTIONS, image_timeout_s=0.2)
    embedder = Embedder.load(space, weights=str(weights), options=options)
    small = encode(make_picture(0, (8, 8)), "PNG")
    embeddings = embedder.embed_images([small, slow.getvalue(), small])
    assert [e.status for e in embeddings] == ["ok", "unreadable", "ok"]
    assert "took longer than 0.2 s" in embeddings[1].error
    embedder.close()


def test_a_vector_that_overflows_its_stored_type_is_non_finite(
    space: Space, weights: Path, tmp_path: Path
):
    loaded = load_weights(MODEL, str(weights))
    state = {key: tensor.clone() for key, tensor in loaded.state_dict.items()}
    state["conv_head.weight"] *= 1e7
    loud = tmp_path / "loud.safetensors"
    save_weights(state, str(loud))
    digest = weights_digest(load_weights(MODEL, str(loud)).state_dict)
    options = replace(OPTIONS, embedding_dtype="float16")
    embedder = Embedder.load(
        replace(space, weights_sha256=digest), weights=str(loud), options=options
    )
    (embedding,) = embedder.embed_images([make_jpeg()])
    assert embedding.status == "non_finite"
    assert embedding.vector is None
    assert "NaN or infinity in the fp32 forward pass" in embedding.error
    assert (embedding.width, embedding.height) == (64, 48)
    embedder.close()


def test_other_weights_than_the_spaces_are_refused(space: Space, weights: Path):
    other = replace(space, weights_sha256="00" * 32)
    with pytest.raises(CorruptionError, match=r"holds other weights \(digest .*give the original"):
        Embedder.load(other, weights=str(weights), options=OPTIONS)
