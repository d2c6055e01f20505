"""The bodies of requests and answers; the OpenAPI document is made from them."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    Json,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from pipeline.service.problems import Problem

MAX_K = 1000
MAX_OFFSET = 1000
MAX_SEARCHES = 64
MAX_IMAGES = 32
MAX_DIM = 16_384
MAX_EXAMPLES = 32
MAX_ITEMS = 1000

MAX_FILTER_VALUES = 10_000
"""Values, keys included, in all filters of one request."""

MAX_FILTER_CHARS = 200_000
"""Characters of all texts in all filters of one request."""


def check_filters(
    filters: Iterable[Mapping[str, Any] | str | None],
    *,
    max_values: int = MAX_FILTER_VALUES,
    max_chars: int = MAX_FILTER_CHARS,
) -> None:
    """Refuse filters that would take long to read; looks at no more of them than is allowed.

    Raises:
        ValueError: The filters of one request hold too many values, or too much text.
    """
    values, chars = 0, 0
    waiting: list[Any] = [where for where in filters if where is not None]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        else:
            values += 1
            chars += len(value) if isinstance(value, str) else 0
        if values > max_values or chars > max_chars:
            raise ValueError(
                f"all filters of a request together may hold {max_values:,} values, keys "
                f"included, and {max_chars:,} characters; these hold more"
            )


FilterText = Annotated[
    str,
    Field(
        max_length=2000,
        description="Conditions on metadata as text: `cls = dress and width >= 400`.",
    ),
]

Filter = Annotated[
    dict[str, Any] | Annotated[str, Field(max_length=2000)],
    Field(
        description='Conditions on metadata: `{"cls": "dress", "width": {"$gte": 400}}` with '
        "`$eq $ne $lt $lte $gt $gte $in $nin $contains $prefix $exists $and $or $not`, or the "
        "same as text: `cls = dress and width >= 400`. As in SQL, a missing value fulfils no "
        "comparison and no negation of one. All filters of a request may hold "
        f"{MAX_FILTER_VALUES:,} values and {MAX_FILTER_CHARS:,} characters.",
        examples=["width >= 400", {"width": {"$gte": 400}}],
    ),
]
Key = Annotated[str, Field(min_length=1, max_length=4096, description="Key of an indexed image.")]
Base64 = Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]
Part = Literal["metadata", "vector", "classes"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Query(_Strict):
    """The query of a search: exactly one, and `unlike` beside `like`."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"minProperties": 1, "maxProperties": 2},
    )

    key: Key = Field(default="", description="An indexed image; it is left out of its own results.")
    vector: list[float] = Field(
        default=[], min_length=1, max_length=MAX_DIM, description="An embedding of this space."
    )
    vector_base64: Base64 = Field(
        default="", description="The same as little-endian float32 in base64: a fourth of the size."
    )
    image_base64: Base64 = Field(default="", description="An encoded image (JPEG, PNG, WebP, …).")

    like: list[Key] = Field(
        default=[],
        min_length=1,
        max_length=MAX_EXAMPLES,
        description="Indexed images: what is similar to them all is near their mean.",
    )
    unlike: list[Key] = Field(
        default=[],
        max_length=MAX_EXAMPLES,
        description="Indexed images to turn away from: half their mean is taken off.",
    )

    @model_validator(mode="after")
    def _check_one(self) -> "Query":
        if len(self.model_fields_set - {"unlike"}) != 1:
            raise ValueError(
                "give exactly one of key, vector, vector_base64, image_base64 and like"
            )
        if self.unlike and not self.like:
            raise ValueError("unlike goes with like: a direction to turn away from needs a start")
        return self


