import datetime
import io
import json
import math
import re
import tarfile
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import jobs.index
import jobs.search
import pipeline
from index.corpus import STORAGE, make_space
from pipeline.backbones import load_weights, weights_digest
from pipeline.errors import NothingThereError, QueryError
from pipeline.index.search.command import Answer, Card, Query, SearchReport, render_page
from pipeline.index.search.search_index import Neighbour, SearchIndex
from pipeline.inference.embedder import Embedder, EmbedderOptions
from pipeline.output.commits import write_commit
from pipeline.output.info import OutputInfo, claim_output
from pipeline.output.parts import write_part
from pipeline.records import Commit, Layout

MODEL = "fbnetv3_b.ra2_in1k"
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 200)}


def draw(colour, number):
    random = np.random.default_rng(number)
    pixels = np.clip(np.array(COLOURS[colour]) + random.normal(0, 12, (72, 80, 3)), 0, 255)
    sink = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, weights):
    """A folder with a shard of pictures, their embeddings, and an index made by the job."""
    folder = tmp_path_factory.mktemp("gallery")
    pictures = [draw(list(COLOURS)[number % 3], number) for number in range(12)]
    offsets = write_tar(folder / "a.tar", pictures)
    info = describe_output(weights)
    embedder = Embedder.load(info.space, weights=str(weights), options=EmbedderOptions())
    embedded = embedder.embed_images(pictures)
    embedder.close()
    rows = [
        {
            "key": f"a.tar/{number:03d}.jpg",
            "shard": str(folder / "a.tar"),
            "row": number,
            "status": item.status,
            "error": None,
            "width": item.width,
            "height": item.height,
            "offset": offset,
            "nbytes": len(picture),
            "sha256": item.digest,
            "embedding": item.vector.tolist(),
            "cls": list(COLOURS)[number % 3],
        }
        for number, (item, offset, picture) in enumerate(
            zip(embedded, offsets, pictures, strict=True)
        )
    ]
    commit_rows(str(folder / "embeddings"), pa.Table.from_pylist(rows, schema=info.schema), info)
    STORAGE.upload(weights, str(folder / "embeddings" / info.weights))
    arguments = ["--embeddings", str(folder / "embeddings"), "--index", str(folder / "index")]
    assert jobs.index.main(arguments) == 0
    return folder


def write_tar(path, pictures):
    """Return where each picture begins."""
    offsets = []
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(pictures):
            member = tarfile.TarInfo(f"{number:03d}.jpg")
            member.size = len(data)
            offsets.append(tar.offset + 512)
            tar.addfile(member, io.BytesIO(data))
    return offsets


def describe_output(weights):
    digest = weights_digest(load_weights(MODEL, str(weights)).state_dict)
    space = make_space(1984, backbone=MODEL, weights_sha256=digest, image_size=64)
    layout = Layout(chunk_images=256, chunk_bytes=1 << 26, carry=("cls",))
    carried = pa.schema([pa.field("cls", pa.string())])
    return OutputInfo(space, layout, carried, "weights/copy.safetensors", str(weights))


def commit_rows(output, table, info):
    claim_output(output, info, STORAGE)
    space_id = info.space.id
    part = write_part(output, table, folder="a", chunk=0, space_id=space_id, storage=STORAGE)
    commit = Commit(
        shard_id="a" * 16,
        kind="tar",
        source="a.tar",
        root="/",
        name="a.tar",
        version="1",
        size_bytes=1,
        space_id=space_id,
        parts=(part,),
    )
    write_commit(output, commit, STORAGE)


def search(gallery, *arguments):
    return jobs.search.main(["--index", str(gallery / "index"), *arguments])


def test_the_index_job_prints_its_report_as_the_last_line(gallery, capsys):
    arguments = ["--embeddings", str(gallery / "embeddings"), "--index", str(gallery / "index")]
    assert jobs.index.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["job"], report["action"], report["rows"]) == ("index", "unchanged", 12)


