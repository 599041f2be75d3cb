"""Wider ResNets: published counts, keys and shortcut; impossible widths."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from plugins.heads import ExpandDim, expand_resnet_dim


def resnet(name, dim=None, **options):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        return model if dim is None else expand_resnet_dim(model, dim, **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("dim", "count", "tensors"), [(2048, 23508032, 318), (4096, 29023296, 336), (8192, 31128640, 336)]
)
def test_counts_are_the_published_ones(dim, count, tensors):
    model = resnet("resnet50", dim)
    assert parameters(model) == count
    assert len(model.state_dict()) == tensors
    new = {key for key in model.state_dict() if key.startswith("avgpool")}
    wanted = {f"avgpool.0.conv{i}.weight" for i in (1, 2, 3)}
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        wanted |= {f"avgpool.0.bn{i}.{name}" for i in (1, 2, 3)}
    assert new == (wanted if dim > 2048 else set())


def test_block_of_resnet18():
    assert parameters(resnet("resnet18", 2048).avgpool[0]) == 3676160


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_tells_its_new_width(name, width):
    model = resnet(name)
    assert model.inplanes == width
    assert expand_resnet_dim(model, 2 * width) is model
    assert model.inplanes == 2 * width and isinstance(model.fc, nn.Identity)


@pytest.mark.sample("16-128")
@pytest.mark.parametrize("dim", [128, 512, 1024])
@pytest.mark.parametrize("bottleneck", [16, None])
def test_represents_in_the_new_width(dim, bottleneck):
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    expand_resnet_dim(model, dim, bottleneck=bottleneck)
    z = model(torch.randn(2, 3, 32, 32))
    assert z.shape == (2, dim) and z.min() >= 0
    z.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_any_width_without_bottleneck():
    assert parameters(resnet("resnet18", 700, bottleneck=None).avgpool[0]) == 512 * 700 + 2 * 700


def test_shortcut_repeats_the_channels():
    torch.manual_seed(0)
    block = ExpandDim(3, 4, 6).eval()
    x = torch.randn(2, 3, 5, 5)
    inner = block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))
    inner = block.bn3(block.conv3(inner))
    expected = torch.stack([inner[:, j] + x[:, j % 3] for j in range(6)], 1).relu()
    torch.testing.assert_close(block(x), expected)
    narrow = ExpandDim(6, 4, 3).eval()
    y = torch.randn(2, 6, 5, 5)
    inner = narrow.relu(narrow.bn2(narrow.conv2(narrow.relu(narrow.bn1(narrow.conv1(y))))))
    torch.testing.assert_close(narrow(y), narrow.bn3(narrow.conv3(inner)).relu())


def test_initialisation():
    torch.manual_seed(0)
    block = ExpandDim(512, 256, 1024)
    assert block.conv1.weight.std().item() == pytest.approx(1 / 16, rel=0.01)
    assert block.conv2.weight.std().item() == pytest.approx((256 * 9) ** -0.5 / 0.8796, rel=0.01)
    assert block.conv3.weight.std().item() == pytest.approx(1 / 16 / 0.8796, rel=0.01)


def test_state_is_that_of_a_copy():
    torch.manual_seed(0)
    model = expand_resnet_dim(torchvision.models.resnet18(), 1024, bottleneck=8)
    other = expand_resnet_dim(torchvision.models.resnet18(), 1024, bottleneck=8)
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of the backbone's 512 or below it, got 700"):
        resnet("resnet18", 700)
    with pytest.raises(ValueError, match="dim must be in"):
        resnet("resnet18", 0)
    with pytest.raises(ValueError, match="has already been changed"):
        expand_resnet_dim(resnet("resnet18", 1024), 2048)
    needed = "resnet must be a torchvision ResNet, or have its layer4, avgpool and fc, got a "
    with pytest.raises(ValueError, match=f"{needed}torch.nn.modules.linear.Linear"):
        expand_resnet_dim(nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match=rf"{needed}timm\.models\.resnet\.ResNet$"):  # whose pooling has another name
        expand_resnet_dim(timm.create_model("resnet18"), 8)
