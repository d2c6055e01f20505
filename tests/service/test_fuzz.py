"""The service against its own OpenAPI document: schemathesis asks, as it should and should not."""

import base64
import collections

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from service.gallery import make_image
from service.services import ColourEmbedder, run_service

OPERATIONS = (
    ("POST", "/v1/search"),
    ("POST", "/v1/search/batch"),
    ("POST", "/v1/embed"),
    ("GET", "/v1/sample"),
    ("GET", "/v1/map"),
    ("GET", "/v1/item"),
    ("GET", "/v1/image"),
    ("GET", "/v1/items/{key}"),
    ("GET", "/v1/items/{key}/image"),
    ("POST", "/v1/items"),
    ("GET", "/v1/duplicates"),
)
PLAIN = tuple(
    ("GET", path)
    for path in (*("/v1/info", "/v1/facets", "/v1/failures", "/healthz", "/readyz", "/metrics"),)
)
"""They take nothing that could be wrong."""
CHECK_NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
EXAMPLES = 60
KEYS = [f"photos/000.tar/{number:05d}.jpg" for number in range(60)]
IMAGES = [base64.b64encode(make_image(number)).decode() for number in range(3)]
FILTERS = (
    None,
    "width > 1",
    {"cls": "1"},
    "colour = teal or not price < 50",
    {"price": {"$gt": 9}},
)


@pytest.fixture(scope="module")
def schema(gallery):
    load_all_checks()
    with run_service(gallery.open(), embedder=ColourEmbedder(top_k_classes=5)) as service:
        yield schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def test_every_operation_is_tried(schema):
    described = {(method.upper(), path) for path in schema for method in schema[path]}
    assert described == {*OPERATIONS, *PLAIN}


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [(*o, kind) for o in OPERATIONS for kind in ("valid", "meaningful", "invalid")]
    + [(*o, "valid") for o in PLAIN],
)
def test_an_operation_answers_as_its_description_says(schema, method, path, kind):
    """``meaningful`` puts keys, pictures and filters of the gallery where noise would be."""
    operation = schema[path][method]
    mode = GenerationMode.NEGATIVE if kind == "invalid" else GenerationMode.POSITIVE
    cases = operation.as_strategy(generation_mode=mode)
    checks = CHECKS.get_by_names(CHECK_NAMES)
    answers: collections.Counter[int] = collections.Counter()
    session = requests.Session()

    @given(case=cases.flatmap(give_meaning) if kind == "meaningful" else cases)
    @settings(
        max_examples=EXAMPLES if operation.body else EXAMPLES // 3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        response = case.call(session=session)
        answers[response.status_code] += 1
        case.validate_response(response, checks=checks)

    ask()
    print(method, path, kind, dict(sorted(answers.items())))
    if kind != "invalid" and (kind == "meaningful" or not operation.body):
        assert answers[200] or answers[404]
    if kind == "meaningful":
        assert answers[200]


def give_meaning(case):
    """Return a strategy of ``case`` with values that the gallery knows."""
    for parameters in (case.path_parameters or {}, case.query or {}):
        if "key" in parameters:
            parameters["key"] = KEYS[len(str(parameters["key"])) % len(KEYS)]
        if "column" in parameters:
            parameters["column"] = "colour"
        if "filter" in parameters:
            texts = [text for text in FILTERS if isinstance(text, str)]
            parameters["filter"] = texts[len(str(parameters["filter"])) % len(texts)]
    body = case.body if isinstance(case.body, dict) else {}
    for search in body.get("searches", [body] if "query" in body else []):
        give_search_meaning(search)
    if "keys" in body:
        body["keys"] = KEYS[: len(body["keys"])]
    if "images_base64" in body:
        body["images_base64"] = [IMAGES[i % 3] for i in range(len(body["images_base64"]))]
    if case.media_type == "multipart/form-data" and body:
        case.media_type, case.body = "application/json", {"query": {"image_base64": IMAGES[0]}}
    return st.just(case)


def give_search_meaning(search):
    number = len(str(search))
    queries = (
        {"key": KEYS[number % len(KEYS)]},
        {"vector": [1.0 + number] * 16},
        {"image_base64": IMAGES[number % 3]},
        {"like": KEYS[:2], "unlike": KEYS[2:3]},
    )
    search["query"] = queries[number % len(queries)]
    search.pop("space", None)
    if "filter" in search:
        search["filter"] = FILTERS[number % len(FILTERS)]
