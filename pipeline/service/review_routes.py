"""The operations under ``/v1`` that look through a collection rather than search it."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pipeline.service.forms import read_json
from pipeline.service.openapi import describe_body, describe_problems
from pipeline.service.results import make_results
from pipeline.service.routes import answer, get_lookups
from pipeline.service.schema import (
    FacetColumn,
    FacetsResponse,
    FacetValue,
    FailedRow,
    FailuresResponse,
    Group,
    GroupsResponse,
    ItemsRequest,
    ItemsResponse,
    Result,
)

review_router = APIRouter(prefix="/v1")


@review_router.get("/facets", response_model=FacetsResponse, responses=describe_problems())
async def show_facets(request: Request) -> Response:
    """Return what each column holds: its most frequent values, or its range."""
    lookups = get_lookups(request)
    snapshot = lookups.index.snapshot
    facets = await asyncio.to_thread(lookups.review.count_facets, snapshot)
    columns = [
        FacetColumn(
            name=one.name,
            present=one.present,
            distinct=one.distinct,
            values=[FacetValue(value=value, count=count) for value, count in one.values],
            low=one.low,
            high=one.high,
            bins=list(one.bins),
        )
        for one in facets.columns
    ]
    generation = snapshot.info.generation
    return answer(FacetsResponse(generation=generation, counted=facets.counted, columns=columns))


@review_router.post(
    "/items",
    response_model=ItemsResponse,
    response_model_exclude_none=True,
    responses=describe_problems(413, 415, 422),
    openapi_extra=describe_body(ItemsRequest),
)
async def list_items(request: Request) -> Response:
    """Return the columns of several images; keys that the index lacks are left out."""
    snapshot = get_lookups(request).index.snapshot
    wanted = await read_json(request, ItemsRequest)
    found = await asyncio.to_thread(snapshot.find_all, wanted.keys)
    items = make_results([hit for hit in found if hit is not None], snapshot, ["metadata"])
    return answer(ItemsResponse(generation=snapshot.info.generation, items=items))


@review_router.get(
    "/duplicates",
    response_model=GroupsResponse,
    response_model_exclude_none=True,
    responses=describe_problems(422),
)
async def show_duplicates(
    request: Request,
    n: Annotated[int, Query(ge=1, le=100, description="Groups to return.")] = 20,
    offset: Annotated[int, Query(ge=0, le=10_000, description="Groups to leave out.")] = 0,
) -> Response:
    """Return groups of images that are nearly the same, for somebody to look through."""
    lookups = get_lookups(request)
    snapshot = lookups.index.snapshot
    found = await asyncio.to_thread(lookups.review.find_groups, snapshot)
    groups = [
        Group(images=[Result(key=key, score=min(1.0, score)) for key, score in group])
        for group in found.groups[offset : offset + n]
    ]
    body = GroupsResponse(
        generation=snapshot.info.generation,
        method="bytes" if found.threshold is None else "cosine",
        threshold=found.threshold,
        total=len(found.groups),
        groups=groups,
    )
    return answer(body)


@review_router.get(
    "/failures",
    response_model=FailuresResponse,
    response_model_exclude_none=True,
    responses=describe_problems(),
)
async def show_failures(request: Request) -> Response:
    """Return why images have no embedding, with some of them."""
    lookups = get_lookups(request)
    found = await asyncio.to_thread(lookups.review.find_failures, lookups.index.snapshot)
    shown = lookups.pictures is not None
    rows = [
        FailedRow(
            key=row.key,
            status=row.status,
            error=row.reason,
            picture=row.picture if shown else None,
            first_bytes=row.first_bytes if shown else "",
        )
        for row in found.rows
    ]
    return answer(FailuresResponse(counts=found.counts, rows=rows))
