"""timm's forward pass alone: eager, compiled, or in OpenVINO; serves benchmark rounds."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch

from pipeline.benchmark.rounds import serve_rounds


def main() -> None:
    """Serve rounds of the specification on the command line."""
    spec = json.loads(sys.argv[1])
    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    torch.set_num_threads(1)
    model = timm.create_model(spec["model"], checkpoint_path=spec["weights"])
    model.reset_classifier(0)
    model = model.eval().to(device, dtype)
    size = spec["image_size"]
    x = torch.randn(spec["batch_size"], 3, size, size, device=device, dtype=dtype)
    call = _prepare(model, x, form=spec["form"])
    batches = max(1, round(spec["images"] / spec["batch_size"]))

    def run_round() -> tuple[int, Mapping[str, float]]:
        with torch.inference_mode():
            for _ in range(batches):
                vectors = call()
        vectors.float().cpu()
        return batches * spec["batch_size"], {}

    serve_rounds(run_round)


def _prepare(model: torch.nn.Module, x: torch.Tensor, *, form: str) -> Callable[[], torch.Tensor]:
    if form == "openvino":
        return _convert(model, x)
    if form == "compiled":
        model = model.to(memory_format=torch.channels_last)
        model.compile()
    return lambda: model(x)


def _convert(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    import openvino

    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    return lambda: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


if __name__ == "__main__":
    main()