def test_a_key_is_answered_as_a_table(gallery, capsys):
    assert search(gallery, "--key", "a.tar/000.jpg", "-k", "3") == 0
    printed = capsys.readouterr().out
    assert "neighbours of a.tar/000.jpg" in printed
    assert len(re.findall(r"a\.tar/\d{3}\.jpg", printed)) == 4
    assert "red" in printed


def test_a_key_is_answered_as_json_alone(gallery, capsys):
    assert search(gallery, "--key", "a.tar/000.jpg", "-k", "3", "--json") == 0
    [line] = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["query"] == "a.tar/000.jpg"
    assert len(report["neighbours"]) == 3
    best = report["neighbours"][0]
    assert best["cls"] == "red"
    assert {"key", "score", "shard", "row", "offset", "nbytes", "sha256"} <= set(best)


def test_values_of_every_type_are_valid_json_and_lose_nothing():
    columns = {
        "id": 2**64 - 1,
        "price": math.nan,
        "ratios": [1.0, math.inf],
        "cost": Decimal("1.50"),
        "taken": datetime.datetime(2024, 5, 31, 12, tzinfo=datetime.UTC),
        "sha256": b"\xff",
    }
    hit = Neighbour("k", 0.5, "a.tar", 0, None, 1, columns)
    report = SearchReport("index", "1", [Query("q", np.ones(2))], [[hit]], 0.1, info=None)
    [shown] = json.loads(json.dumps(report.to_dict(), allow_nan=False))["neighbours"]
    assert shown == {
        "key": "k",
        "score": 0.5,
        "id": 2**64 - 1,
        "price": None,
        "ratios": [1.0, None],
        "cost": "1.50",
        "taken": "2024-05-31T12:00:00Z",
        "sha256": "ff",
    }
    card = Card("k", None, columns=columns | {"extra": {"a": math.nan}})
    page = render_page([Answer(card, [])], index="i", generation="1", facts="")
    assert "<dd>2024-05-31T12:00:00Z</dd>" in page
    assert "NaN" not in page


