"""Vectors that look like pooled embeddings of images, to measure with where none are at hand.

Clusters of clusters in 32 dimensions, through a fixed two-layer ReLU network, with noise: half of
all values are zero, all vectors lie in a cone (cosine of two about 0.55 ± 0.14), the nearest
neighbour of a fresh vector has a cosine of 0.98 and the hundredth 0.97, all of which resembles real
embeddings of photographs. With five hundred vectors a cluster, neighbours are hard to tell apart:
1-bit codes have 0.86 of the ten nearest among their best 40, and 0.99 among their best 160.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.index.engine import Floats

LATENT_DIM = 32
BLOCK_ROWS = 16_384


def generate_vectors(
    rows: int, dim: int, *, seed: int = 0, space_seed: int = 0, clusters: int = 200
) -> Floats:
    """Return ``rows`` vectors, float32 (rows, dim), none negative, not normalised.

    Args:
        rows: How many.
        dim: Their width.
        seed: Draws of different seeds are different images of one collection.
        space_seed: Draws of different space seeds have nothing in common.
        clusters: Number of clusters; one for every 500 vectors of the collection is realistic.
    """
    return np.concatenate(
        list(iter_vectors(rows, dim, seed=seed, space_seed=space_seed, clusters=clusters))
    )


def iter_vectors(
    rows: int, dim: int, *, seed: int = 0, space_seed: int = 0, clusters: int = 200
) -> Iterator[Floats]:
    """Yield what ``generate_vectors`` returns in blocks, for more rows than fit in memory."""
    space = np.random.default_rng([space_seed, dim])
    parents = space.standard_normal((max(1, clusters // 20), LATENT_DIM))
    owner = space.integers(0, len(parents), clusters)
    centres = parents[owner] + 0.6 * space.standard_normal((clusters, LATENT_DIM))
    weights = space.dirichlet(np.ones(clusters))
    hidden = space.standard_normal((LATENT_DIM, 4 * LATENT_DIM)) / np.sqrt(LATENT_DIM)
    bias = 0.1 * space.standard_normal(4 * LATENT_DIM)
    out = space.standard_normal((4 * LATENT_DIM, dim)) / np.sqrt(2 * LATENT_DIM)
    random = np.random.default_rng([space_seed, dim, seed])
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        chosen = random.choice(clusters, count, p=weights)
        latent = centres[chosen] + 0.2 * random.standard_normal((count, LATENT_DIM))
        latent *= random.lognormal(0.0, 0.1, (count, 1))
        values = np.maximum(latent @ hidden + bias, 0) @ out
        values += 0.1 * random.standard_normal((count, dim))
        yield np.maximum(values, 0).astype(np.float32)
