"""Embeddings with timm and a DataLoader, as its documentation shows it: a folder in, a file out."""

import argparse

import numpy as np
import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config


def main() -> None:
    """Embed a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, checkpoint_path=args.weights)
    config = resolve_model_data_config(model)
    model.reset_classifier(0)
    model = model.eval().to(device)
    dataset = ImageDataset(args.images, transform=create_transform(**config, is_training=False))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, num_workers=args.workers, pin_memory=device != "cpu"
    )
    vectors: list[np.ndarray] = []
    with torch.inference_mode():
        for images, _ in loader:
            vectors.append(model(images.to(device, non_blocking=True)).cpu().numpy())
    np.save(args.output, np.concatenate(vectors))


if __name__ == "__main__":
    main()
