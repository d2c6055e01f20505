"""What there is to look through: facets, examples, duplicates, failures, columns of the map."""

import duckdb
import httpx
import numpy as np
import pyarrow as pa
import pytest

import pipeline
from pipeline.config import IndexConfig
from pipeline.index.job import build_index
from pipeline.index.search.facets import count_facet
from service.gallery import Gallery
from service.services import Service, run_service

KEYS = [f"photos/000.tar/{number:05d}.jpg" for number in range(60)]


def test_facets_count_what_duckdb_counts_over_the_live_rows(http: httpx.Client, gallery: Gallery):
    data = pipeline.read_embeddings(gallery.output)  # noqa: F841  # DuckDB finds it by its name
    found = http.get("/v1/facets").json()
    assert found["counted"] == 60
    columns = {one["name"]: one for one in found["columns"]}
    assert set(columns) == {"width", "height", "colour", "price", "cls"}
    query = "SELECT colour, count(*) FROM data GROUP BY colour"
    counts = {one["value"]: one["count"] for one in columns["colour"]["values"]}
    assert counts == dict(duckdb.sql(query).fetchall())
    query = "SELECT count(price), count(DISTINCT price), min(price), max(price) FROM data"
    price = columns["price"]
    names = ("present", "distinct", "low", "high")
    assert tuple(price[name] for name in names) == duckdb.sql(query).fetchall()[0]
    assert sum(price["bins"]) == price["present"]


def test_facets_leave_out_rows_that_were_deleted_and_are_counted_anew(tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(30)
    gallery.add_shard(2)
    gallery.build()
    with run_service(gallery.open()) as running, httpx.Client(base_url=running.url) as http:
        assert http.get("/v1/facets").json()["counted"] == 32
        gallery.remove_shard(1)
        gallery.build()
        assert running.index.refresh()
        assert http.get("/v1/facets").json()["counted"] == 30


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([], pa.string(), (0, 0, (), None, ())),
        ([None, None], pa.float64(), (0, 0, (), None, ())),
        ([f"name {n}" for n in range(100)], pa.string(), (100, 100, (), None, ())),
        ([float("nan"), float("inf")], pa.float64(), (2, 2, ((None, 1),), None, ())),
        ([5, 5], pa.int8(), (2, 1, ((5, 2),), 5, (2,))),
        (["x" * 200] * 3, pa.string(), (3, 1, (), None, ())),
    ],
)
def test_a_facet_of_an_odd_column(values, kind, expected):
    facet = count_facet("any", pa.chunked_array([pa.array(values, kind)]))
    shown = tuple(pair for pair in facet.values if pair[0] is not None)
    wanted = tuple(pair for pair in expected[2] if pair[0] is not None)
    assert (facet.present, facet.distinct, shown, facet.low, facet.bins) == (
        *expected[:2],
        wanted,
        *expected[3:],
    )


def search(http: httpx.Client, **query) -> list[str]:
    answer = http.post("/v1/search", json={"query": query, "k": 5})
    assert answer.status_code == 200, answer.text
    return [result["key"] for result in answer.json()["results"]]


def test_several_examples_find_what_is_near_their_mean_and_not_themselves(
    http: httpx.Client, service: Service
):
    vector = service.index.vector
    like, unlike = KEYS[:2], KEYS[2:4]
    stored = np.stack([vector(key) for key in KEYS]).astype(np.float64)
    wanted = stored[:2].mean(axis=0) - stored[2:4].mean(axis=0) / 2
    order = [KEYS[n] for n in np.argsort(-stored @ wanted, kind="stable")]
    assert search(http, like=like, unlike=unlike) == [k for k in order if k not in KEYS[:4]][:5]
    assert search(http, like=like[:1]) == search(http, key=like[0])


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({"unlike": KEYS[:1]}, 422, "exactly one of"),
        ({"like": KEYS[:1], "key": KEYS[1]}, 422, "exactly one of"),
        ({"key": KEYS[0], "unlike": KEYS[:1]}, 422, "unlike goes with like"),
        ({"like": ["nobody"]}, 404, "no image of this key"),
        ({"like": []}, 422, "at least 1 item"),
    ],
)
def test_examples_that_make_no_query_are_refused(http: httpx.Client, query, status, words):
    answer = http.post("/v1/search", json={"query": query})
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_items_come_in_the_order_asked_for_without_unknown_ones(http: httpx.Client):
    answer = http.post("/v1/items", json={"keys": [KEYS[7], "nobody", KEYS[3]]}).json()
    assert [item["key"] for item in answer["items"]] == [KEYS[7], KEYS[3]]
    assert answer["items"][0]["metadata"]["colour"] == "orange"


def test_the_map_brings_the_values_of_a_column_along(http: httpx.Client):
    points = http.get("/v1/map", params={"column": "colour"}).json()
    items = http.post("/v1/items", json={"keys": points["keys"]}).json()["items"]
    assert points["values"] == [item["metadata"]["colour"] for item in items]
    refused = http.get("/v1/map", params={"column": "shard"})
    assert refused.status_code == 422
    assert "no column 'shard'" in refused.json()["detail"]


def test_equal_files_are_groups_until_near_duplicates_are_exported(tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(12)
    gallery.images = 3  # the next shard holds three pictures once more
    gallery.add_shard(3)
    gallery.build()
    with run_service(gallery.open()) as running, httpx.Client(base_url=running.url) as http:
        found = http.get("/v1/duplicates").json()
        assert (found["method"], found["total"]) == ("bytes", 3)
        names = [[image["key"][-9:] for image in group["images"]] for group in found["groups"]]
        assert sorted(names) == [[f"{n:05d}.jpg"] * 2 for n in (3, 4, 5)]
        report = build_index(
            IndexConfig(
                index=gallery.index,
                embeddings=gallery.output,
                workers="local",
                near_duplicates=0.5,
                full=True,
            )
        )
        assert running.index.refresh()
        found = http.get("/v1/duplicates", params={"n": 1}).json()
        assert (found["method"], found["threshold"], len(found["groups"])) == ("cosine", 0.5, 1)
        assert found["total"] == report.details["near_duplicates"]["groups"]


def test_failures_are_counted_by_reason_and_shown(tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(10, broken=(2, 5))
    gallery.build()
    with run_service(gallery.open()) as running, httpx.Client(base_url=running.url) as http:
        found = http.get("/v1/failures").json()
        assert found["counts"] == {"truncated": 2}
        assert [row["key"] for row in found["rows"]] == [KEYS[2], KEYS[5]]
        assert found["rows"][0]["error"] == "cut off"
        assert found["rows"][0]["picture"].startswith("data:image/jpeg;base64,")
    with run_service(gallery.open(), read=None) as plain, httpx.Client(base_url=plain.url) as http:
        row = http.get("/v1/failures").json()["rows"][0]
        assert (row.get("picture"), row["first_bytes"]) == (None, "")
