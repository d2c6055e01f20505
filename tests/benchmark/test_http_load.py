import pytest
from service.gallery import make_image, make_vectors
from service.services import ColourEmbedder, run_service

from pipeline.benchmark.http_load import make_bodies, measure_bare, measure_load, measure_service


def test_every_kind_of_query_is_measured_at_every_number_of_clients(gallery):
    embedder = ColourEmbedder()
    index = gallery.open()
    vectors, images = make_vectors(range(20)), [make_image(n) for n in range(3)]
    keys = [f"photos/000.tar/{n:05d}.jpg" for n in range(20)]
    with run_service(index, embedder=embedder) as service:
        results = list(
            measure_service(
                service.url, vectors=vectors, keys=keys, images=images, clients=(1, 4), seconds=0.2
            )
        )
    assert [(r.kind, r.clients) for r in results] == [
        (kind, clients) for kind in ("vector", "key", "image") for clients in (1, 4)
    ]
    for result in results:
        assert set(result.statuses) == {200}
        assert result.requests == sum(result.statuses.values()) > 0
        assert 0 < result.p50_ms <= result.p99_ms
    bare = measure_bare(index, vectors, embedder=embedder, images=images, seconds=0.1)
    assert [(r.kind, r.clients) for r in bare] == [("search", 1), ("embed", 1)]


def test_refused_requests_are_counted_by_their_status(gallery):
    with run_service(gallery.open(), requests_per_s=1.0) as service:
        bodies = make_bodies("key", keys=["photos/000.tar/00001.jpg"])
        result = measure_load(service.url, bodies, kind="key", clients=2, seconds=0.2)
    assert result.statuses[429] > 0


def test_only_this_machine_is_put_under_load():
    with pytest.raises(ValueError, match="loopback only"):
        measure_load("http://example.org", [b"{}"], kind="key", clients=1, seconds=0.1)