def test_a_picture_finds_itself_with_a_cosine_of_one(gallery, capsys, tmp_path):
    (tmp_path / "query.jpg").write_bytes(draw("green", 4))
    assert search(gallery, "--image", str(tmp_path / "query.jpg"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["neighbours"][0]["key"] == "a.tar/004.jpg"
    assert report["neighbours"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_a_picture_is_searched_with_from_python(gallery, tmp_path):
    path = tmp_path / "query.jpg"
    path.write_bytes(draw("green", 4))
    index = SearchIndex.open(str(gallery / "index"))
    for image in (path, str(path), path.read_bytes()):
        found = index.search(image=image, k=3)
        assert [len(found), found[0].key] == [3, "a.tar/004.jpg"]
    embedder = pipeline.Embedder.open(str(gallery / "embeddings"))
    [embedding] = embedder.embed_images([path.read_bytes()])
    embedder.close()
    np.testing.assert_allclose(embedding.vector, index.embed(path), rtol=1e-4, atol=1e-5)
    assert index.search(embedding.vector[None], 3)[0] == found
    with pytest.raises(QueryError, match="cannot embed 'a picture': unsupported"):
        index.search(image=b"<html>")
    for arguments in ({}, {"vectors": embedding.vector, "image": path}):
        with pytest.raises(QueryError, match="pass either vectors or image"):
            index.search(**arguments)
    with pytest.raises(NothingThereError, match=r"no embeddings at .*run embed first"):
        pipeline.Embedder.open(str(tmp_path / "nothing"))


def test_vectors_from_a_file_are_answered_one_by_one(gallery, capsys, tmp_path):
    index = SearchIndex.open(str(gallery / "index"))
    vectors = np.stack([index.vector(f"a.tar/{number:03d}.jpg") for number in (5, 7)])
    np.save(tmp_path / "two.npy", vectors)
    assert search(gallery, "--vector", str(tmp_path / "two.npy"), "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [item["query"] for item in results] == ["two.npy[0]", "two.npy[1]"]
    assert [item["neighbours"][0]["key"] for item in results] == ["a.tar/005.jpg", "a.tar/007.jpg"]


def test_a_condition_on_a_carried_column_limits_the_answer(gallery, capsys):
    arguments = ("--key", "a.tar/000.jpg", "--where", "cls = blue", "--json")
    assert search(gallery, *arguments) == 0
    found = json.loads(capsys.readouterr().out)["neighbours"]
    assert len(found) == 4
    assert {item["cls"] for item in found} == {"blue"}


def test_a_page_shows_the_pictures_and_fetches_nothing(gallery, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert search(gallery, "--key", "a.tar/000.jpg", "-k", "3", "--html", str(page)) == 0
    assert re.search(r" · recall@10 [01]\.\d{3}", page.read_text())
    text = page.read_text()
    assert text.count('src="data:image/jpeg;base64,') == 4
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)
    assert "prefers-color-scheme:dark" in text


def test_a_page_can_be_opened_at_once(gallery, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = tmp_path / "page.html"
    assert search(gallery, "--key", "a.tar/000.jpg", "--html", str(page), "--open") == 0
    assert search(gallery, "--key", "a.tar/000.jpg", "--open") == 0
    assert opened[0] == page.as_uri()
    assert "neighbours.html" in opened[1]


def test_a_page_explains_a_picture_that_is_gone(gallery, tmp_path, capsys):
    shard = gallery / "a.tar"
    data = shard.read_bytes()
    shard.unlink()
    try:
        page = tmp_path / "page.html"
        assert search(gallery, "--key", "a.tar/000.jpg", "-k", "2", "--html", str(page)) == 0
    finally:
        shard.write_bytes(data)
    assert page.read_text().count('<p class="problem">') == 3


def test_names_are_escaped_on_the_page(tmp_path):
    evil = "<script>alert(1)</script>\"'"
    card = Card(evil, None, evil, 0.5, {evil: evil}, evil)
    page = render_page([Answer(card, [card])], index=evil, generation=evil, facts=evil)
    assert "<script>" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--key", "a.tar/0000.jpg"], 2, "no image with the key 'a.tar/0000.jpg'"),
        ([], 2, "nothing given to search with; pass exactly one of --image, --key and --vector"),
        (["--key", "a", "--image", "b"], 2, "image and key given to search with"),
        (["--key", "a.tar/000.jpg", "-k", "0"], 2, "k is 0; ask for 1 to 10000 neighbours"),
        (["--image", "/no/such.jpg"], 1, "/no/such.jpg"),
        (["--key", "a.tar/000.jpg", "--where", "colour = red"], 2, "no column 'colour'"),
    ],
)
def test_a_query_that_cannot_be_answered_says_why(gallery, capsys, arguments, code, message):
    assert search(gallery, *arguments) == code
    assert message in capsys.readouterr().err


def test_files_that_hold_no_vectors_or_pictures_are_refused(gallery, capsys, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"not an array")
    assert search(gallery, "--vector", str(tmp_path / "x.npy")) == 2
    assert "is no .npy file of vectors" in capsys.readouterr().err
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert search(gallery, "--vector", str(tmp_path / "evil.npy")) == 2
    assert "is no .npy file of vectors" in capsys.readouterr().err
    np.save(tmp_path / "short.npy", np.ones(3))
    assert search(gallery, "--vector", str(tmp_path / "short.npy")) == 2
    assert "holds vectors of 1984" in capsys.readouterr().err
    (tmp_path / "x.jpg").write_bytes(b"not a picture")
    assert search(gallery, "--image", str(tmp_path / "x.jpg")) == 2
    assert "cannot embed" in capsys.readouterr().err
