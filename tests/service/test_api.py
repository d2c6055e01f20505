import asyncio
import base64
import datetime
import json
import math
import tarfile
from dataclasses import replace
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.errors import RecordError
from pipeline.images.decode import ImageLimits, decode_image
from pipeline.index.search.where import compile_where
from pipeline.records import Embedding
from pipeline.service import queries
from pipeline.service.results import list_public_columns, make_results, show_columns
from pipeline.service.schema import check_filters
from service.gallery import AWKWARD_KEYS, COLOURS, Gallery, make_image, make_vectors
from service.services import ColourEmbedder, run_service

KEY = "photos/000.tar/00003.jpg"


def nest(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)


def post_search(http, query, **options):
    return http.post("/v1/search", json={"query": query, "k": 5} | options)


def encode(vector):
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def check_problem(response, status, code):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, "about:blank")
    assert body["detail"]
    return body


def test_a_search_by_key_gives_the_index_s_neighbours_without_the_image_itself(http, service):
    answer = post_search(http, {"key": KEY}).json()
    expected = service.index.neighbours_of(KEY, 5)
    assert [r["key"] for r in answer["results"]] == [n.key for n in expected]
    scores = [r["score"] for r in answer["results"]]
    assert scores == pytest.approx([n.score for n in expected], abs=1e-6)
    assert answer["generation"] == service.index.info.generation
    assert answer["took"]["search_ms"] > 0


