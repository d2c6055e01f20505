import numpy as np
import pytest

from pipeline.errors import CorruptionError
from pipeline.index.map import MapPoints, choose_method, compute_map, project_pca


def make_clusters(rows, dim=32):
    rng = np.random.default_rng(3)
    centres = 4 * rng.normal(size=(3, dim))
    return (centres[np.arange(rows) % 3] + rng.normal(size=(rows, dim))).astype(np.float32)


@pytest.mark.parametrize(("rows", "dim"), [(300, 32), (40, 64), (5, 3), (3, 2)])
def test_the_projection_is_the_two_largest_principal_components(rows, dim):
    vectors = make_clusters(rows, dim)
    centred = vectors - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    found = project_pca(vectors)
    for column in range(2):
        cosine = found[:, column] @ expected[:, column]
        cosine /= np.linalg.norm(found[:, column]) * np.linalg.norm(expected[:, column])
        assert abs(cosine) > 0.99


def test_the_map_keeps_clusters_together_inside_the_unit_square():
    vectors = make_clusters(600)
    points = compute_map(vectors, [str(i) for i in range(600)], max_points=300)
    assert points.method == choose_method(300)
    assert points.xy.shape == (300, 2)
    assert points.xy.min() >= 0
    assert points.xy.max() <= 1
    labels = np.array([int(key) % 3 for key in points.keys])
    middles = np.stack([points.xy[labels == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(points.xy[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.95


def test_equal_input_gives_an_equal_map():
    vectors, keys = make_clusters(100), [str(i) for i in range(100)]
    first, second = compute_map(vectors, keys), compute_map(vectors, keys)
    assert first.to_json() == second.to_json()
    assert first.keys == tuple(keys)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_handful_of_images_has_a_map_too(rows):
    points = compute_map(make_clusters(3)[:rows], [str(i) for i in range(rows)])
    assert points.xy.shape == (rows, 2)
    again = MapPoints.from_json(points.to_json())
    assert again.keys == points.keys
    assert np.isfinite(again.xy).all()


def test_equal_vectors_lie_in_one_place():
    points = compute_map(np.ones((10, 8), np.float32), [str(i) for i in range(10)])
    assert np.ptp(points.xy, axis=0).tolist() == [0, 0]


def test_a_map_survives_its_file():
    points = compute_map(make_clusters(50), [f"ключ/{i}" for i in range(50)])
    again = MapPoints.from_json(points.to_json())
    assert again.keys == points.keys
    assert np.allclose(again.xy, points.xy, atol=1e-5)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"method": "pca"}', b'{"method":1,"keys":["a"],"x":[],"y":[]}']
)
def test_a_damaged_map_is_refused(data):
    with pytest.raises(CorruptionError, match="the map of the generation cannot be read"):
        MapPoints.from_json(data)


def test_keys_and_vectors_have_to_fit():
    with pytest.raises(ValueError, match="2 keys do not fit 3 vectors"):
        compute_map(make_clusters(3), ["a", "b"])


def test_a_folder_called_like_the_library_is_not_taken_for_it(tmp_path, monkeypatch):
    """Python takes any folder for a package; a removed package may leave one behind."""
    installed = choose_method(1000)
    (tmp_path / "umap").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_method(1000) == installed


def test_groups_lie_apart_on_a_map_of_umap():
    pytest.importorskip("umap", reason="needs the extra map: pip install -e '.[map]'")
    vectors = make_clusters(120)
    points = compute_map(vectors, [str(i) for i in range(120)])
    assert points.method == "umap"
    labels = np.arange(120) % 3
    middles = np.stack([points.xy[labels == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(points.xy[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.95
