"""The OpenAPI document: what the handlers really take and give, the errors included."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipeline.service.schema import (
    BatchRequest,
    EmbedForm,
    EmbedRequest,
    ItemsRequest,
    ProblemBody,
    SearchForm,
    SearchOptions,
    SearchRequest,
)

_REF = "#/components/schemas/"
_DESCRIPTIONS = {
    400: "The form is broken.",
    401: "No valid API key.",
    403: "Sent by the page of another site.",
    404: "There is no such image.",
    409: "The vector belongs to another space.",
    410: "The source of the image has changed or is gone.",
    413: "The body is too large.",
    415: "The body is of another type.",
    421: "The service is not known by this name.",
    422: "The request does not fit; `where` says which part of it.",
    429: "Too many requests of one client; `Retry-After` says when to go on.",
    500: "A fault of the service.",
    501: "The service has no backbone loaded.",
    503: "Too much is waiting, or nothing is ready; `Retry-After` says when to try again.",
    504: "The time limit has passed.",
}
BODIES: tuple[type[BaseModel], ...] = (
    *(SearchRequest, SearchOptions, SearchForm, BatchRequest, EmbedRequest, EmbedForm),
    *(ItemsRequest, ProblemBody),
)
GUARD_STATUSES = (401, 403, 421, 429, 500, 503, 504)


def describe_problems(*statuses: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of an operation that may fail with these statuses.

    Args:
        statuses: The operation's own.
        guarded: Add what the guard may answer before the operation is reached.
    """
    problem = {"application/problem+json": {"schema": {"$ref": f"{_REF}ProblemBody"}}}
    wanted = sorted({*statuses, *(GUARD_STATUSES if guarded else ())})
    return {status: {"description": _DESCRIPTIONS[status], "content": problem} for status in wanted}


def describe_body(
    json_model: type[BaseModel], form_model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Return the ``openapi_extra`` of an operation that takes JSON, and maybe a form as well."""
    models = {"application/json": json_model, "multipart/form-data": form_model}
    content = {
        media_type: {"schema": {"$ref": _REF + model.__name__}}
        for media_type, model in models.items()
        if model is not None
    }
    return {"requestBody": {"required": True, "content": content}}


def describe_app(app: FastAPI, *, dim: int, has_keys: bool) -> dict[str, Any]:
    """Return the document of a running service.

    Args:
        app: The application.
        dim: Length of the vectors it takes.
        has_keys: Whether callers need an API key.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in BODIES], ref_template=_REF + "{model}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["Query"]["properties"]["vector"] |= {"minItems": dim, "maxItems": dim}
    if has_keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        _require_keys(document)
    return document


def _require_keys(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if path.startswith("/v1/") or path == "/metrics":
            for operation in operations.values():
                operation["security"] = [{"bearer": []}, {"header": []}]