def test_a_vector_is_searched_for_as_a_list_and_as_base64_alike(http, service):
    vector = make_vectors(range(3, 4))[0]
    as_list = post_search(http, {"vector": vector.tolist()}).json()
    as_text = post_search(http, {"vector_base64": encode(vector)}).json()
    assert as_list["results"] == as_text["results"]
    assert as_list["results"][0]["key"] == KEY
    assert as_list["results"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_an_uploaded_image_equals_the_same_image_in_base64(http, service):
    image = make_image(3)
    as_text = post_search(http, {"image_base64": base64.b64encode(image).decode()}).json()
    form = {"options": json.dumps({"k": 5})}
    as_form = http.post("/v1/search", files={"image": image}, data=form).json()
    assert as_form["results"] == as_text["results"]
    assert len(as_form["results"]) == 5


def test_an_upload_without_options_takes_the_defaults(http):
    answer = http.post("/v1/search", files={"image": make_image(3)}).json()
    assert len(answer["results"]) == 10
    assert "metadata" in answer["results"][0]


def test_an_image_is_looked_up_by_the_vector_that_embed_gives(http):
    image = make_image(8)
    embedded = http.post("/v1/embed", files=[("images", image), ("images", make_image(2))]).json()
    assert embedded["dim"] == 16
    assert len(embedded["vectors_base64"]) == len(embedded["classes"]) == 2
    by_vector = post_search(http, {"vector_base64": embedded["vectors_base64"][0]}).json()
    by_image = post_search(http, {"image_base64": base64.b64encode(image).decode()}).json()
    assert by_vector["results"] == by_image["results"]
    json_body = {"images_base64": [base64.b64encode(image).decode()]}
    again = http.post("/v1/embed", json=json_body).json()
    assert again["vectors_base64"] == embedded["vectors_base64"][:1]
    assert again["space"] == embedded["space"]


def test_classes_of_the_query_image_come_when_asked_for(http):
    query = {"image_base64": base64.b64encode(make_image(3)).decode()}
    assert "classes" not in post_search(http, query).json()
    answer = post_search(http, query, include=["classes"]).json()
    assert len(answer["classes"]) == 5
    assert answer["classes"][0] == {"index": 0, "probability": pytest.approx(0.1)}
    assert "metadata" not in answer["results"][0]


def test_metadata_shows_carried_columns_and_hides_where_the_data_lies(http):
    result = post_search(http, {"key": KEY}).json()["results"][0]
    assert set(result["metadata"]) == {"width", "height", "colour", "price", "cls"}


def test_bytes_in_carried_columns_stay_out_of_json(service):
    info = service.index.info
    columns = info.columns.append(pa.field("raw", pa.binary()))
    assert "raw" not in list_public_columns(replace(info, columns=columns)).names
    hit = service.index.snapshot.find(KEY)
    shown = show_columns(replace(hit, columns=dict(hit.columns) | {"raw": b"\xff"}))
    assert "colour" in shown
    assert "raw" not in shown


def test_metadata_of_every_type_is_valid_json_and_loses_nothing(service):
    values = {
        "id": 2**64 - 1,
        "price": math.nan,
        "ratios": [-math.inf, 1.5],
        "nested": {"raw": b"\xff"},
        "day": datetime.date(2024, 5, 31),
        "at": pa.scalar(1704067200123456789, pa.timestamp("ns", "UTC")).as_py(),
        "lasts": datetime.timedelta(days=1, seconds=3),
    }
    hit = replace(service.index.snapshot.find(KEY), columns=values)
    [result] = make_results([hit], service.index.snapshot, ["metadata"])
    assert json.loads(result.model_dump_json(), parse_constant=pytest.fail)["metadata"] == {
        "id": 2**64 - 1,
        "price": None,
        "ratios": [None, 1.5],
        "nested": {"raw": "ff"},
        "day": "2024-05-31",
        "at": "2024-01-01T00:00:00.123456789Z",
        "lasts": "P1DT3S",
    }


def test_vectors_come_when_asked_for(http, service):
    result = post_search(http, {"key": KEY}, include=["vector"]).json()["results"][0]
    stored = np.frombuffer(base64.b64decode(result["vector_base64"]), "<f4")
    assert np.allclose(stored, service.index.vector(result["key"]))
    assert set(result) == {"key", "score", "vector_base64"}


def test_offset_continues_where_the_first_answer_ended(http):
    ten = post_search(http, {"key": KEY}, k=10).json()["results"]
    assert post_search(http, {"key": KEY}, k=4, offset=6).json()["results"] == ten[6:]
    assert post_search(http, {"key": KEY}, offset=1000).json()["results"] == []


def test_a_score_threshold_leaves_out_the_less_similar(http):
    ten = post_search(http, {"key": KEY}, k=10).json()["results"]
    floor = ten[4]["score"]
    kept = post_search(http, {"key": KEY}, k=10, score_threshold=floor - 1e-4).json()["results"]
    assert kept == ten[:5]


def test_exact_search_agrees_with_the_flat_index(http):
    exact = post_search(http, {"key": KEY}, exact=True).json()["results"]
    assert [r["key"] for r in exact] == [
        r["key"] for r in post_search(http, {"key": KEY}).json()["results"]
    ]


@pytest.mark.parametrize(
    "where", ["colour = teal and price > 20", {"colour": "teal", "price": {"$gt": 20}}]
)
def test_a_filter_is_fulfilled_by_every_result(http, where):
    results = post_search(http, {"key": "photos/000.tar/00000.jpg"}, k=50, filter=where).json()
    found = [r["metadata"] for r in results["results"]]
    assert len(found) > 2
    assert all(m["colour"] == "teal" and m["price"] > 20 for m in found)


def test_a_wrong_filter_names_the_column_that_was_meant(http):
    problem = check_problem(
        post_search(http, {"key": KEY}, filter="color = teal"), 422, "invalid_filter"
    )
    assert problem["detail"] == "no column 'color' to filter by; did you mean 'colour'?"
    assert problem["where"] == "filter"


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_filter_of_a_search_is_refused_and_not_taken_for_none(http, text):
    answer = post_search(http, {"key": KEY}, filter=text)
    problem = check_problem(answer, 422, "invalid_filter")
    assert "leave it out to search all images" in problem["detail"]
    assert post_search(http, {"key": KEY}).status_code == 200


def test_a_filter_cannot_name_a_hidden_column(http):
    check_problem(post_search(http, {"key": KEY}, filter="shard ~ tmp"), 422, "invalid_filter")


@pytest.mark.parametrize(
    ("query", "code", "words"),
    [
        ({"vector": [1.0, 2.0]}, "invalid_vector", "has 2 values; this index has 16"),
        ({"vector": [0.0] * 16}, "invalid_vector", "zero"),
        ({"vector": [1e39] * 16}, "invalid_vector", "not finite"),
        ({"vector": []}, "invalid_request", "at least 1"),
        ({"vector_base64": "AAA"}, "invalid_base64", "base64"),
        ({"vector_base64": "AAAA"}, "invalid_vector", "3 bytes are no whole number"),
        ({"vector_base64": "AADAfw=="}, "invalid_vector", "1 values"),
        ({"image_base64": "aGVsbG8="}, "invalid_image", "the image is unsupported"),
        ({}, "invalid_request", "exactly one"),
        ({"key": "a", "vector": [1.0]}, "invalid_request", "exactly one"),
        ({"url": "http://10.0.0.1/secret"}, "invalid_request", "not permitted"),
    ],
)
def test_a_query_that_cannot_be_answered_says_why(http, query, code, words):
    assert words in check_problem(post_search(http, query), 422, code)["detail"]


def test_values_that_are_not_finite_are_no_json_numbers_here(http):
    body = '{"query": {"vector": [NaN, 1]}}'
    headers = {"content-type": "application/json"}
    check_problem(http.post("/v1/search", content=body, headers=headers), 422, "invalid_request")


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 1001}, {"k": "5"}, {"offset": -1}, {"nprobe": 3}]
)
def test_options_out_of_range_are_refused(http, options):
    problem = check_problem(post_search(http, {"key": KEY}, **options), 422, "invalid_request")
    assert problem["where"] == next(iter(options))


