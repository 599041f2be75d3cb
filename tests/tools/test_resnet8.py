"""The small ResNet of the digits configurations."""

import pytest
import torch

from plugins.tools.resnet8 import WIDTHS, resnet8


@torch.no_grad()
def test_stages_keep_the_pixels_and_then_halve_them_twice():
    """Without stride in the stem, 16 pixels are 16, 8 and 4 in the stages: none sees a single pixel."""
    network, shapes = resnet8().eval(), []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 1000)
    assert shapes == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]


def test_size_is_that_of_the_reference():
    """Seven 3×3 convolutions, two 1×1 on shortcuts, and a norm after each: counted by hand."""
    inner = [(3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    weights = sum(9 * a * b for a, b in inner) + 16 * 32 + 32 * 64
    norms = 2 * (sum(b for _, b in inner) + 32 + 64)
    network = resnet8(num_classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == weights + norms + 10 * (WIDTHS[-1] + 1)


@torch.no_grad()
def test_zero_init_makes_each_block_its_shortcut():
    block = resnet8(zero_init_residual=True).eval().layer1[0]
    images = torch.rand(2, 16, 4, 4)
    torch.testing.assert_close(block(images), images)
    assert not torch.equal(resnet8().eval().layer1[0](images), images)


def test_weights_are_refused():
    with pytest.raises(ValueError, match="resnet8 has no published weights, got weights='DEFAULT'"):
        resnet8(weights="DEFAULT")  # type: ignore[arg-type]


def test_parts_that_are_not_there_do_nothing():
    network, images = resnet8(), torch.randn(2, 3, 5, 5)
    assert torch.equal(network.maxpool(images), images) and torch.equal(network.layer4(images), images)
