"""Request bodies: JSON or a form with a file becomes a checked model, or a problem."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pipeline.service.problems import Problem
from pipeline.service.schema import MAX_IMAGES

Model = TypeVar("Model", bound=BaseModel)

_MAX_OPTIONS_BYTES = 256 * 1024


def validate(model: type[Model], data: bytes | str) -> Model:
    """Return ``model`` read from JSON.

    Raises:
        Problem: 422 naming the first field that is wrong.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise explain_validation(error) from error


def explain_validation(error: ValidationError) -> Problem:
    """Return the answer to a body that does not fit; it does not repeat the body's values."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    detail = first["msg"].removeprefix("Value error, ")
    return Problem(422, "invalid_request", detail=detail, where=where or None)


def get_media_type(request: Request) -> str:
    """Return the media type of the body, lower case, without parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def refuse_media_type(*expected: str) -> Problem:
    """Return the answer to a body of another type."""
    return Problem(
        415, "unsupported_media_type", detail=f"send the body as {' or '.join(expected)}"
    )


async def read_json(request: Request, model: type[Model], *others: str) -> Model:
    """Return the model in a JSON body.

    Args:
        request: The request.
        model: What the body has to fit.
        others: Other media types that the operation takes, for the message.

    Raises:
        Problem: 415 not JSON, 422 it does not fit.
    """
    if get_media_type(request) != "application/json":
        raise refuse_media_type("application/json", *others)
    return validate(model, await request.body())


async def read_form(request: Request, model: type[Model]) -> Model:
    """Return the model in a multipart body: files are bytes, and each name holds a list of parts.

    Raises:
        Problem: 400 the form is broken or has too many parts, 422 it does not fit.
    """
    limits = {"max_files": MAX_IMAGES, "max_fields": 1, "max_part_size": _MAX_OPTIONS_BYTES}
    try:
        async with request.form(**limits) as form:
            parts = {name: [await _read_part(p) for p in form.getlist(name)] for name in form}
    except HTTPException as error:
        raise Problem(400, "invalid_form", detail=str(error.detail)) from error
    try:
        return model.model_validate(parts)
    except ValidationError as error:
        raise _explain_form(error, expected=", ".join(model.model_fields)) from error


async def _read_part(part: UploadFile | str) -> bytes | str:
    return part if isinstance(part, str) else await part.read()


def _explain_form(error: ValidationError, *, expected: str) -> Problem:
    problem = explain_validation(error)
    part, _, inside = (problem.where or "").partition(".")
    if part == "options":
        problem.where = inside or part
        return problem
    detail = f"{problem.detail}; the form may have: {expected}"
    return Problem(422, "invalid_form", detail=detail, where=part)