def test_a_vector_of_another_space_is_refused(http, service):
    query = {"vector": [1.0] * 16}
    assert post_search(http, query, space=service.index.info.space.id).status_code == 200
    check_problem(post_search(http, query, space="0123456789abcdef"), 409, "other_space")


def test_an_unknown_key_is_not_found_and_not_repeated(http):
    secret = "<script>alert(1)</script>"
    problem = check_problem(post_search(http, {"key": secret}), 404, "unknown_key")
    assert secret not in json.dumps(problem)


@pytest.mark.parametrize(
    ("data", "files", "status", "code"),
    [
        ({}, {"picture": b"x"}, 422, "invalid_form"),
        ({"options": "{"}, {"image": b"x"}, 422, "invalid_request"),
        ({"options": "{}", "more": "x"}, {"image": b"x"}, 400, "invalid_form"),
        ({"image": "not a file"}, {"options": b"x"}, 422, "invalid_form"),
    ],
)
def test_a_form_that_does_not_fit_says_why(http, data, files, status, code):
    check_problem(http.post("/v1/search", data=data, files=files), status, code)


def test_a_broken_form_is_a_bad_request(http):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    check_problem(http.post("/v1/search", content=b"--y\r\n", headers=headers), 400, "invalid_form")


def test_other_media_types_are_refused(http):
    headers = {"content-type": "text/plain"}
    for path in ("/v1/search", "/v1/search/batch", "/v1/embed"):
        response = http.post(path, content=b"{}", headers=headers)
        check_problem(response, 415, "unsupported_media_type")


def test_a_batch_is_answered_in_order_from_one_generation(http):
    keys = [f"photos/000.tar/{number:05d}.jpg" for number in range(20)]
    body = {"searches": [{"query": {"key": key}, "k": 3} for key in keys]}
    answers = http.post("/v1/search/batch", json=body).json()["responses"]
    assert [a["results"] for a in answers] == [
        post_search(http, {"key": key}, k=3).json()["results"] for key in keys
    ]
    assert len({a["generation"] for a in answers}) == 1


def test_one_wrong_search_fails_its_batch(http):
    body = {"searches": [{"query": {"key": KEY}}, {"query": {"key": "nobody"}}]}
    check_problem(http.post("/v1/search/batch", json=body), 404, "unknown_key")
    check_problem(http.post("/v1/search/batch", json={"searches": []}), 422, "invalid_request")


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"query": {"key": KEY}, "filter": "color = teal"}, "searches.2.filter"),
        ({"query": {"key": KEY}, "k": 0}, "searches.2.k"),
        ({"query": {"key": KEY}, "space": "0123456789abcdef"}, "searches.2.space"),
        ({"query": {"key": "no such key"}}, "searches.2"),
        ({"query": {"vector": [1.0]}}, "searches.2.query.vector"),
        ({"query": {"vector_base64": "AAAA"}}, "searches.2.query.vector_base64"),
        ({"query": {"image_base64": "aGVsbG8="}}, "searches.2.query.image_base64"),
    ],
)
def test_a_wrong_search_of_a_batch_is_named_by_its_number(http, wrong, where):
    fine = {"query": {"key": KEY}, "k": 2}
    response = http.post("/v1/search/batch", json={"searches": [fine, fine, wrong, fine]})
    assert response.json()["where"] == where
    assert response.status_code in (404, 409, 422)


