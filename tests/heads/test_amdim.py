"""AMDIM's head: known values at the start, a slow reference, both forms, mistakes that name the option."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from plugins.heads import AMDIMHead, ResidualProjection
from plugins.methods import METHODS
from plugins.objective import connect


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double().eval()


def test_a_wide_projection_starts_near_the_identity_and_a_narrow_one_near_zero():
    x = torch.randn(4, 6, 3, 3)
    wide, narrow = ResidualProjection(6, 8).eval(), ResidualProjection(6, 5).eval()
    with torch.no_grad():
        for projection in (wide, narrow):
            projection.shortcut.bias.zero_()
        assert (wide(x)[:, :6] - x).abs().max() < 0.3 and wide(x)[:, 6:].abs().max() < 0.3
        assert narrow(x).abs().max() < 0.3
    assert wide.branch[-1].weight.eq(0).all() and wide.shortcut.weight.flatten()[1:].ne(0).any()
    assert wide.shortcut.weight[..., 0, 0].diagonal().eq(1).all()


@pytest.mark.parametrize("norm", [False, True])
def test_equals_the_slow_reference(norm):
    """One image and one location at a time."""
    projection = _perturbed(ResidualProjection(3, 5, norm=norm))
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    layers = [layer for layer in projection.branch if isinstance(layer, nn.Conv2d)]
    first, last, shortcut = (layer.weight.detach().numpy()[..., 0, 0] for layer in (*layers, projection.shortcut))

    def normalized(values, norm):
        return values / np.sqrt(1 + norm.eps) * norm.weight.detach().numpy() + norm.bias.detach().numpy()

    expected = np.empty((2, 5, 2, 4))
    for image, row, column in np.ndindex(2, 2, 4):
        one = x[image, :, row, column].numpy()
        inner = normalized(first @ one, projection.branch[1]) if norm else first @ one
        out = last @ np.maximum(inner, 0) + shortcut @ one + projection.shortcut.bias.detach().numpy()
        expected[image, :, row, column] = normalized(out, projection.norm)
    np.testing.assert_allclose(projection(x).detach().numpy(), expected, rtol=1e-12)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    of_rows = projection(rows).view(2, 2, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(of_rows, projection(x), rtol=1e-12, atol=1e-12)


def test_each_input_has_weights_of_its_own():
    head = AMDIMHead(6, 5)
    head.build([3, 4])
    head.project_maps((torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)))[1].square().sum().backward()
    assert all((p.grad is not None) == name.startswith("coarse") for name, p in head.named_parameters())


def test_without_a_projection_the_features_are_the_embedding():
    features = torch.randn(2, 6)
    assert torch.equal(AMDIMHead(6, 6, whole=False)(features), features)
    with pytest.raises(ValueError, match=r"got 6 features and proj_output_dim=5; set proj_output_dim to 6, or "):
        AMDIMHead(6, 5, whole=False)


def test_a_missing_module_is_an_error_that_names_the_options():
    spec = METHODS["amdim"]
    with torch.device("meta"):
        backbone = torchvision.models.resnet18()
    options = spec.resolve({"fine_map": "stages.2"})
    sentence = "no submodule 'stages.2'; its children are conv1, .*; the options fine_map and coarse_map name the "
    with pytest.raises(ValueError, match=sentence):
        connect(spec.head(512, options), backbone, spec.taps(options))
    with pytest.raises(ValueError, match="fine_map and coarse_map must be two modules, got 'layer4' for both"):
        spec.taps(spec.resolve({"fine_map": "layer4"}))


def test_timms_names_and_the_last_part_of_a_name_are_found():
    from timm.models.convnext import ConvNeXt

    network = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 5, 6, 7), num_classes=0)
    spec = METHODS["amdim"]
    options = spec.resolve({"fine_map": "stages.2", "coarse_map": "stages.3", "proj_output_dim": 8})
    for backbone in (network, nn.Sequential(network)):
        head = spec.head(7, options)
        connect(head, backbone, spec.taps(options))
        assert [part.shortcut.in_channels for part in (head.whole, head.fine, head.coarse)] == [7, 6, 7]
