"""Weights from a seed: reproducible to the bit, and sane."""

import subprocess
import sys

import torch

from pipeline.backbones import create_backbone, load_weights, weights_digest

NAME = "fbnetv3_b.ra2_in1k"


def test_a_seed_gives_the_same_bits_in_another_process_with_more_threads(seeded_weights):
    names = ["ese_vovnet19b_dw.ra_in1k", "fbnetv3_b.ra2_in1k", "resnetv2_50.a1h_in1k"]
    code = (
        "import torch; torch.set_num_threads(2); torch.manual_seed(5)\n"
        "from pipeline.backbones import load_weights, weights_digest\n"
        f"for name in {names}:\n"
        "    print(weights_digest(load_weights(name, 'random:7').state_dict))\n"
        "assert torch.get_num_threads() == 2"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [weights_digest(seeded_weights(name).state_dict) for name in names]
    assert result.stdout.split() == expected


def test_another_seed_gives_other_weights(state_dict):
    other = load_weights(NAME, "random:8")
    assert other.source == "random:8"
    assert weights_digest(other.state_dict) != weights_digest(state_dict)


def test_drawing_weights_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    load_weights(NAME, "random:1")
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_embeddings_are_sane_and_tell_images_apart(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), num_classes=0)
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(6, 3, 5, 5, generator=generator)
    with torch.inference_mode():
        embeddings = backbone(torch.nn.functional.interpolate(coarse, 96, mode="bilinear"))
    assert torch.all(embeddings.isfinite())
    assert 0.01 < embeddings.std() < 10
    directions = torch.nn.functional.normalize(embeddings)
    similarities = directions @ directions.T - 2 * torch.eye(6)
    assert similarities.max() < 0.99