def test_an_item_shows_its_metadata_neighbours_and_vector(http, service):
    item = http.get(f"/v1/items/{KEY}", params={"neighbours": 3, "vector": True}).json()
    assert item["key"] == KEY
    assert item["metadata"]["colour"] == "teal"
    assert [n["key"] for n in item["neighbours"]] == [
        n.key for n in service.index.neighbours_of(KEY, 3)
    ]
    assert np.frombuffer(base64.b64decode(item["vector_base64"]), "<f4").shape == (16,)
    assert "neighbours" not in http.get(f"/v1/items/{KEY}").json()


def test_a_key_with_escaped_slashes_is_the_same_item(http):
    escaped = KEY.replace("/", "%2F")
    assert http.get(f"/v1/items/{escaped}").json()["key"] == KEY
    assert http.get(f"/v1/items/{escaped}/image").status_code == 200


@pytest.mark.parametrize(
    "path", ["..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "photos/..%2F000.tar", "%00", ""]
)
def test_keys_are_looked_up_and_never_opened_as_paths(http, path):
    for suffix in ("", "/image"):
        check_problem(http.get(f"/v1/items/{path}{suffix}"), 404, "unknown_key")


def test_the_original_is_read_from_its_shard_byte_for_byte(http, gallery):
    response = http.get(f"/v1/items/{KEY}/image")
    with tarfile.open(gallery.folder / "photos/000.tar") as tar:
        assert response.content == tar.extractfile("00003.jpg").read()
    assert response.headers["content-type"] == "image/jpeg"
    assert "sandbox" in response.headers["content-security-policy"]


def test_a_thumbnail_is_small_and_made_once(http, service):
    service.images_read.clear()
    key = "photos/000.tar/00017.jpg"
    responses = [http.get(f"/v1/items/{key}/image", params={"size": "64"}) for _ in range(3)]
    assert service.images_read == [key]
    assert len({r.content for r in responses}) == 1
    assert len(responses[0].content) < 4000
    seen = http.get(
        f"/v1/items/{key}/image?size=64", headers={"if-none-match": responses[0].headers["etag"]}
    )
    assert (seen.status_code, seen.content) == (304, b"")


def test_thumbnails_come_in_a_few_sizes_only(http):
    check_problem(http.get(f"/v1/items/{KEY}/image?size=1000000"), 422, "invalid_request")


@pytest.fixture(scope="module")
def awkward(awkward_gallery):
    with (
        run_service(awkward_gallery.open()) as service,
        httpx.Client(base_url=service.url) as http,
    ):
        yield http


@pytest.mark.parametrize("end", AWKWARD_KEYS)
def test_every_key_works_in_every_route(awkward, end):
    key = f"photos/000.tar/{end}"
    picture = make_image(AWKWARD_KEYS.index(end))
    assert awkward.get("/v1/item", params={"key": key}).json()["key"] == key
    assert awkward.get("/v1/image", params={"key": key}).content == picture
    assert awkward.get("/v1/item", params={"key": key, "neighbours": 2}).json()["neighbours"]
    results = post_search(awkward, {"key": key}, k=3).json()["results"]
    assert len(results) == 3
    with pipeline.Client(str(awkward.base_url)) as client:
        assert client.item(key).key == key
        assert client.image(key) == picture
        assert len(client.search(key=key, k=2).results) == 2
    path = f"/v1/items/{quote(key, safe='')}"
    if end == "x/image":  # the picture of "x" has the same path: only /v1/item tells them apart
        assert awkward.get(path).content == make_image(AWKWARD_KEYS.index("x"))
    else:
        assert awkward.get(path).json()["key"] == key
        assert awkward.get(f"{path}/image").content == picture


def test_a_source_that_changed_or_is_gone_is_never_shown(tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(3)
    gallery.build()
    shard = tmp_path / "photos/000.tar"
    with run_service(gallery.open()) as service, httpx.Client(base_url=service.url) as http:
        path = "/v1/items/photos/000.tar/00001.jpg/image"
        shard.write_bytes(bytes(shard.stat().st_size))
        check_problem(http.get(path), 410, "source_changed")
        shard.unlink()
        problem = check_problem(http.get(path), 410, "source_gone")
        assert str(tmp_path) not in json.dumps(problem)


def test_a_sample_draws_different_images_each_time(http):
    first = http.get("/v1/sample?n=10").json()["items"]
    second = http.get("/v1/sample?n=10").json()["items"]
    assert len({item["key"] for item in first}) == 10
    assert first != second
    assert http.get("/v1/sample?n=100").json()["items"][0]["metadata"]["colour"]
    check_problem(http.get("/v1/sample?n=101"), 422, "invalid_request")


@pytest.mark.parametrize(
    ("text", "count"), [("colour = navy", 10), ("colour = navy and cls = 9", 0), ("  ", 60)]
)
def test_a_sample_and_the_map_take_a_filter(http, service, text, count):
    items = http.get("/v1/sample", params={"n": 100, "filter": text}).json()["items"]
    points = http.get("/v1/map", params={"filter": text}).json()
    keys = {item["key"] for item in items}
    assert len(items) == len(keys) == count
    assert set(points["keys"]) == keys
    assert len(points["x"]) == len(points["y"]) == count
    assert {item["metadata"]["colour"] for item in items} <= (
        {"navy"} if "navy" in text else set(COLOURS)
    )
    everything = http.get("/v1/map").json()
    place = dict(zip(everything["keys"], everything["x"], strict=True))
    assert points["x"] == [place[key] for key in points["keys"]]


def test_a_filtered_sample_draws_different_images_each_time(http):
    wanted = {"n": 3, "filter": "colour in (navy, teal)"}
    draws = [http.get("/v1/sample", params=wanted).json()["items"] for _ in range(6)]
    assert all(len(items) == 3 for items in draws)
    assert len({items[0]["key"] for items in draws}) > 1


def test_a_wrong_filter_of_a_sample_or_the_map_says_why(http):
    for path in ("/v1/sample", "/v1/map"):
        problem = check_problem(http.get(path, params={"filter": "a = 1"}), 422, "invalid_filter")
        assert problem["where"] == "filter"
        check_problem(http.get(path, params={"filter": "x" * 2001}), 422, "invalid_request")


def list_conditions(lists, values):
    return {"$or": [{"cls": {"$in": [str(v) for v in range(values)]}} for _ in range(lists)]}


def test_filters_of_a_request_are_bounded_together(http):
    fits = [{"query": {"key": KEY}, "filter": list_conditions(4, 1000)} for _ in range(2)]
    assert http.post("/v1/search/batch", json={"searches": fits}).status_code == 200
    heavy = [{"query": {"key": KEY}, "filter": list_conditions(9, 1000)} for _ in range(2)]
    problem = check_problem(
        http.post("/v1/search/batch", json={"searches": heavy}), 422, "invalid_request"
    )
    assert "may hold 10,000 values, keys included, and 200,000 characters" in problem["detail"]
    assert problem["where"] == "searches"
    problem = check_problem(
        post_search(http, {"key": KEY}, filter=list_conditions(11, 1000)), 422, "invalid_request"
    )
    assert problem["where"] == "filter"
    long_texts = {"cls": {"$in": ["x" * 50_000] * 5}}
    problem = check_problem(
        post_search(http, {"key": KEY}, filter=long_texts), 422, "invalid_request"
    )
    assert problem["where"] == "filter"


@pytest.mark.parametrize("depth", [20, 150, 5000, 100_000])
def test_a_deeply_nested_filter_is_refused(http, depth):
    nested = '{"$not":' * depth + "{}" + "}" * depth
    body = f'{{"query": {{"key": "{KEY}"}}, "filter": {nested}}}'
    headers = {"content-type": "application/json"}
    response = http.post("/v1/search", content=body, headers=headers)
    assert response.status_code == 422


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.recursive(st.text(max_size=5) | st.integers() | st.none(), nest)))
def test_filters_may_hold_just_what_they_may(trees):
    """The truth is a walk by recursion."""

    def walk(value):
        if isinstance(value, dict):
            parts = [walk(part) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            parts = [walk(part) for part in value]
        else:
            return 1, len(value) if isinstance(value, str) else 0
        return sum(p[0] for p in parts), sum(p[1] for p in parts)

    filters = [None, *({"cls": tree} for tree in trees)]
    values, chars = walk(filters[1:])
    check_filters(filters, max_values=values, max_chars=chars)
    for less in (values - 1, chars), (values, chars - 1):
        if min(less) >= 0:
            with pytest.raises(ValueError, match="these hold more"):
                check_filters(filters, max_values=less[0], max_chars=less[1])


def test_filters_are_compiled_outside_the_event_loop(http, monkeypatch):
    """Or a long one would hold up everybody, and the time limit with them."""
    in_loop = []

    def compile_and_note(*arguments):
        try:
            asyncio.get_running_loop()
            in_loop.append(True)
        except RuntimeError:
            in_loop.append(False)
        return compile_where(*arguments)

    monkeypatch.setattr(queries, "compile_where", compile_and_note)
    search = {"query": {"key": KEY}, "filter": "cls = 1"}
    assert http.post("/v1/search", json=search).status_code == 200
    assert http.post("/v1/search/batch", json={"searches": [search]}).status_code == 200
    form = {"options": json.dumps({"filter": "cls = 1"})}
    http.post("/v1/search", files={"image": make_image(3)}, data=form)
    for path in ("/v1/sample", "/v1/map"):
        assert http.get(path, params={"filter": "cls = 1"}).status_code == 200
    assert in_loop == [False] * 5


def test_info_describes_what_is_served(http, service):
    info = http.get("/v1/info").json()
    assert info["rows"] == 60
    assert info["generation"] == service.index.info.generation
    assert info["space_id"] == service.index.info.space.id
    assert info["newest_image_s"] == 1.79e9
    assert (info["image_queries"], info["classes"], info["images"]) == (True, True, True)
    assert info["map_points"] == 60
    names = [column["name"] for column in info["columns"]]
    assert names == ["key", "width", "height", "colour", "price", "cls"]


def test_the_map_lays_out_keys_of_the_index(http, service):
    points = http.get("/v1/map").json()
    assert points["method"] == "pca"
    assert len(points["keys"]) == len(points["x"]) == len(points["y"]) == 60
    assert min(points["x"]) == 0
    assert max(points["y"]) == 1


def test_a_service_without_backbone_or_pictures_says_so(gallery):
    with (
        run_service(gallery.open(), read=None) as service,
        httpx.Client(base_url=service.url) as http,
    ):
        image = base64.b64encode(make_image(1)).decode()
        check_problem(post_search(http, {"image_base64": image}), 501, "no_image_queries")
        check_problem(
            http.post("/v1/embed", json={"images_base64": [image]}), 501, "no_image_queries"
        )
        check_problem(http.get(f"/v1/items/{KEY}/image"), 404, "images_off")
        assert post_search(http, {"key": KEY}).status_code == 200
        info = http.get("/v1/info").json()
        assert (info["image_queries"], info["images"]) == (False, False)


def test_an_image_beyond_the_pixel_limit_is_refused(gallery):
    class Strict(ColourEmbedder):
        def _embed(self, data):
            try:
                decode_image(data, limits=ImageLimits(max_pixels=100))
            except RecordError as error:
                return Embedding(error.status, error.reason)
            return super()._embed(data)

    with run_service(gallery.open(), embedder=Strict()) as service:
        response = httpx.post(f"{service.url}/v1/search", files={"image": make_image(1)})
        problem = check_problem(response, 422, "invalid_image")
        assert "too large" in problem["detail"]


def test_unknown_paths_and_methods_are_problems_too(http):
    check_problem(http.get("/v1/nothing"), 404, "not_found")
    response = http.put("/v1/search")
    check_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_fault_shows_no_traceback_and_no_path(gallery):
    def fail(_):
        raise ValueError("/secret/place")

    with run_service(gallery.open(), read=fail) as service:
        response = httpx.get(f"{service.url}/v1/items/{KEY}/image?size=64")
        problem = check_problem(response, 500, "internal")
        assert "secret" not in json.dumps(problem)
        assert response.headers["x-content-type-options"] == "nosniff"
