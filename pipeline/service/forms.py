"""Request bodies: JSON or a form with a file becomes a checked model, or a problem."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
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


async def read_json(request: Request, model: type[Model]) -> Model:
    """Return the model in a JSON body.

    Raises:
        Problem: 415 not JSON, 422 it does not fit.
    """
    if get_media_type(request) != "application/json":
        raise refuse_media_type("application/json")
    return validate(model, await request.body())


@asynccontextmanager
async def open_form(request: Request) -> AsyncIterator[FormData]:
    """Give the parts of a multipart body, and close their files afterwards.

    Raises:
        Problem: 400, the form is broken or has too many parts.
    """
    try:
        form = await request.form(
            max_files=MAX_IMAGES, max_fields=1, max_part_size=_MAX_OPTIONS_BYTES
        )
    except HTTPException as error:
        raise Problem(400, "invalid_form", detail=str(error.detail)) from error
    try:
        yield form
    finally:
        await form.close()


async def take_files(form: FormData, name: str, *, limit: int) -> list[bytes]:
    """Return the contents of the files called ``name``.

    Raises:
        Problem: 422, there is none, there are too many, or they are no files.
    """
    files = [part for part in form.getlist(name) if isinstance(part, UploadFile)]
    if not 1 <= len(files) <= limit or len(files) != len(form.getlist(name)):
        some = "one file" if limit == 1 else f"1 to {limit} files"
        raise Problem(422, "invalid_form", detail=f"send {some} in the part {name!r}", where=name)
    return [await file.read() for file in files]


def take_text(form: FormData, name: str, *, default: str) -> str:
    """Return the text of the part called ``name``, which may also come as a file.

    Raises:
        Problem: 422, it is a file.
    """
    value = form.get(name, default)
    if not isinstance(value, str):
        raise Problem(422, "invalid_form", detail=f"send {name!r} as text", where=name)
    return value


def refuse_unknown_parts(form: FormData, known: set[str]) -> None:
    """Refuse parts that would be ignored.

    Raises:
        Problem: 422, naming what is expected.
    """
    if set(form) - known:
        expected = ", ".join(sorted(known))
        raise Problem(422, "invalid_form", detail=f"unknown part; the form may have: {expected}")
