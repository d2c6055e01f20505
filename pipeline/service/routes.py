"""The operations under ``/v1``."""

import asyncio
import json
from collections.abc import Sequence
from itertools import compress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.convertors import Convertor, register_url_convertor

from pipeline.errors import QueryError, UnknownKeyError
from pipeline.index.map import MapPoints
from pipeline.index.search.generation import Snapshot
from pipeline.index.search.search_index import Neighbour
from pipeline.index.search.values import to_json
from pipeline.index.search.where import is_filterable
from pipeline.service.forms import get_media_type, read_form, read_json
from pipeline.service.lookups import Lookups, Target
from pipeline.service.openapi import describe_body, describe_problems
from pipeline.service.problems import Problem, explain_query
from pipeline.service.queries import compile_filter
from pipeline.service.results import list_public_columns, make_classes, make_results, show_columns
from pipeline.service.schema import (
    BatchRequest,
    BatchResponse,
    Column,
    EmbedForm,
    EmbedRequest,
    EmbedResponse,
    FilterText,
    Info,
    Item,
    MapResponse,
    SampleResponse,
    SearchForm,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    decode_base64,
    encode_vector,
)

router = APIRouter(prefix="/v1")

JSON, FORM = "application/json", "multipart/form-data"
PICTURE_HEADERS = {
    "Cache-Control": "private, max-age=3600",
    "Content-Security-Policy": "default-src 'none'; sandbox",
}
Size = Literal["64", "256", "512", "original"]
QueryKey = Annotated[str, Query(min_length=1, description="Key of an indexed image.")]
Neighbours = Annotated[int, Query(ge=0, le=100, description="Neighbours to add.")]
WithVector = Annotated[bool, Query(description="Add the stored vector.")]


