"""The one-liners of the README open the embeddings in the tools that others use."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import MODEL, ROOT, make_config

import pipeline

IMAGES = 12
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str, weights: Path) -> Path:
    """Embeddings of twelve pictures, and a part of a shard that was never committed."""
    folder = tmp_path_factory.mktemp("interop")
    command = [sys.executable, ROOT / "infra" / "demo_pictures.py", folder / "shards"]
    subprocess.run([*command, "--number", str(IMAGES), "--per-shard", "6"], check=True)
    pipeline.embed(make_config(folder / "shards", folder / "out", weights))
    part = next((folder / "out" / "parts").glob("*/*.parquet"))
    stray = folder / "out" / "parts" / "0123456789abcdef" / part.name
    stray.parent.mkdir()
    shutil.copy(part, stray)
    return folder / "out"


def run_line(start: str, output: Path) -> object:
    """Evaluate the line of the README that starts so, on real embeddings."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if "read_embeddings" in block)
    (line,) = (line for line in block.splitlines() if line.startswith(start))
    names = {name: pytest.importorskip(name) for name in re.findall(r"^(?!data\b)\w+(?=\.)", line)}
    names["data"] = pipeline.read_embeddings(str(output))
    return eval(line.replace('"photos.lance"', repr(str(output / "photos.lance"))), names)


def width() -> int:
    return pipeline.create_backbone(MODEL, weights=None, num_classes=0).embedding_dim


def test_duckdb_counts_images_by_status(output: Path) -> None:
    assert run_line("duckdb", output).fetchall() == [("ok", IMAGES)]


def test_pandas_gets_one_row_per_image_with_its_vector(output: Path) -> None:
    frame = run_line("data.to_table().to_pandas()", output)
    assert len(frame) == IMAGES
    assert frame["key"].is_unique
    assert np.stack(frame["embedding"]).shape == (IMAGES, width())


def test_polars_gets_fixed_width_vectors(output: Path) -> None:
    frame = run_line("polars", output)
    assert frame.height == IMAGES
    assert frame["embedding"].dtype.size == width()


def test_hugging_face_datasets_get_one_row_per_image(output: Path) -> None:
    rows = run_line("datasets", output)
    assert rows.num_rows == IMAGES
    assert len(rows[0]["embedding"]) == width()


def test_lance_finds_a_vector_by_itself(output: Path) -> None:
    table = run_line("lance", output)
    assert table.count_rows() == IMAGES
    query = pipeline.read_embeddings(str(output)).to_table()["embedding"][3].as_py()
    found = table.to_table(nearest={"column": "embedding", "q": query, "k": 1})
    expected = pipeline.read_embeddings(str(output)).to_table()["key"][3]
    assert found["key"][0].as_py() == expected.as_py()
