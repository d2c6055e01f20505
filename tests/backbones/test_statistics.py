"""Parameters, multiply-adds and activations, as the model cards state them."""

import pytest
import torch
from torch import nn

from pipeline.backbones import create_backbone

# name: millions of parameters, then giga multiply-adds and mega activations at the train size
CARDS = {
    "cspdarknet53.ra_in1k": (27.6, 256, 6.6, 16.8),
    "efficientnetv2_rw_m.agc_in1k": (53.2, 320, 12.7, 47.1),
    "ese_vovnet19b_dw.ra_in1k": (6.5, 224, 1.3, 8.2),
    "fbnetv3_b.ra2_in1k": (8.6, 224, 0.4, 7.0),
    "resnetv2_50.a1h_in1k": (25.5, 224, 4.1, 11.1),
}
# the same at the test size, where the card has one
TEST_SIZES = {
    "efficientnetv2_rw_m.agc_in1k": (416, 21.5, 79.6),
    "ese_vovnet19b_dw.ra_in1k": (288, 2.2, 13.6),
    "fbnetv3_b.ra2_in1k": (256, 0.5, 9.1),
}


def sketch(name):
    with torch.device("meta"):
        return create_backbone(name, weights=None)


def count(name, size):
    """Return multiply-adds and activations of one image, counted as the cards do.

    Activations are the outputs of convolutions and linear layers; a batch norm costs two
    multiply-adds per value. Runs on shapes alone.
    """
    backbone = sketch(name)
    multiply_adds, activations = [], []

    def add(module, inputs, output):
        if isinstance(module, nn.BatchNorm2d):
            multiply_adds.append(2 * output.numel())
        else:
            multiply_adds.append(output.numel() * module.weight[0].numel())
            activations.append(output.numel())

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(add)
    backbone(torch.empty(1, 3, size, size, device="meta"))
    return sum(multiply_adds), sum(activations)


def test_the_number_of_parameters_is_the_cards(name):
    parameters = sum(parameter.numel() for parameter in sketch(name).parameters())
    assert round(parameters / 1e6, 1) == CARDS[name][0]


def test_multiply_adds_and_activations_are_the_cards_at_the_train_size(name):
    _, size, giga_multiply_adds, mega_activations = CARDS[name]
    multiply_adds, activations = count(name, size)
    assert round(multiply_adds / 1e9, 1) == giga_multiply_adds
    assert round(activations / 1e6, 1) == mega_activations


@pytest.mark.parametrize("tested", sorted(TEST_SIZES))
def test_multiply_adds_and_activations_at_the_test_size(tested):
    size, giga_multiply_adds, mega_activations = TEST_SIZES[tested]
    multiply_adds, activations = count(tested, size)
    assert round(multiply_adds / 1e9, 1) == giga_multiply_adds
    assert round(activations / 1e6, 1) == mega_activations
