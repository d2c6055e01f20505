"""Services over the gallery."""

from collections.abc import Iterator

import httpx
import pytest

from service.gallery import AWKWARD_KEYS, Gallery
from service.services import ColourEmbedder, Service, run_service


@pytest.fixture(scope="session")
def awkward_gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Pictures whose keys are hard to put into an address."""
    made = Gallery(tmp_path_factory.mktemp("awkward"))
    made.add_shard(len(AWKWARD_KEYS), keys=list(AWKWARD_KEYS))
    made.build()
    return made


@pytest.fixture(scope="module")
def service(gallery: Gallery) -> Iterator[Service]:
    """A running service with an embedder that also names classes."""
    with run_service(gallery.open(), embedder=ColourEmbedder(top_k_classes=5)) as running:
        yield running


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    """A client of ``service``."""
    with httpx.Client(base_url=service.url) as client:
        yield client
