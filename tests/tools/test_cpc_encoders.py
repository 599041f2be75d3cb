"""The encoders of CPC: published sizes, maps, and that no image of a batch changes the features of another."""

import pytest
import torch
from torch import nn

from plugins.tools.cpc_encoders import ENCODERS, _Block, _identity, cpc_encoder


def _parameters(name):
    with torch.device("meta"):
        network = cpc_encoder(name, num_classes=10)
        return sum(parameter.numel() for parameter in network.parameters()) - 10 * (network.inplanes + 1)


def _features(name):
    encoder = cpc_encoder(name)
    encoder.fc = nn.Identity()
    return encoder


def _block(width, out, inner, norm, shortcut):
    """Parameters of a block, counted by hand: ``norm`` is 1 where each width has a scale and a shift."""
    bias = 1 - norm
    convolutions = width * inner + 9 * inner * inner + inner * out + bias * (2 * inner + out)
    norms = norm * 2 * (width + inner + inner)
    return convolutions + norms + (width * out + bias * out if shortcut else 0)


@pytest.mark.parametrize(
    ("name", "blocks", "width", "inner", "norm"),
    [("resnet101_v2_stacks", 23, 1024, 256, 0), ("resnet161_v2_stacks", 46, 4096, 512, 1)],
)
def test_stacks_have_the_published_widths(name, blocks, width, inner, norm):
    expected = 3 * 49 * 64 + (1 - norm) * 64 + norm * 2 * width
    before = 64
    for count, out, narrow in [(3, 256, 64), (4, 512, 128), (blocks, width, inner)]:
        expected += _block(before, out, narrow, norm, True) + (count - 1) * _block(out, out, narrow, norm, False)
        before = out
    assert _parameters(name) == expected


def test_wrn_28_2_has_its_published_size():
    """1 467 610 parameters with a classifier of ten classes (arXiv:1605.07146 says 1.5 million)."""
    assert _parameters("wrn_28_2_gn") + 128 * 10 + 10 == 1_467_610


@pytest.mark.parametrize(("name", "side", "cells"), [("wrn_28_2_gn", 10, 3), ("resnet101_v2_stacks", 64, 4)])
def test_maps_of_the_published_patches(name, side, cells):
    encoder, sides = _features(name).eval(), []
    encoder.get_submodule("layer3").register_forward_hook(lambda module, given, maps: sides.append(maps.shape[-1]))
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, side, side)).shape == (1, encoder.inplanes)
    assert sides == [cells]


@pytest.mark.parametrize("name", ["wrn_28_2_gn", "resnet101_v2_stacks"])
def test_an_image_does_not_change_the_features_of_another(name):
    torch.manual_seed(0)
    encoder, images = _features(name), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = encoder(images)
        changed = encoder(torch.stack([images[0], torch.randn(3, 16, 16)]))
    assert torch.equal(features[0], changed[0]) and not torch.equal(features[1], changed[1])
    assert features.isfinite().all() and features.std() > 0
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())


def test_a_block_is_the_sum_of_branch_and_shortcut():
    torch.manual_seed(0)
    block, x = _Block(2, 3, None, 2, _identity), torch.randn(1, 2, 4, 4)
    first, second = block.convs
    active = x.clamp(min=0)
    branch = nn.functional.conv2d(active, first.weight, first.bias, 2, 1).clamp(min=0)
    expected = nn.functional.conv2d(branch, second.weight, second.bias, 1, 1)
    expected = expected + nn.functional.conv2d(active, block.shortcut.weight, block.shortcut.bias, 2)
    torch.testing.assert_close(block(x), expected)


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(ValueError, match=f"name must be one of {', '.join(ENCODERS)}, got 'wrn'"):
        cpc_encoder("wrn")
    with pytest.raises(ValueError, match="wrn_28_2_gn has no published weights, got weights='best'"):
        cpc_encoder("wrn_28_2_gn", weights="best")
