"""The Sobel filter before the first convolution: known values, slow reference, names of the weights, refusals."""

import copy

import pytest
import torch
from torch import nn

from plugins.methods import METHODS
from plugins.sobel import SobelConv2d, restore_sobel_, sobel_
from plugins.testing import tiny_backbone
from plugins.tools.command import UserError
from plugins.tools.export import export


def _identity():
    """A filter whose convolution passes both derivatives on."""
    conv = SobelConv2d(nn.Conv2d(3, 2, 1, bias=False).double())
    with torch.no_grad():
        conv.weight.copy_(torch.eye(2)[:, :, None, None])
    return conv


def _reference_sobel(image):
    """The derivatives along the rows and along the columns, from the differences of neighbours."""
    _, height, width = image.shape
    grey = [[0.0] * (width + 2) for _ in range(height + 2)]
    for i in range(height):
        for j in range(width):
            grey[i + 1][j + 1] = sum(channel[i][j] for channel in image.tolist()) / 3
    found = torch.zeros(2, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for step, weight in ((0, 1), (1, 2), (2, 1)):
                found[0, i, j] += weight * (grey[i + step][j] - grey[i + step][j + 2])
                found[1, i, j] += weight * (grey[i][j + step] - grey[i + 2][j + step])
    return found


def test_known_values_and_the_slow_reference():
    ramp = torch.arange(5.0).expand(1, 3, 5, 5).double()  # grows by 1 a column
    x, y = _identity()(ramp)[0]
    assert torch.equal(x[1:-1, 1:-1], torch.full((3, 3), -8.0)) and not y[1:-1, 1:-1].any()
    images = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([_reference_sobel(image) for image in images])
    torch.testing.assert_close(_identity()(images), expected, rtol=1e-12, atol=1e-12)


def test_colours_of_equal_brightness_are_the_same_image():
    grey = torch.rand(1, 1, 8, 8)
    shift = torch.tensor([0.3, -0.1, -0.2])[None, :, None, None]
    network = sobel_(tiny_backbone("x"))
    torch.testing.assert_close(network.eval()(grey.expand(1, 3, 8, 8)), network(grey + shift), rtol=1e-4, atol=1e-5)


def test_the_first_convolution_is_replaced_in_place_without_random_numbers():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network, plain = resnet18(), torch.get_rng_state()
    before = copy.deepcopy(network)
    assert sobel_(network) is network and torch.equal(torch.get_rng_state(), plain)
    assert set(network.state_dict()) - set(before.state_dict()) == {"conv1.sobel"}
    assert torch.equal(network.conv1.weight, before.conv1.weight[:, :2]) and network.conv1.weight.requires_grad
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    first = network.conv1
    assert sobel_(network).conv1 is first, "it has the filter"
    restored = restore_sobel_(before, network.state_dict())
    restored.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(restored.eval()(images), network.eval()(images))
    assert not isinstance(restore_sobel_(resnet18(), before.fc.state_dict()).conv1, SobelConv2d)
    twin = copy.deepcopy(network)
    twin.requires_grad_(False)
    assert network.conv1.weight.requires_grad and not twin.conv1.sobel.requires_grad


def test_the_option_of_deepcluster_changes_the_backbone():
    spec, network = METHODS["deepcluster"], tiny_backbone("x")
    assert not isinstance(spec.prepare(spec.resolve({}), network).conv1, SobelConv2d)
    assert isinstance(spec.prepare(spec.resolve({"sobel": True}), network).conv1, SobelConv2d)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "begins with a convolution, got none; set sobel=False"),
        (nn.Sequential(nn.Conv2d(4, 2, 3)), r"must have 3 input channels and 1 group, got Conv2d\(4, 2"),
    ],
)
def test_a_backbone_without_colours_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        sobel_(network)


def test_a_library_without_the_filter_does_not_get_its_weights(tmp_path):
    network = sobel_(tiny_backbone("x"))
    torch.save({f"backbone.{name}": value for name, value in network.state_dict().items()}, tmp_path / "a.ckpt")
    with pytest.raises(
        UserError, match=r"has a Sobel filter .* no model of torchvision has; export it with --to safet"
    ):
        export(tmp_path / "a.ckpt", "torchvision", tmp_path / "out")
    assert "tensors" in export(tmp_path / "a.ckpt", "safetensors", tmp_path / "out")