class KeyConvertor(Convertor[str]):
    """A key in a path: everything, line breaks too, which Starlette's own ``path`` stops at."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """Return the key; the server has undone the escapes."""
        return value

    def to_string(self, value: str) -> str:
        """Return the key as it stands in a path."""
        return value


register_url_convertor("key", KeyConvertor())


def get_lookups(request: Request) -> Lookups:
    """Return what answers; it hangs on the application.

    Raises:
        Problem: 503, the service is starting or stopping.
    """
    lookups: Lookups | None = getattr(request.app.state, "lookups", None)
    if lookups is None or not lookups.is_open:
        raise Problem(503, "not_ready", detail="starting or stopping", retry_after_s=2)
    return lookups


def answer(body: BaseModel) -> Response:
    """Return a model as JSON without the fields that are not set."""
    return Response(body.model_dump_json(exclude_none=True), media_type=JSON)


@router.post(
    "/search",
    response_model=SearchResponse,
    response_model_exclude_none=True,
    responses=describe_problems(400, 404, 409, 413, 415, 422, 501),
    openapi_extra=describe_body(SearchRequest, SearchForm),
)
async def search(request: Request) -> Response:
    """Find the nearest indexed images to a key, a vector or an image.

    The form carries an encoded image as a file, and the other fields as JSON in ``options``.
    """
    lookups = get_lookups(request)
    snapshot = lookups.index.snapshot
    if get_media_type(request) == FORM:
        form = await read_form(request, SearchForm)
        return answer(await lookups.search_image(form.image, form.options, snapshot))
    found = await read_json(request, SearchRequest, FORM)
    return answer(await lookups.search(found, snapshot))


@router.post(
    "/search/batch",
    response_model=BatchResponse,
    response_model_exclude_none=True,
    responses=describe_problems(404, 409, 413, 415, 422, 501),
    openapi_extra=describe_body(BatchRequest),
)
async def search_batch(request: Request) -> Response:
    """Answer several searches from one generation; one that is wrong fails them all.

    The problem's `where` begins with the number of that search, counted from 0.
    """
    lookups = get_lookups(request)
    batch = await read_json(request, BatchRequest)
    snapshot = lookups.index.snapshot
    searches = (_search_one_of(batch, n, lookups, snapshot) for n in range(len(batch.searches)))
    return answer(BatchResponse(responses=await asyncio.gather(*searches)))


async def _search_one_of(
    batch: BatchRequest, number: int, lookups: Lookups, snapshot: Snapshot
) -> SearchResponse:
    """Answer one search of a batch; what is wrong with it names its number.

    Raises:
        Problem: The search does not fit this index, or too much is waiting.
    """
    path = f"searches.{number}"
    try:
        return await lookups.search(batch.searches[number], snapshot)
    except (QueryError, UnknownKeyError) as error:
        raise explain_query(error).locate(path) from error
    except Problem as problem:
        raise problem.locate(path) from problem


@router.post(
    "/embed",
    response_model=EmbedResponse,
    response_model_exclude_none=True,
    responses=describe_problems(400, 413, 415, 422, 501),
    openapi_extra=describe_body(EmbedRequest, EmbedForm),
)
async def embed(request: Request) -> Response:
    """Embed images as the indexed ones were: same backbone, same preprocessing."""
    lookups = get_lookups(request)
    images, where = await _read_images(request)
    embeddings = await asyncio.gather(
        *(lookups.embed(data, where=f"{where}.{i}") for i, data in enumerate(images))
    )
    space = lookups.index.snapshot.info.space
    classes = [make_classes(one.classes) or [] for one in embeddings]
    vectors = [one.vector for one in embeddings if one.vector is not None]
    body = EmbedResponse(
        space=space.id,
        dim=space.dim,
        vectors_base64=[encode_vector(vector) for vector in vectors],
        classes=classes if any(classes) else None,
    )
    return answer(body)


async def _read_images(request: Request) -> tuple[list[bytes], str]:
    """Return the images of a JSON or form body, and the name they have there."""
    if get_media_type(request) == FORM:
        return (await read_form(request, EmbedForm)).images, "images"
    texts = enumerate((await read_json(request, EmbedRequest, FORM)).images_base64)
    where = "images_base64"
    return [decode_base64(text, where=f"{where}.{i}") for i, text in texts], where


@router.get("/info", response_model=Info, responses=describe_problems())
async def show_info(request: Request) -> Response:
    """Describe what is being served: the generation, its space, its size and its age."""
    return answer(await asyncio.to_thread(describe_service, get_lookups(request)))


def describe_service(lookups: Lookups) -> Info:
    """Return what is being served."""
    snapshot = lookups.index.snapshot
    info, embedder, points = snapshot.info, lookups.embedder, snapshot.opened.map
    columns = [
        Column(name=item.name, type=str(item.type), filterable=is_filterable(item.type))
        for item in list_public_columns(info)
    ]
    return Info(
        generation=info.generation,
        rows=info.rows,
        dim=info.dim,
        kind=info.kind,
        space=info.space.to_dict(),
        space_id=info.space.id,
        recall=info.measured.get("recall"),
        created_s=info.created_s,
        newest_image_s=info.newest_image_s,
        columns=columns,
        image_queries=embedder is not None,
        classes=embedder is not None and embedder.options.top_k_classes > 0,
        images=lookups.pictures is not None,
        map_points=len(points.keys) if points else 0,
    )


@router.get("/map", response_model=MapResponse, responses=describe_problems(404, 422))
async def show_map(
    request: Request,
    filter: FilterText = "",  # noqa: A002
    column: Annotated[str, Query(description="Also return this column of each point.")] = "",
) -> Response:
    """Return a sample of the collection laid out in two dimensions; its part under a filter."""
    snapshot = get_lookups(request).index.snapshot
    points = await asyncio.to_thread(lambda: snapshot.opened.map)
    if points is None:
        raise Problem(404, "no_map", detail="this generation was built without a map")
    points = await asyncio.to_thread(filter_points, points, filter, snapshot)
    head: dict[str, Any] = {"generation": snapshot.info.generation}
    if column:
        head["values"] = await asyncio.to_thread(read_values, points.keys, column, snapshot)
    body = json.dumps(head, ensure_ascii=False)[:-1].encode() + b"," + points.to_json()[1:]
    return Response(body, media_type=JSON)


def read_values(keys: Sequence[str], column: str, snapshot: Snapshot) -> list[Any]:
    """Return the values of a column of images, as filters take them.

    Raises:
        Problem: 422, there is no such column to show.
    """
    names = list_public_columns(snapshot.info).names
    if column not in names:
        detail = f"no column {column!r}; columns: {', '.join(names)}"
        raise Problem(422, "invalid_column", detail=detail, where="column")
    return [
        None if hit is None else to_json(hit.columns.get(column)) for hit in snapshot.find_all(keys)
    ]


def filter_points(points: MapPoints, text: str, snapshot: Snapshot) -> MapPoints:
    """Return the points of a map whose images fulfil a filter."""
    where = compile_filter(text, snapshot)
    if where is None:
        return points
    kept = snapshot.list_fulfilling(points.keys, where)
    return MapPoints(points.method, tuple(compress(points.keys, kept)), points.xy[kept])


@router.get(
    "/sample",
    response_model=SampleResponse,
    response_model_exclude_none=True,
    responses=describe_problems(422),
)
async def sample(
    request: Request,
    n: Annotated[int, Query(ge=1, le=100)] = 12,
    filter: FilterText = "",  # noqa: A002
) -> Response:
    """Return some indexed images that fulfil a filter, drawn at random."""
    snapshot = get_lookups(request).index.snapshot
    hits = await asyncio.to_thread(draw_sample, snapshot, n, filter)
    items = make_results(hits, snapshot, ["metadata"])
    return answer(SampleResponse(generation=snapshot.info.generation, items=items))


def draw_sample(snapshot: Snapshot, n: int, text: str) -> list[Neighbour]:
    """Return up to ``n`` images that fulfil a filter."""
    return snapshot.sample(n, where=compile_filter(text, snapshot))


PICTURE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "The picture is the one that `If-None-Match` names."},
    **describe_problems(404, 410, 422),
}


@router.get("/image", response_class=Response, responses=PICTURE_RESPONSES)
async def show_image(request: Request, key: QueryKey, size: Size = "original") -> Response:
    """Return an indexed image, or a thumbnail whose longest side has ``size`` pixels."""
    lookups = get_lookups(request)
    hit = await asyncio.to_thread(lookups.index.snapshot.find, key)
    picture = await lookups.picture(hit, None if size == "original" else int(size))
    headers = PICTURE_HEADERS | {"ETag": picture.etag}
    if request.headers.get("if-none-match") == picture.etag:
        return Response(status_code=304, headers=headers)
    if picture.media_type == "application/octet-stream":
        headers["Content-Disposition"] = "attachment"
    return Response(picture.data, media_type=picture.media_type, headers=headers)


@router.get("/items/{key:key}/image", response_class=Response, responses=PICTURE_RESPONSES)
async def show_image_of_path(request: Request, key: str, size: Size = "original") -> Response:
    """Do as `/v1/image`, for keys that a path can hold.

    Not for keys that browsers and proxies tidy up (`./`, `//`), nor where one key is another's
    with `/image` at its end.
    """
    try:
        return await show_image(request, key, size)
    except UnknownKeyError:
        # "…/image" may be the end of a key; that image's own picture is at "…/image/image".
        return await show_item(request, f"{key}/image")


@router.get(
    "/item",
    response_model=Item,
    response_model_exclude_none=True,
    responses=describe_problems(404, 422),
)
async def show_item(
    request: Request, key: QueryKey, neighbours: Neighbours = 0, vector: WithVector = False
) -> Response:
    """Return what is known of an indexed image."""
    lookups = get_lookups(request)
    snapshot = lookups.index.snapshot
    hit = await asyncio.to_thread(snapshot.find, key)
    stored = await asyncio.to_thread(snapshot.vector, key) if vector or neighbours else None
    found: list[Any] | None = None
    if stored is not None and neighbours:
        options = SearchOptions(k=neighbours)
        found = (
            await lookups.search_target(Target(stored, frozenset([key])), options, snapshot)
        ).results
    item = Item(
        key=hit.key,
        generation=snapshot.info.generation,
        metadata=show_columns(hit),
        vector_base64=encode_vector(stored) if vector and stored is not None else None,
        neighbours=found,
    )
    return answer(item)


@router.get(
    "/items/{key:key}",
    response_model=Item,
    response_model_exclude_none=True,
    responses=describe_problems(404, 422),
)
async def show_item_of_path(
    request: Request, key: str, neighbours: Neighbours = 0, vector: WithVector = False
) -> Response:
    """Do as `/v1/item`, for keys that a path can hold; see `/v1/items/{key}/image`."""
    return await show_item(request, key, neighbours, vector)
