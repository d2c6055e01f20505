"""The forward pass: 8-bit crops in, float32 embeddings and logits out, on one device.

An engine is a backbone in the form that computes: plain PyTorch, compiled PyTorch, or OpenVINO.
All give the same embedding but for rounding, and ``check_engine`` measures how much before a run.
Engines of fixed shape fill a short batch up with zeros, whose results are cut off again.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.backbones import optimize_for_inference
from pipeline.errors import SettingsError
from pipeline.images.resize import DataConfig

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # whose products a GPU computes from 10 of its 23 fractional bits
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_GPU_PRECISIONS = ("tf32", "fp16")
_CAPTURE_AFTER = 3  # passes in which PyTorch chooses kernels, compiles, and fills its caches

EngineName = Literal["torch", "torch-compile", "openvino"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Device, precision, batch size and threads of an engine.

    Attributes:
        name: Which engine.
        device: Torch device; engines other than ``"torch"`` and ``"torch-compile"`` need the CPU.
        precision: Arithmetic of the forward pass, a key of ``DTYPES``.
        batch_size: Most images in one forward pass.
        threads: Threads of a forward pass on the CPU; None leaves torch's setting alone.
        logits: Whether the classifier's logits are wanted as well.
    """

    name: EngineName = "torch"
    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int = 16
    threads: int | None = None
    logits: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the CPU."""
        return self.device == "cpu"


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The outcome of one forward pass.

    Attributes:
        vectors: Pooled embeddings, float32 (B, D).
        logits: float32 (B, classes); None unless asked for.
        seconds: How long the device was busy with it: CPU time where one thread computes, the
            GPU's own clock there, else the clock on the wall.
        transfer_s: Time of the copies to the GPU and back, by its own clock; 0 on the CPU.
    """

    vectors: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None
    seconds: float = 0.0
    transfer_s: float = 0.0

    @classmethod
    def join(cls, parts: Sequence["Forwarded"]) -> "Forwarded":
        """Return the outcome of passes over consecutive pieces of one batch."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            np.concatenate([part.vectors for part in parts]),
            np.concatenate(logits) if logits else None,
            sum(part.seconds for part in parts),
            sum(part.transfer_s for part in parts),
        )


class Engine(Protocol):
    """A backbone ready to compute.

    Attributes:
        batch_size: Most images in one pass.
        depth: How many batches are worth having under way while another one is filled.
    """

    batch_size: int
    depth: int

    def allocate(self) -> Pixels:
        """Return a buffer for one batch, uint8 (batch_size, S, S, 3), from which it is fast."""
        ...

    def submit(self, pixels: Pixels | Tensor) -> Callable[[], Forwarded]:
        """Start on crops, uint8 RGB (B, S, S, 3), B up to ``batch_size``.

        Args:
            pixels: An array; for a GPU also a tensor that lies there already.

        Returns:
            A call that waits for the outcome. ``pixels`` must not change before it returns.

        Raises:
            torch.OutOfMemoryError: The batch is too large for the device.
        """
        ...

    def shrink(self, batch_size: int) -> None:
        """Go on with smaller batches."""
        ...


class Network(nn.Module):
    """Normalisation, backbone and heads as one module, which is what gets compiled."""

    mean: Tensor
    std: Tensor
    full_scale: Tensor

    def __init__(
        self, backbone: nn.Module, data_config: DataConfig, *, precision: str, logits: bool
    ) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.backbone = backbone.to(self.dtype)
        self.logits = logits
        for name in ("mean", "std"):
            values = torch.tensor(getattr(data_config, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values)
        self.register_buffer("full_scale", torch.tensor(255.0))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 RGB (B, S, S, 3) to float32 embeddings, and logits where wanted.

        The arithmetic of the scaling is that of ``transforms.normalise``; its constants live on
        the device, so that no pass waits for them.
        """
        x = pixels.permute(0, 3, 1, 2).to(torch.float32)  # channels-last memory already
        x = ((x / self.full_scale - self.mean) / self.std).to(self.dtype)
        features = self.backbone.forward_features(x)  # type: ignore[operator]
        head: Callable[..., Tensor] = self.backbone.forward_head  # type: ignore[assignment]
        vectors = head(features, pre_logits=True).float()
        return (vectors, head(features).float()) if self.logits else (vectors,)


