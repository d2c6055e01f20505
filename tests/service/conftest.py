"""Services over the gallery."""

from collections.abc import Iterator

import httpx
import pytest

from service.gallery import Gallery
from service.services import ColourEmbedder, Service, run_service


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
