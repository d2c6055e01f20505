"""From image shards to answers: embedded, indexed and served by the real jobs' calls."""

import tarfile

import numpy as np
import pytest

import pipeline
from pipeline.config import ServeConfig
from pipeline.errors import CorruptionError, SettingsError
from pipeline.service.app import build_app
from service.gallery import make_image
from service.services import serve_app

MODEL = "fbnetv3_b.ra2_in1k"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Twelve pictures in a tar, embedded and indexed."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/000.tar", "w") as tar:
        for number in range(12):
            path = folder / f"{number:03d}.jpg"
            path.write_bytes(make_image(number))
            tar.add(path, arcname=path.name)
    embeddings = str(folder / "embeddings")
    config = pipeline.EmbedConfig(
        input=(str(folder / "shards"),), output=embeddings, model=MODEL, weights="random:3"
    )
    pipeline.embed(config)
    pipeline.build_index(pipeline.IndexConfig(index=str(folder / "index"), embeddings=embeddings))
    return str(folder / "index")


@pytest.mark.slow
def test_an_indexed_picture_finds_itself_through_decode_transform_and_backbone(index):
    app = build_app(ServeConfig(index=index, top_k_classes=5))
    with serve_app(app) as (url, _), pipeline.Client(url) as client:
        info = client.info()
        assert (info.rows, info.space["backbone"]) == (12, MODEL)
        for key in [item.key for item in client.sample(12)][:4]:
            picture = client.image(key)
            answer = client.search(image=picture, k=3, include=["classes", "vector"])
            assert answer.results[0].key == key
            assert answer.results[0].score == pytest.approx(1, abs=1e-4)
            assert len(answer.classes) == 5
            vector = client.embed([picture])[0]
            stored = answer.results[0].vector
            assert np.allclose(vector / np.linalg.norm(vector), stored, atol=1e-3)


@pytest.mark.slow
def test_other_weights_than_the_index_s_are_refused(index):
    with pytest.raises(CorruptionError, match="other weights"):
        build_app(ServeConfig(index=index, weights="random:4"))


def test_an_index_that_names_no_weights_needs_them_named(gallery):
    info = gallery.open().info
    assert info.weights
    from dataclasses import replace

    from pipeline.service.app import open_embedder
    from pipeline.storage import Storage

    with pytest.raises(SettingsError, match="pass --weights, or --no-image-queries"):
        open_embedder(ServeConfig(index="x"), replace(info, weights=None), Storage())
