"""Embeddings with Ray Data and timm, as Ray's batch-inference guide shows it.

Images are decoded and transformed in a CPU stage; float tensors go through the object store to a
pool of actors; rows go to Parquet.
"""

import argparse
from typing import Any

import numpy as np
import ray
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config


class Transform:
    """The CPU stage: one row with a picture to one row with a tensor."""

    def __init__(self, model: str) -> None:
        config = resolve_model_data_config(timm.create_model(model))
        self.transform = create_transform(**config, is_training=False)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Replace the picture by its tensor."""
        tensor = self.transform(Image.fromarray(row["image"]))
        return {"path": row["path"], "tensor": tensor.numpy()}


class Predictor:
    """The model stage."""

    def __init__(self, model: str, weights: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        network = timm.create_model(model, checkpoint_path=weights)
        network.reset_classifier(0)
        self.network = network.eval().to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Replace tensors by embeddings."""
        with torch.inference_mode():
            tensors = torch.from_numpy(np.stack(list(batch["tensor"]))).to(self.device)
            vectors = self.network(tensors).cpu().numpy()
        return {"path": batch["path"], "embedding": list(vectors)}


def main() -> None:
    """Embed a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--actors", type=int, default=1)
    args = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    transform = Transform(args.model)
    (
        ray.data.read_images(args.images, mode="RGB", include_paths=True)
        .map(transform)
        .map_batches(
            Predictor,
            fn_constructor_args=(args.model, args.weights),
            batch_size=args.batch_size,
            concurrency=args.actors,
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
        .write_parquet(args.output)
    )


if __name__ == "__main__":
    main()