class SearchOptions(_Strict):
    """How to search."""

    k: int = Field(default=10, ge=1, le=MAX_K, strict=True, description="Neighbours to return.")
    offset: int = Field(
        default=0, ge=0, le=MAX_OFFSET, strict=True, description="Best neighbours to leave out."
    )
    filter: Filter | None = None
    score_threshold: float | None = Field(
        default=None, ge=-1, le=1, description="Leave out neighbours less similar than this."
    )
    include: list[Part] = Field(
        default=["metadata"],
        max_length=3,
        description="`metadata` and `vector` of each neighbour, and the `classes` of the query "
        "image.",
    )
    space: str | None = Field(
        default=None,
        max_length=64,
        description="Id of the space the query vector belongs to; refused if it is another one.",
    )
    exact: bool = Field(
        default=False, strict=True, description="Compare with every vector; slow, and certain."
    )

    @field_validator("filter")
    @classmethod
    def _check_filter(cls, where: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        check_filters([where])
        return where


class SearchRequest(SearchOptions):
    """One search."""

    query: Query


class BatchRequest(_Strict):
    """Several searches, answered from one generation."""

    searches: Annotated[list[SearchRequest], FailFast()] = Field(
        min_length=1, max_length=MAX_SEARCHES
    )

    @field_validator("searches")
    @classmethod
    def _check_filters(cls, searches: list[SearchRequest]) -> list[SearchRequest]:
        check_filters(search.filter for search in searches)
        return searches


class EmbedRequest(_Strict):
    """Images to embed as the indexed ones were."""

    images_base64: list[Base64] = Field(min_length=1, max_length=MAX_IMAGES)


def take_only(parts: object) -> object:
    """Return the only part of a form that may come once, out of the list of all parts of a name."""
    if isinstance(parts, list) and len(parts) != 1:
        raise ValueError("send it once")
    return parts[0] if isinstance(parts, list) else parts


Upload = Annotated[
    bytes,
    Field(strict=True),
    WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"}),
]


class SearchForm(_Strict):
    """An encoded image as a file, and the other fields of a search as JSON."""

    image: Annotated[Upload, BeforeValidator(take_only)]
    options: Annotated[Json[SearchOptions], BeforeValidator(take_only)] = SearchOptions()


class EmbedForm(_Strict):
    """Encoded images as files, all under one name."""

    images: list[Upload] = Field(min_length=1, max_length=MAX_IMAGES)


class ClassScore(BaseModel):
    """One class of the backbone's own classifier."""

    index: int = Field(description="Index of the class, from 0.")
    probability: float


class Result(BaseModel):
    """A neighbour."""

    key: str
    score: float = Field(description="Cosine similarity, 1 is equal.")
    metadata: dict[str, Any] | None = None
    vector_base64: str | None = Field(default=None, description="Little-endian float32, length 1.")

    @property
    def vector(self) -> np.ndarray | None:
        """The stored unit vector, float32, if it was asked for."""
        if self.vector_base64 is None:
            return None
        return decode_vector(self.vector_base64, where="vector_base64")


class Took(BaseModel):
    """Where the time went, milliseconds."""

    embed_ms: float = Field(description="From the image to its vector, waiting included.")
    search_ms: float = Field(description="From the vector to the neighbours, waiting included.")


class SearchResponse(BaseModel):
    """Neighbours, best first."""

    generation: str = Field(description="The generation that was searched.")
    results: list[Result]
    classes: list[ClassScore] | None = Field(
        default=None, description="Most probable classes of the query image, best first."
    )
    took: Took


class BatchResponse(BaseModel):
    """The answers, in the order of the searches."""

    responses: list[SearchResponse]


class EmbedResponse(BaseModel):
    """Embeddings in the order of the images."""

    space: str = Field(description="Id of the space; vectors of two spaces never meet.")
    dim: int
    vectors_base64: list[str] = Field(description="Little-endian float32, as they are stored.")
    classes: list[list[ClassScore]] | None = None


class Item(BaseModel):
    """An indexed image."""

    key: str
    generation: str
    metadata: dict[str, Any]
    vector_base64: str | None = None
    neighbours: list[Result] | None = None

    @property
    def vector(self) -> np.ndarray | None:
        """The stored unit vector, float32, if it was asked for."""
        if self.vector_base64 is None:
            return None
        return decode_vector(self.vector_base64, where="vector_base64")


class SampleResponse(BaseModel):
    """Some indexed images, drawn at random; fewer than asked for where no more exist."""

    generation: str
    items: list[Result]


class ItemsRequest(_Strict):
    """Images whose columns are wanted."""

    keys: list[Key] = Field(min_length=1, max_length=MAX_ITEMS)


class ItemsResponse(BaseModel):
    """Columns of images, in the order asked for; keys that the index lacks are left out."""

    generation: str
    items: list[Result]


class FacetValue(BaseModel):
    """A value and how many rows have it."""

    value: Any
    count: int


class FacetColumn(BaseModel):
    """What a column holds."""

    name: str
    present: int = Field(description="Counted rows that have a value.")
    distinct: int = Field(description="Different values.")
    values: list[FacetValue] = Field(
        description="The most frequent; none where nearly every row has a value of its own."
    )
    low: Any = Field(default=None, description="Smallest number or time.")
    high: Any = Field(default=None, description="Largest number or time.")
    bins: list[int] = Field(description="Rows in equal steps from `low` to `high`.")


class FacetsResponse(BaseModel):
    """What the columns hold, counted over the live rows."""

    generation: str
    counted: int = Field(description="Rows that were counted; a part of a very large collection.")
    columns: list[FacetColumn]


class Group(BaseModel):
    """Images that are nearly the same."""

    images: list[Result] = Field(description="`score` is the cosine to the nearest of the others.")


class GroupsResponse(BaseModel):
    """Groups of near duplicates, the largest first."""

    generation: str
    method: Literal["cosine", "bytes"] = Field(
        description="By `--near-duplicates` of the index job, or else equal files."
    )
    threshold: float | None = Field(default=None, description="Cosine from which images count.")
    total: int
    groups: list[Group]


class FailedRow(BaseModel):
    """An image that has no embedding."""

    key: str
    status: str
    error: str
    picture: str | None = Field(default=None, description="The file as a data URI, if small.")
    first_bytes: str = Field(description="The first bytes in hexadecimal, where known.")


class FailuresResponse(BaseModel):
    """Rows of the embeddings that failed."""

    counts: dict[str, int] = Field(description="Rows by status, `ok` left out.")
    rows: list[FailedRow] = Field(description="Some of them.")


class Column(BaseModel):
    """A metadata column."""

    name: str
    type: str = Field(description="Arrow type, e.g. `string` or `int32`.")
    filterable: bool


class Info(BaseModel):
    """The index that is being served."""

    generation: str
    rows: int
    dim: int
    kind: str = Field(description="Kind of index, e.g. `flat`.")
    space: dict[str, Any] = Field(description="What decided the numbers of the vectors.")
    space_id: str
    recall: float | None = Field(description="Measured recall@10 on held-out queries.")
    created_s: float = Field(description="When the generation was built, seconds since 1970.")
    newest_image_s: float | None = Field(description="Time of the newest indexed image, if known.")
    columns: list[Column]
    image_queries: bool = Field(description="Whether images can be embedded here.")
    classes: bool = Field(description="Whether the backbone's classifier is loaded.")
    images: bool = Field(description="Whether the indexed images themselves are shown.")
    map_points: int = Field(description="Points of the map; 0 where there is none.")


class MapResponse(BaseModel):
    """A sample of the collection laid out in two dimensions; the columns belong together."""

    generation: str
    method: str = Field(description="`pca` or `umap`.")
    keys: list[str]
    values: list[Any] | None = Field(
        default=None, description="Of the column that `column` names, one a point."
    )
    x: list[float] = Field(description="Between 0 and 1.")
    y: list[float] = Field(description="Between 0 and 1.")


class Health(BaseModel):
    """How the process is."""

    status: Literal["ok"]


class ProblemBody(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str = Field(description="Stable word for programs.")
    detail: str = Field(description="A sentence for people.")
    where: str | None = Field(default=None, description="Path into the request body.")


def decode_base64(text: str, *, where: str) -> bytes:
    """Return the bytes of standard base64.

    Raises:
        Problem: 422, the text is something else.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(
            422, "invalid_base64", detail="the text is not standard base64", where=where
        ) from error


def encode_image(data: bytes) -> str:
    """Return base64, the form in which a JSON body carries an image."""
    return base64.b64encode(data).decode()


def encode_vector(vector: np.ndarray) -> str:
    """Return little-endian float32 in base64."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()


def decode_vector(text: str, *, where: str) -> np.ndarray:
    """Return the float32 vector of little-endian float32 in base64, shape (n,).

    Raises:
        Problem: 422, not base64, or no whole number of values.
    """
    data = decode_base64(text, where=where)
    if len(data) % 4:
        raise Problem(
            422,
            "invalid_vector",
            detail=f"{len(data)} bytes are no whole number of float32 values",
            where=where,
        )
    return np.frombuffer(data, dtype="<f4").astype(np.float32)
