"""AMDIM's encoder: sizes, parameters and receptive fields of the published one, and its place in the method."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plugins.heads import ResidualProjection
from plugins.methods import METHODS
from plugins.objective import connect, encode_views
from plugins.tools.amdim_encoder import COARSE, FINE, AMDIMEncoder, Residual

SIZES = {32: [30, 30, 14, 7, 5, 3, 1, 1], 64: [62, 30, 14, 7, 5, 3, 1, 1], 128: [64, 62, 30, 14, 7, 5, 3, 1, 1]}


def _outputs(encoder, images):
    """The output of each module by its name."""
    found = {}
    for name, module in encoder.named_children():
        images = found[name] = module(images)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_channels(size):
    encoder = AMDIMEncoder(size, ndf=4, n_rkhs=40, n_depth=2)
    found = _outputs(encoder, torch.zeros(2, 3, size, size))
    assert [map_.shape[-1] for map_ in [*found.values()][:-1]] == SIZES[size]
    wide = 16 if size == 32 else 32
    assert found[FINE].shape == (2, wide, 7, 7) and found[COARSE].shape == (2, wide, 5, 5)
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 40) and encoder.num_features == 40


@pytest.mark.parametrize(("ndf", "n_rkhs", "n_depth", "millions"), [(128, 1024, 3, 20.1), (256, 2048, 10, 127.9), (320, 1280, 10, 163.8)])  # fmt: skip # noqa: E501
def test_number_of_parameters(ndf, n_rkhs, n_depth, millions):
    """The published model has a BatchNorm in each block that it does not use; ours are not made."""
    with torch.device("meta"):
        encoder = AMDIMEncoder(32, ndf=ndf, n_rkhs=n_rkhs, n_depth=n_depth)
        projections = [ResidualProjection(4 * ndf, n_rkhs) for _ in range(2)]
    used = sum(p.numel() for module in (encoder, *projections) for p in module.parameters())
    widths = [block.conv2.out_channels for block in encoder.modules() if isinstance(block, Residual)]
    unused = 2 * sum([*widths, 4 * ndf, 2 * n_rkhs])
    assert round((used + unused) / 1e6, 1) == millions and unused < 0.001 * used


@pytest.mark.parametrize(("size", "fields"), [(32, (8, 16, 32)), (64, (16, 32, 64)), (128, (35, 67, 128))])
def test_receptive_fields(size, fields):
    """Pixels that change the location in the middle; 128 pixels have a border that is reflected."""
    torch.manual_seed(0)
    encoder = AMDIMEncoder(size, ndf=2, n_rkhs=16, n_depth=1).double().eval()
    for block in encoder.modules():
        if isinstance(block, Residual):
            nn.init.normal_(block.conv2.weight)
    for name, field in zip((FINE, COARSE, "norm"), fields, strict=True):
        reached = torch.zeros(size, size)
        for _ in range(4):
            images = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
            map_ = _outputs(encoder, images)[name]
            (gradient,) = torch.autograd.grad(map_[..., map_.shape[2] // 2, map_.shape[3] // 2].sum(), images)
            reached += gradient[0].abs().sum(0).ne(0)
        for axis in (0, 1):
            touched = reached.sum(axis).nonzero().flatten()
            assert touched.max() - touched.min() + 1 == field, (name, axis)


def test_equals_the_slow_reference():
    """A block at one location: the window's convolution, ReLU, W₂, and the window's mean in the first channels."""
    torch.manual_seed(0)
    block = Residual(3, 5, 4, 2).double()
    assert block.conv2.weight.eq(0).all()
    nn.init.normal_(block.conv2.weight)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = block(x)
    assert found.shape == (2, 5, 3, 3)
    for row in range(3):
        for column in range(3):
            window = x[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
            inner = torch.einsum("bcij,ocij->bo", window, block.conv1.weight).relu()
            expected = inner @ block.conv2.weight[:, :, 0, 0].T + F.pad(window.mean((2, 3)), (0, 2))
            torch.testing.assert_close(found[:, :, row, column], expected, rtol=1e-12, atol=1e-12)


def test_amdim_takes_its_maps_and_its_features():
    spec = METHODS["amdim"]
    given = {"fine_map": FINE, "coarse_map": COARSE, "fine_size": 0, "coarse_size": 0, "project_features": False}
    for size in SIZES:
        encoder = AMDIMEncoder(size, ndf=2, n_rkhs=24, n_depth=1)
        options = spec.resolve({**given, "proj_output_dim": 24})
        head = spec.head(encoder.num_features, options)
        connect(head, encoder, spec.taps(options))
        features, maps = encode_views(encoder, [torch.randn(2, 3, size, size)], spec.taps(options))
        assert torch.equal(head(features[0]), features[0])
        assert [map_.shape for map_ in head.project_maps(maps[0])] == [(2, 24, 7, 7), (2, 24, 5, 5)]


@pytest.mark.lightly
def test_lightly_finds_the_width_of_each_size():
    from lightly_ext.models import AMDIM

    given = {"fine_map": FINE, "coarse_map": COARSE, "project_features": False, "proj_output_dim": 24}
    for size in SIZES:
        model = AMDIM(AMDIMEncoder(size, ndf=2, n_rkhs=24, n_depth=1), **given)
        assert model.feature_dim == 24
        loss = model.loss([torch.randn(3, 3, size, size) for _ in range(2)])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()) and loss.isfinite()


@pytest.mark.solo
def test_solo_builds_it_and_names_its_options():
    from solo_ext.architectures import ARCHITECTURES

    encoder = ARCHITECTURES["amdim_encoder"]("amdim", size=64, ndf=2, n_rkhs=16, n_depth=1)
    assert (encoder.size, encoder.num_features) == (64, 16)
    with pytest.raises(TypeError, match=r"no option 'nrkhs'; known options: n_depth, n_rkhs, ndf, size; did you mean"):
        ARCHITECTURES["amdim_encoder"]("amdim", nrkhs=16)
    with pytest.raises(TypeError, match="backbone amdim_encoder: size must be one of"):
        ARCHITECTURES["amdim_encoder"]("amdim", size=96)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="size must be one of 32, 64, 128, got 224"):
        AMDIMEncoder(224)
    with pytest.raises(ValueError, match=r"n_rkhs must be in \[512, inf\), got 511"):
        AMDIMEncoder(32, n_rkhs=511)
    with pytest.raises(ValueError, match=r"takes images of 32 x 32 pixels, got \(2, 3, 64, 64\)"):
        AMDIMEncoder(32, ndf=2, n_rkhs=8, n_depth=1)(torch.zeros(2, 3, 64, 64))
