"""The settings of the jobs: one frozen dataclass each, the only definition there is.

Flags, the TOML file and the recorded effective settings all come from these classes; the
docstrings are the help texts. ``pipeline.cli`` turns them into command lines.
"""

from dataclasses import field
from typing import Annotated, Literal

from pipeline.errors import SettingsError
from pipeline.program import name_program
from pipeline.records import PART_COLUMNS
from pipeline.settings import (
    Bytes,
    Count,
    Failures,
    ImageSize,
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveBytes,
    PositiveShare,
    Share,
    Size,
    TopK,
    require,
    settings,
)

IndexKind = Literal["auto", "flat", "rabitq", "ivf-rabitq", "ivf-sq8", "hnsw"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Cosine = Annotated[float, require(lambda x: 0 < x <= 1, "use a cosine above 0, up to 1")]
Neighbours = Annotated[int, require(lambda k: 1 <= k <= 10_000, "ask for 1 to 10000 neighbours")]
Port = Annotated[int, require(lambda n: 0 <= n <= 65535, "use 1 to 65535, or 0 for any free one")]
ManyImages = Annotated[int, require(lambda n: n >= 8, "a rate needs at least 8")]


@settings
class StorageOptions:
    """How to reach object storage. Credentials come from the environment, never from here."""

    endpoint_url: str | None = None
    """S3 endpoint, for stores other than AWS; the environment's AWS_ENDPOINT_URL otherwise."""
    profile: str | None = None
    """Named profile of the shared AWS configuration."""
    anonymous: bool = False
    """Read public buckets without credentials."""
    requester_pays: bool = False
    """Accept that the requester pays for the transfer."""
    storage_attempts: Count = 6
    """How often a request is tried before it fails."""
    storage_timeout_s: Positive = 60.0
    """Longest wait for an answer or for the next bytes of a body."""


@settings
class EmbedConfig:
    """Embed image shards: one row per image, exactly once."""

    input: tuple[str, ...]
    """Prefixes, objects or folders to read: tar or Parquet shards, loose images, URI lists;
    wildcards (*.tar) and brace ranges ({000..127}.tar) too."""
    output: str
    """Where the embeddings go; an existing output is resumed and brought up to date."""
    model: str
    """Backbone, e.g. resnetv2_50.a1h_in1k, also without its tag or with timm/ before it."""
    weights: str = "pretrained"
    """pretrained (from the hub), a path or URI of a checkpoint, or random:<seed>."""
    image_size: ImageSize = "train"
    """train, test, or a number of pixels."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass; tf32 and fp16 need a GPU."""
    engine: Literal["torch", "torch-compile", "openvino"] = "torch"
    """What computes the forward pass; compiling takes a minute, openvino needs its extra."""
    decode: Literal["exact", "fast", "gpu"] = "exact"
    """exact equals the reference bit for bit; fast lets the JPEG decoder scale down; gpu decodes
    JPEGs and resizes on the GPU, and needs the gpu-decode extra."""
    decode_stage: bool = False
    """Decode in a stage of its own on the CPUs of all nodes; 8-bit crops travel to the GPUs."""
    exif: Literal["apply", "ignore"] = "apply"
    """Turn pictures as their EXIF orientation says; ignore is what the reference does."""
    input_kind: Literal["auto", "tar", "parquet", "images", "list"] = "auto"
    """Kind of the inputs; auto decides by file name."""
    image_column: str | None = None
    """Parquet column with the encoded images; found by its type where there is only one."""
    key_column: str | None = None
    """Parquet column with the keys; the row number otherwise."""
    carry: tuple[str, ...] = ()
    """Columns to carry along: sidecar extensions (json, txt, cls) or Parquet columns."""
    embedding_dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored vectors."""
    top_k_classes: TopK = 0
    """Also store the k most probable classes of each image."""
    chunk_images: Count = 256
    """Most images in a chunk, and so rows in a part."""
    chunk_bytes: PositiveBytes = Size("64MiB")
    """Most encoded bytes in a chunk."""
    batch_size: Count | None = None
    """Images in one forward pass; chosen for the device otherwise."""
    actors: Count | None = None
    """Number of embedder actors; one per GPU, or one per CPU core, otherwise."""
    cpus_per_actor: Positive | None = None
    """CPU cores of an actor: decode processes, and torch threads without a GPU."""
    gpus_per_actor: NotNegative | None = None
    """GPUs of an actor; fractions share a GPU. Without one set, 1 where the cluster has GPUs."""
    max_pixels: Count = 200_000_000
    """Larger images are not decoded; their row says too_large."""
    max_image_bytes: PositiveBytes = Size("256MiB")
    """Longer encoded images are not decoded; their row says too_large."""
    image_timeout_s: Positive = 30.0
    """Longest CPU time, or time in waiting, to decode one image; then its row says unreadable."""
    max_failures: Failures | None = None
    """Stop the run when more images fail: a count (100) or a share (1%)."""
    max_removed: Share = 0.1
    """Largest share of the inputs' committed rows that may leave because their source is no longer
    listed; beyond that they stay, and the run fails when all else is done."""
    retry_failed: bool = False
    """Embed again the shards that have failed rows."""
    retry_failed_once: bool = False
    """The same, but leave alone those that were tried again before."""
    verify: bool = False
    """Check every commit against its parts, and do nothing else."""
    prune: bool = False
    """Delete files of shards that were removed or superseded."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    ray_address: str | None = None
    """Ray cluster to join; the surrounding job's, or one started here, otherwise."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """Least important log lines to show; debug tells of every commit."""
    storage: StorageOptions = field(default_factory=StorageOptions)
    """How to reach object storage."""

    def __post_init__(self) -> None:
        if not self.input:
            raise SettingsError("no input given; pass --input with one or more URIs or folders")
        if taken := PART_COLUMNS.intersection(self.carry):
            raise SettingsError(
                f"carry names {', '.join(sorted(taken))}, which every output has a column of its "
                "own for; rename that column at the source, or leave it out"
            )
        if repeated := {name for name in self.carry if self.carry.count(name) > 1}:
            raise SettingsError(
                f"carry names {', '.join(sorted(repeated))} more than once; name it once"
            )


@settings
class ServeConfig:
    """Answer lookups over HTTP, with a page to look at."""

    index: str
    """The index to serve; newer generations are picked up while it runs."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which needs --api-key-file or --allow-public."""
    port: Port = 8000
    """Port to listen on."""
    local: bool = False
    """Run one plain server in this process, without Ray."""
    open: bool = False
    """Show the page in a browser once it can be reached."""
    replicas: Count = 1
    """Replicas on Ray Serve; those on one machine share the mapped index files."""
    cpus_per_replica: NotNegative = 1.0
    """CPU cores of a replica."""
    gpus_per_replica: NotNegative = 0.0
    """GPUs of a replica, for image queries; fractions share a GPU."""
    api_key_file: str | None = None
    """File of accepted API keys, one a line."""
    allow_public: bool = False
    """Let everybody in without a key, on any address."""
    allowed_hosts: tuple[str, ...] = ()
    """Names the service may be called by, beside localhost and addresses; on a loopback address
    no others, elsewhere any, unless they are given here."""
    cors_origins: tuple[str, ...] = ()
    """Origins of other sites whose pages may call the API; none otherwise."""
    image_queries: bool = True
    """Load the backbone, so that images can be searched for."""
    weights: str | None = None
    """Checkpoint of the backbone; the one the index was made with otherwise."""
    top_k_classes: TopK = 0
    """Also name the k most probable classes of a query image."""
    show_images: bool = True
    """Show the indexed images, read from their shards."""
    max_body: Bytes = Size("16MiB")
    """Longest request body."""
    max_bodies: Bytes = Size("256MiB")
    """All request bodies at the same time; half of it for one client. Decoded, they take more."""
    max_pixels: Count = 50_000_000
    """Larger query images are refused."""
    requests_per_s: NotNegative = 200.0
    """Sustained requests a second of one client, twice that in a burst; 0 is no limit."""
    request_timeout_s: Positive = 30.0
    """Longest time for one answer."""
    headers_timeout_s: Positive = 10.0
    """Longest wait for the headers of a request; with --local only."""
    connections_per_client: NotNegativeInt = 128
    """Connections that one address may hold; 0 is no limit, for a proxy in front; with --local
    only."""
    max_waiting: Count = 256
    """Searches that may wait; more are answered 503 with Retry-After."""
    threads: Count = 2
    """Threads that search; one core each."""
    refresh_s: NotNegative = 30.0
    """Time between two looks for a newer generation; 0 never looks."""
    image_cache: Bytes = Size("256MiB")
    """Memory for thumbnails and pictures."""
    cache_dir: str | None = None
    """Where files of a remote index are kept; the user's cache folder otherwise."""
    cache_size: Bytes = Size("100GB")
    """Disk space for all files kept there; those unused longest go first, never one in use."""
    shutdown_s: Positive = 30.0
    """Longest time to finish what has begun, when stopped."""
    ray_address: str | None = None
    """Ray cluster to join; the surrounding job's, or one started here, otherwise."""
    storage: StorageOptions = field(default_factory=StorageOptions)
    """How to reach object storage."""


@settings
class IndexConfig:
    """Index committed embeddings: a new generation, tuned, measured, published."""

    index: str
    """Where the index goes; an existing one is brought up to date."""
    embeddings: str | None = None
    """Output of the embed job; not needed to roll back, collect garbage, or export."""
    kind: IndexKind = "auto"
    """Kind of index; auto chooses by rows, width, memory and recall, and says why."""
    target_recall: PositiveShare = 0.95
    """Share of the true ten nearest neighbours that a search has to find."""
    memory_budget: Bytes = Size("8GB")
    """Memory that one process may hold, to build a segment and to search."""
    full: bool = False
    """Build everything anew instead of adding to the generation that serves."""
    force: bool = False
    """Publish even if a gate refuses."""
    max_row_drop: Share = 0.1
    """Largest share of rows that may disappear from one generation to the next."""
    queries: Count = 1000
    """Rows held out to measure recall with."""
    seed: int = 0
    """Makes the sample and the training repeatable."""
    knn: Count | None = None
    """Also write the k nearest neighbours of every image, as Parquet."""
    near_duplicates: Cosine | None = None
    """Also write groups of images whose cosine is at least this, as Parquet, e.g. 0.97."""
    verify: bool = False
    """Also read every file of the index and compare digests, and mend what is damaged; without
    embeddings, only say so."""
    roll_back: str | None = None
    """Serve an older generation again, and do nothing else: its name, or previous; it stays pinned
    until a build is told --unpin, --force or --full."""
    unpin: bool = False
    """Go on from the generation that a roll-back has pinned; without it, builds leave it alone."""
    collect_garbage: Literal["no", "list", "delete"] = "no"
    """List or delete what no kept generation needs, and do nothing else."""
    keep_generations: Count = 3
    """Newest generations that garbage collection keeps."""
    min_age_hours: NotNegative = 48.0
    """Age below which garbage collection deletes nothing."""
    workers: Literal["auto", "local", "ray"] = "auto"
    """Where to build; auto takes this process for small indexes, a Ray cluster for large ones."""
    cache_dir: str | None = None
    """Where files of a remote index are kept; the user's cache folder otherwise."""
    cache_size: Bytes = Size("100GB")
    """Disk space for all files kept there; those unused longest go first, never one in use."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    ray_address: str | None = None
    """Ray cluster to join; the surrounding job's, or one started here, otherwise."""
    storage: StorageOptions = field(default_factory=StorageOptions)
    """How to reach object storage."""


@settings
class SearchConfig:
    """Find the nearest neighbours of a picture, of a key, or of vectors."""

    index: str = ""
    """The index: a path or URI."""
    url: str = ""
    """A running lookup service to ask instead, e.g. http://127.0.0.1:8000."""
    api_key_file: str | None = None
    """File whose first line is the service's API key."""
    image: str | None = None
    """Picture to search with: a path or URI; embedded exactly as the index's images were."""
    key: str | None = None
    """Key of an image of the index to search with; itself left out."""
    vector: str | None = None
    """A .npy file with one vector, or several as rows, to search with."""
    k: Neighbours = 10
    """Number of neighbours."""
    where: str | None = None
    """Only images that fulfil a condition on carried columns, e.g. "cls = dress"."""
    exact: bool = False
    """Compare with every vector instead of looking them up."""
    json: bool = False
    """Print nothing but the JSON line."""
    html: str | None = None
    """Also write a page with the pictures to this file."""
    open: bool = False
    """Show that page in a browser; in a temporary file where --html names none."""
    generation: str | None = None
    """Search this generation instead of the newest."""
    cache_dir: str | None = None
    """Where files of a remote index are kept; the user's cache folder otherwise."""
    cache_size: Bytes = Size("100GB")
    """Disk space for all files kept there; those unused longest go first, never one in use."""
    storage: StorageOptions = field(default_factory=StorageOptions)
    """How to reach object storage."""

    def __post_init__(self) -> None:
        if bool(self.index) == bool(self.url):
            raise SettingsError("pass either --index, or --url of a running lookup service")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise SettingsError(f"url is {self.url!r}; it must start with http:// or https://")
        for name in ("html", "open", "generation") if self.url else ():
            if getattr(self, name) not in (None, False):
                raise SettingsError(f"--{name} needs --index; a service shows its own pages")
        given = [name for name in ("image", "key", "vector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingsError(
                f"{' and '.join(given) or 'nothing'} given to search with; "
                "pass exactly one of --image, --key and --vector"
            )


@settings
class NightlyOptions:
    """Settings of the nightly job beside those of embedding and indexing."""

    metrics_file: str | None = None
    """Also write freshness and row counts here, for Prometheus' textfile collector."""
    max_age_hours: Positive | None = None
    """Fail when the newest image indexed is older than this."""


@settings
class NightlyConfig:
    """Embed, index and report: safe to schedule, never two at once."""

    embed: EmbedConfig
    """Table [embed]: the settings of jobs/embed.py."""
    index: IndexConfig
    """Table [index]: the settings of jobs/index.py; embeddings is the embed job's output."""
    nightly: NightlyOptions
    """Table [nightly]."""

    def __post_init__(self) -> None:
        for name, job in (
            *(("dry_run", "embed"), ("verify", "embed"), ("dry_run", "index")),
            *(("roll_back", "index"), ("collect_garbage", "index")),
        ):
            if getattr(getattr(self, job), name) not in (False, None, "no"):
                raise SettingsError(
                    f"{name} does one thing instead of a night's work; give it to "
                    f"{name_program(job)}"
                )


Measure = Literal[
    "forward",
    "host",
    "job",
    "dataloader",
    "ray-recipe",
    "decode",
    "overlap",
    "scaling",
    "memory",
    "index",
    "simulation",
    "gpu",
]


@settings
class BenchmarkConfig:
    """Measure ceilings, the real job and its alternatives side by side, and say what binds."""

    model: tuple[str, ...] = ("fbnetv3_b.ra2_in1k",)
    """Backbones to measure, or all."""
    measure: tuple[Measure, ...] = ("forward", "host", "job", "dataloader", "ray-recipe")
    """forward: the forward pass alone; host: all but that; job: the embed job; dataloader and
    ray-recipe: what else one would write (these, and timm's forward pass, need timm); decode: the
    job with faster decoding and with a decode stage; overlap: an actor beside a device that needs
    no CPU; scaling: the job with other numbers of actors and images; memory: the job over inputs
    hard on memory; index: indexes of synthetic vectors; simulation: the driver on a large
    cluster; gpu: bits, deviations and rates on one GPU, without Ray and FAISS."""
    input: tuple[str, ...] = ()
    """Prefixes, objects or folders to take images from; drawn photographs otherwise."""
    images: ManyImages = 512
    """Images of a long run; repeated when the inputs hold fewer."""
    rounds: Count = 3
    """How often everything is measured, in turns; medians are reported."""
    engine: tuple[Literal["torch", "torch-compile", "openvino"], ...] = ("torch",)
    """Engines of the forward pass; the job runs with the first."""
    weights: str = "random:0"
    """pretrained, a path or URI of a checkpoint, or random:<seed>; no figure depends on it."""
    image_size: ImageSize = "train"
    """train, test, or a number of pixels."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass."""
    decode: Literal["exact", "fast"] = "exact"
    """How images are decoded."""
    batch_size: Count | None = None
    """Images in one forward pass; chosen for the device otherwise."""
    actors: Count | None = None
    """Embedder actors of the job; one per GPU, or one per CPU core, otherwise."""
    memory_scale: PositiveShare = 1.0
    """Size of the inputs that are hard on memory; at 1 they hold up to 50,000 images."""
    index_rows: tuple[Count, ...] = (10_000, 100_000)
    """Numbers of vectors to index."""
    index_dim: Count = 1024
    """Width of the vectors to index."""
    index_kind: tuple[IndexKind, ...] = ("flat", "auto")
    """Kinds of index to build."""
    simulated_shards: Count = 10_000
    """Shards of the simulation."""
    simulated_actors: Count = 64
    """GPUs of the simulation, eight to a node; each is two processes on this machine."""
    simulated_chunk_s: Positive = 0.5
    """Time a simulated GPU takes for a chunk of 256 images; with too short a time, a simulation
    measures this machine's cores."""
    output: str | None = None
    """Also write the report to this file, as JSON."""
    work_dir: str | None = None
    """Folder for samples and outputs, removed afterwards; the system's temporary one otherwise."""
