"""timm's forward pass alone, eager as it comes, or compiled; serves benchmark rounds."""

import json
import sys
from collections.abc import Mapping

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
    if spec["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    if spec["compiled"]:
        model.compile()
    size = spec["image_size"]
    x = torch.randn(spec["batch_size"], 3, size, size, device=device, dtype=dtype)
    batches = max(1, round(spec["images"] / spec["batch_size"]))

    def run_round() -> tuple[int, Mapping[str, float]]:
        with torch.inference_mode():
            for _ in range(batches):
                vectors = model(x)
        vectors.float().cpu()
        return batches * spec["batch_size"], {}

    serve_rounds(run_round)


if __name__ == "__main__":
    main()
