"""Grids of patches, and normalisation of each patch by itself."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from plugins.norms import per_sample_norm_
from plugins.objective import encode_image
from plugins.patches import grid_side, patch_stack
from plugins.tools.resnet8 import resnet8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("patch", "stride", "border"), [(4, 2, 0), (3, 3, 0), (5, 4, 1)])
def test_patches_are_cut_row_by_row(patch, stride, border):
    side = patch + 2 * stride + 2 * border
    images = torch.randn(2, 3, side, side)
    stack = patch_stack(images, patch, stride)
    assert stack.shape == (2, 9, 3, patch, patch)
    for place in range(9):
        top, left = (border + stride * index for index in divmod(place, 3))
        assert torch.equal(stack[:, place], images[:, :, top : top + patch, left : left + patch])


def test_images_may_be_wider_than_high():
    assert patch_stack(torch.zeros(2, 3, 8, 14), 4, 2).shape == (2, 18, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: grid_side(32, 10, 5), "must be a multiple of the distance; side 30 is possible"),
        (lambda: grid_side(8, 10, 5), "side 10 is possible"),
        (lambda: grid_side(8, 4, 0), "stride must be in [1, inf)"),
        (lambda: patch_stack(torch.zeros(2, 3, 8, 6), 7, 2), "images of 8 x 6 pixels are smaller than a patch of 7"),
        (lambda: patch_stack(torch.zeros(2, 3, 8, 6), 4, 0), "stride must be in [1, inf)"),
        (lambda: per_sample_norm_(nn.Linear(3, 3)), "the backbone has no normalisation; set norm=batch"),
    ],
)
def test_mistakes_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)


@pytest.mark.slow
def test_a_norm_that_does_more_is_not_replaced():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model("regnety_002")
    with pytest.raises(ValueError, match="cannot replace the BatchNormAct2d of the backbone; set norm=batch"):
        per_sample_norm_(network)


def _backbone(per_sample):
    backbone = resnet8()
    backbone.fc = nn.Identity()
    return per_sample_norm_(backbone) if per_sample else backbone


@pytest.mark.parametrize("per_sample", [False, True])
def test_with_per_sample_norm_a_patch_does_not_depend_on_the_others(per_sample):
    backbone, stack = _backbone(per_sample), torch.randn(4, 3, 8, 8)
    changed = stack.clone()
    changed[1] += torch.randn(3, 8, 8)
    assert torch.equal(backbone(stack)[0], backbone(changed)[0]) == per_sample


def test_a_network_with_per_sample_norm_is_one_of_torchvision():
    ours, theirs = per_sample_norm_(resnet18()), resnet18(norm_layer=lambda width: nn.GroupNorm(1, width))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))
    assert not any("running" in name for name in ours.state_dict())
    per_sample_norm_(ours)  # a second call finds nothing to replace, and changes nothing
    assert torch.equal(ours(images), theirs(images))


def test_evaluation_sees_whole_images_or_the_mean_over_their_patches():
    backbone, images = _backbone(False).eval(), torch.randn(2, 3, 12, 12)
    assert torch.equal(encode_image(backbone, images, None), backbone(images))
    patches = [backbone(images[:, :, i : i + 8, j : j + 8]) for i in (0, 4) for j in (0, 4)]
    torch.testing.assert_close(encode_image(backbone, images, (8, 4)), torch.stack(patches).mean(0))
