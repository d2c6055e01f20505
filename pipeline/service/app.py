"""The HTTP application: the API, the page, and what operators ask for."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pipeline.config import ServeConfig
from pipeline.errors import QueryError, SettingsError, UnknownKeyError
from pipeline.images.decode import ImageLimits
from pipeline.index.search.search_index import IndexInfo, Neighbour, SearchIndex
from pipeline.input.reader import read_record_bytes
from pipeline.service.access import ApiKeys, is_loopback, read_api_keys
from pipeline.service.guard import PROBES, Asgi, Guard, GuardLimits
from pipeline.service.lookups import LookupLimits, Lookups
from pipeline.service.metrics import Meter, Metrics
from pipeline.service.openapi import describe_app, describe_problems
from pipeline.service.pictures import PictureLoader
from pipeline.service.problems import TITLES, Problem, explain_query
from pipeline.service.review_routes import review_router
from pipeline.service.routes import answer, get_lookups, router
from pipeline.service.schema import Health
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.inference.embedder import Embedder


log = logging.getLogger(__name__)

DESCRIPTION = """Nearest neighbours of images.

Vectors are embeddings of one space (backbone, weights, preprocessing); scores are cosine
similarities. Errors are `application/problem+json`. An answer names the generation it comes
from; newer generations are picked up while the service runs."""

MODULES = ("colours.js", "facets.js", "filter.js", "map.js", "selection.js", "uploads.js")
ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    **{f"/{name}": (name, "text/javascript; charset=utf-8") for name in MODULES},
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}
OPEN_PATHS = frozenset({*ASSETS, *PROBES, "/openapi.json"})
"""What needs no key: it shows no data, or only that the process lives."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what.

    Attributes:
        keys: Accepted API keys; none lets everybody in.
        limits: What a request and a client may cost, and where it may come from.
    """

    keys: ApiKeys
    limits: GuardLimits


def create_app(lookups: Lookups, metrics: Metrics, access: Access) -> Asgi:
    """Return the whole service as one ASGI application."""
    app = FastAPI(
        title="Image lookups",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_make_lifespan(lookups),
    )
    app.state.lookups = lookups
    app.include_router(router)
    app.include_router(review_router)
    _add_operations(app, metrics)
    _add_assets(app)
    _add_error_handlers(app)
    document = describe_app(app, dim=lookups.index.info.dim, has_keys=bool(access.keys.digests))
    app.get("/openapi.json", include_in_schema=False)(lambda: document)
    guard = Guard(app, access.keys, access.limits, open_paths=OPEN_PATHS)
    metrics.watch(
        "pipeline_requests_under_way", "Requests being answered.", lambda: guard.under_way
    )
    guarded: Any = guard
    if origins := sorted(access.limits.origins):
        guarded = CORSMiddleware(
            guarded, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    return Meter(guarded, metrics)


def _make_lifespan(lookups: Lookups) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        lookups.start()
        yield
        await lookups.close()

    return live


def _add_operations(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/healthz", responses=describe_problems(guarded=False))
    async def show_health() -> Health:
        """Tell that the process lives."""
        return Health(status="ok")

    @app.get("/readyz", responses=describe_problems(503, guarded=False))
    async def show_readiness(request: Request) -> Response:
        """Tell that a generation is open and requests are welcome."""
        get_lookups(request)
        return answer(Health(status="ok"))

    @app.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **describe_problems(),
        },
    )
    async def show_metrics() -> Response:
        """Return counts and times in Prometheus' text format, those of all replicas."""
        return Response(
            await metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_assets(app: FastAPI) -> None:
    folder = Path(__file__).with_name("page")
    for path, (name, media_type) in ASSETS.items():
        show = partial(_show_asset, (folder / name).read_bytes(), media_type)
        app.add_route(path, show, include_in_schema=False)


async def _show_asset(body: bytes, media_type: str, _: Request) -> Response:
    return Response(body, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def answer_problem(_: Request, error: Problem) -> Response:
        return error.to_response()

    @app.exception_handler(UnknownKeyError)
    @app.exception_handler(QueryError)
    async def answer_query(_: Request, error: QueryError | UnknownKeyError) -> Response:
        return explain_query(error).to_response()

    @app.exception_handler(RequestValidationError)
    async def answer_validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Problem(422, "invalid_request", detail=first["msg"], where=where).to_response()

    @app.exception_handler(HTTPException)
    async def answer_http(_: Request, error: HTTPException) -> Response:
        title = TITLES.get(error.status_code, "Error")
        code = title.lower().replace(" ", "_")
        response = Problem(error.status_code, code, detail=title).to_response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def answer_fault(_: Request, error: Exception) -> Response:
        # Starlette raises it again after this answer, so that the server logs it in full.
        return Problem(500, "internal", detail="a fault of the service; see its log").to_response()


def build_app(config: ServeConfig, metrics: Metrics | None = None) -> Asgi:
    """Open the index, load the backbone, and return the application.

    Args:
        config: What to serve, and how.
        metrics: Where requests are counted; counts of this process alone otherwise.

    Raises:
        SettingsError: A setting is wrong, or does not fit the index.
        ObjectMissingError: There is no index.
        CorruptionError: The index is damaged, or the weights are not those of its space.
    """
    keys = read_api_keys(config.api_key_file)
    storage = Storage(config.storage)
    index = SearchIndex.open(
        config.index,
        storage,
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_size.nbytes,
    )
    metrics = metrics or Metrics()
    lookups = Lookups(
        index,
        embedder=open_embedder(config, index.info, storage) if config.image_queries else None,
        pictures=_open_pictures(config, storage, metrics) if config.show_images else None,
        limits=_make_lookup_limits(config),
        metrics=metrics,
    )
    return create_app(lookups, metrics, _make_access(config, keys))


def open_embedder(config: ServeConfig, info: IndexInfo, storage: Storage) -> "Embedder":
    """Load the backbone of the index's space.

    Raises:
        SettingsError: Nobody says where the weights are.
        CorruptionError: They are other weights than the space's.
    """
    weights = config.weights or info.weights
    if weights is None:
        raise SettingsError(
            f"the index {info.uri} does not say where the weights of {info.space.backbone} are; "
            "pass --weights, or --no-image-queries to serve without image queries"
        )
    import torch  # takes seconds, and a service without image queries needs none

    from pipeline.inference.embedder import Embedder, EmbedderOptions

    options = EmbedderOptions(
        device="cuda" if torch.cuda.is_available() else "cpu",
        limits=_make_image_limits(config),
        image_timeout_s=config.request_timeout_s,
        any_precision=True,
        top_k_classes=config.top_k_classes,
    )
    return Embedder.load(info.space, weights=weights, options=options, storage=storage)


def _open_pictures(config: ServeConfig, storage: Storage, metrics: Metrics) -> PictureLoader:
    def read_image(hit: Neighbour) -> bytes:
        return read_record_bytes(
            hit.shard,
            row=hit.row,
            offset=hit.offset,
            nbytes=hit.nbytes,
            sha256=None,  # the loader compares it, for an answer of its own
            storage=storage,
        )

    return PictureLoader(
        read_image,
        limits=_make_image_limits(config),
        cache_bytes=config.image_cache.nbytes,
        metrics=metrics,
    )


def _make_image_limits(config: ServeConfig) -> ImageLimits:
    return ImageLimits(
        max_pixels=config.max_pixels,
        max_image_bytes=config.max_body.nbytes,
    )


def _make_lookup_limits(config: ServeConfig) -> LookupLimits:
    return LookupLimits(
        max_waiting=config.max_waiting,
        search_workers=config.threads,
        refresh_s=config.refresh_s,
    )


def _make_access(config: ServeConfig, keys: ApiKeys) -> Access:
    hosts = frozenset(name.lower() for name in config.allowed_hosts)
    is_private = is_loopback(config.host) and not keys.digests
    limits = GuardLimits(
        max_body_bytes=config.max_body.nbytes,
        max_bodies_bytes=config.max_bodies.nbytes,
        max_concurrent=2 * config.max_waiting,
        timeout_s=config.request_timeout_s,
        requests_per_s=config.requests_per_s,
        hosts=hosts if hosts or is_private else None,
        origins=frozenset(config.cors_origins),
    )
    return Access(keys, limits)