def build_engine(backbone: nn.Module, data_config: DataConfig, options: EngineOptions) -> Engine:
    """Turn a backbone into an engine; compiling, where it does, takes seconds to minutes.

    Raises:
        SettingsError: The engine is not installed, or cannot do the device or the precision.
        torch.OutOfMemoryError: One image does not fit the device.
    """
    check_engine_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    network = Network(
        optimize_for_inference(backbone),
        data_config,
        precision=options.precision,
        logits=options.logits,
    ).eval()
    size = data_config.image_size
    if options.name == "openvino":
        return OpenVinoEngine(network, size, options)
    if options.on_cpu:
        return CpuEngine(network, size, options)
    engine = GpuEngine(network, size, options)
    warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """Run a full batch, so that nothing is compiled later; halve it until it fits the device.

    Raises:
        torch.OutOfMemoryError: One image does not fit the device.
    """
    while True:
        try:
            engine.submit(engine.allocate())()
            return
        except torch.OutOfMemoryError:
            if engine.batch_size == 1:
                raise
            engine.shrink((engine.batch_size + 1) // 2)


def check_engine_options(options: EngineOptions) -> None:
    """Refuse what cannot be built, without building anything.

    Raises:
        SettingsError: The engine cannot do the device or the precision.
    """
    if options.precision in _GPU_PRECISIONS and options.on_cpu:
        raise SettingsError(
            f"precision {options.precision} needs a GPU; use bf16 or fp32 on the CPU"
        )
    if options.name == "openvino" and not options.on_cpu:
        raise SettingsError("engine openvino runs on the CPU only; use torch-compile on a GPU")
    if options.name == "openvino" and options.precision != "fp32":
        raise SettingsError(
            f"engine openvino computes in fp32, not {options.precision}; use engine torch-compile"
        )


class CpuEngine:
    """PyTorch on the CPU, as it is, or compiled for one shape with its weights frozen in."""

    depth = 0

    def __init__(self, network: Network, image_size: int, options: EngineOptions) -> None:
        self.batch_size = options.batch_size
        self._image_size = image_size
        self._compiled_size = options.batch_size if options.name == "torch-compile" else 0
        self._call: Callable[[Tensor], tuple[Tensor, ...]] = network
        if self._compiled_size:
            self._call = _compile_for_cpu(network, self.allocate())

    def allocate(self) -> Pixels:
        """Return a zeroed buffer for one batch."""
        return np.zeros((self.batch_size, self._image_size, self._image_size, 3), np.uint8)

    def submit(self, pixels: Pixels | Tensor) -> Callable[[], Forwarded]:
        """Compute at once; the call that is returned hands out the outcome."""
        pixels = np.asarray(pixels)
        clock_s = _pick_clock(torch.get_num_threads())
        start_s = clock_s()
        with torch.no_grad():
            outputs = self._call(torch.from_numpy(fill_up(pixels, self._compiled_size)))
        arrays = [output.numpy()[: len(pixels)] for output in outputs]
        forwarded = Forwarded(*_to_pair(arrays), seconds=clock_s() - start_s)
        return lambda: forwarded

    def shrink(self, batch_size: int) -> None:
        """Go on with smaller batches; a compiled shape stays, and is filled up."""
        self.batch_size = batch_size


def _pick_clock(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


def _compile_for_cpu(network: Network, example: Pixels) -> Callable[[Tensor], tuple[Tensor, ...]]:
    import torch._inductor.config as inductor  # its own import starts a compiler's machinery

    settings: Any = inductor.patch(freezing=True, compile_threads=1)
    with settings, torch.no_grad():
        compiled: Callable[[Tensor], tuple[Tensor, ...]] = torch.compile(network, dynamic=False)
        compiled(torch.from_numpy(example))
    return compiled


class OpenVinoEngine:
    """OpenVINO on the CPU, float32, for one shape."""

    depth = 0

    def __init__(self, network: Network, image_size: int, options: EngineOptions) -> None:
        openvino = _import_openvino()
        self.batch_size = self._compiled_size = options.batch_size
        self._image_size = image_size
        self._threads = options.threads or torch.get_num_threads()
        example = torch.from_numpy(self.allocate())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of how OpenVINO traces
            model = openvino.convert_model(
                network, example_input=example, input=[list(example.shape)]
            )
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self._threads,
            "ENABLE_CPU_PINNING": False,  # several actors would pin themselves to the same core
        }
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def allocate(self) -> Pixels:
        """Return a zeroed buffer for one batch."""
        return np.zeros((self.batch_size, self._image_size, self._image_size, 3), np.uint8)

    def submit(self, pixels: Pixels | Tensor) -> Callable[[], Forwarded]:
        """Compute at once; the call that is returned hands out the outcome."""
        pixels = np.asarray(pixels)
        clock_s = _pick_clock(self._threads)
        start_s = clock_s()
        found = self._request.infer([fill_up(pixels, self._compiled_size)], share_inputs=True)
        arrays = [found[i][: len(pixels)].copy() for i in range(len(found))]
        forwarded = Forwarded(*_to_pair(arrays), seconds=clock_s() - start_s)
        return lambda: forwarded

    def shrink(self, batch_size: int) -> None:
        """Go on with smaller batches; the compiled shape stays, and is filled up."""
        self.batch_size = batch_size


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise SettingsError(
            "engine openvino is not installed; run: pip install 'image-embedding-pipeline"
            "[openvino]', on every node, or use --engine torch"
        ) from error
    return openvino


class GpuEngine:
    """PyTorch on a GPU. Copies overlap with computing; nothing waits until the outcome is asked.

    The pass over a full batch is recorded once as a CUDA graph, which one call of the CPU starts:
    without that the CPU is busy with a pass for nearly as long as the GPU. Short batches run as
    full ones, whose other results are cut off. In fp32 the shorter TF32 stays off.
    """

    depth = 1

    def __init__(self, network: Network, image_size: int, options: EngineOptions) -> None:
        self.batch_size = options.batch_size
        self._image_size = image_size
        self._device = torch.device(options.device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
        self._call: Callable[[Tensor], tuple[Tensor, ...]] = network.to(self._device)
        if options.name == "torch-compile":
            self._call = torch.compile(self._call, dynamic=False)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._recorded: _Recorded | None = None

    def allocate(self) -> Pixels:
        """Return a zeroed buffer for one batch, in pinned memory."""
        buffer: Pixels = torch.zeros(self._shape, dtype=torch.uint8, pin_memory=True).numpy()
        return buffer

    def submit(self, pixels: Pixels | Tensor) -> Callable[[], Forwarded]:
        """Queue the copy to the GPU where one is needed, the pass, and the copies back."""
        if self._recorded is None:
            self._recorded = self._record()
        recorded, num = self._recorded, len(pixels)
        computing = torch.cuda.current_stream(self._device)
        if isinstance(pixels, Tensor):
            batch, marks = pixels, [_mark(computing)] * 2
        else:
            with torch.cuda.stream(self._copies):
                marks = [_mark(self._copies)]
                batch = torch.from_numpy(pixels).to(self._device, non_blocking=True)
                marks.append(_mark(self._copies))
            computing.wait_stream(self._copies)
            batch.record_stream(computing)
        marks.append(_mark(computing))
        recorded.crops[:num].copy_(batch)
        recorded.graph.replay()
        marks.append(_mark(computing))
        results = [torch.empty((num, o.shape[1]), pin_memory=True) for o in recorded.outputs]
        for result, output in zip(results, recorded.outputs, strict=True):
            result.copy_(output[:num], non_blocking=True)
        marks.append(_mark(computing))

        def wait() -> Forwarded:
            marks[-1].synchronize()
            sent_s, _, computed_s, fetched_s = (
                earlier.elapsed_time(later) / 1e3 for earlier, later in pairwise(marks)
            )
            arrays = [result.numpy() for result in results]
            transfer_s = sent_s + fetched_s
            return Forwarded(*_to_pair(arrays), seconds=computed_s, transfer_s=transfer_s)

        return wait

    def shrink(self, batch_size: int) -> None:
        """Go on with smaller batches; the pass is compiled and recorded again for them."""
        self.batch_size = batch_size
        self._recorded = None
        torch.cuda.empty_cache()

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self._image_size, self._image_size, 3

    def _record(self) -> "_Recorded":
        crops = torch.zeros(self._shape, dtype=torch.uint8, device=self._device)
        beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(beside):
            for _ in range(_CAPTURE_AFTER):
                self._call(crops)
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # another thread may use the GPU meanwhile
        capture = torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local")
        with torch.no_grad(), capture:
            outputs = self._call(crops)
        return _Recorded(graph, crops, outputs)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The pass over a full batch, with the memory that it reads and writes.

    Attributes:
        graph: The pass.
        crops: Its input, uint8 (B, S, S, 3).
        outputs: Its results, float32 (B, …).
    """

    graph: torch.cuda.CUDAGraph
    crops: Tensor
    outputs: tuple[Tensor, ...]


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Note when a stream gets here; whoever waits for that leaves the core to others."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def pin_memory(pixels: Pixels, device: str) -> None:
    """Let a GPU copy from a buffer by itself, beside what the CPU does; nothing without a GPU.

    Where the driver declines, copies are slower and as right.
    """
    if torch.device(device).type == "cuda":
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostRegister(pixels.ctypes.data, pixels.nbytes, 0)


def fill_up(pixels: Pixels, batch_size: int) -> Pixels:
    """Return crops as a batch of ``batch_size`` at least; those that are missing are black."""
    if len(pixels) >= batch_size:
        return pixels
    full = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    full[: len(pixels)] = pixels
    return full


def _to_pair(
    arrays: Sequence[NDArray[np.float32]],
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    return arrays[0], arrays[1] if len(arrays) > 1 else None
