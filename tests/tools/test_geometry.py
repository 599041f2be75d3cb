"""One flip of all views in every framework, and translations with reflected borders."""

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.tools.geometry import SharedFlip, Translate


def _image(height=8, width=8):
    values = torch.arange(height * width * 3).view(height, width, 3) % 251
    return Image.fromarray(values.to(torch.uint8).numpy())


def test_all_views_are_flipped_or_none():
    torch.manual_seed(0)
    views = [torch.arange(6.0).view(1, 2, 3), torch.arange(24.0).view(2, 3, 2, 2)]
    found = [SharedFlip(0.3)(views) for _ in range(1000)]
    flipped = [[torch.equal(view, own.flip(-1)) for view, own in zip(made, views, strict=True)] for made in found]
    assert all(first == second for first, second in flipped)
    assert abs(sum(first for first, _ in flipped) - 300) < 5 * 15
    assert all(
        first or all(torch.equal(*pair) for pair in zip(made, views, strict=True))
        for made, (first, _) in zip(found, flipped, strict=True)
    )


def test_a_translation_shows_the_reflection():
    torch.manual_seed(0)
    image = _image(6, 9)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    wanted = {padded[top : top + 6, left : left + 9].tobytes() for top in range(5) for left in range(5)}
    found = [Translate(2, 1.0)(image) for _ in range(400)]
    assert {np.asarray(moved).tobytes() for moved in found} == wanted and found[0].size == image.size
    still = sum(Translate(2, 0.5)(image) is image for _ in range(400))
    assert abs(still - 200) < 5 * 10


def test_wrong_arguments_are_refused():
    for wrong in (lambda: SharedFlip(1.1), lambda: Translate(0), lambda: Translate(4, -0.1)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(ValueError, match="below height and width of the image, 9 x 4, got 4"):
        Translate(4, 1.0)(_image(4, 9))


def _flips(views):
    """Which views of an image with a bright left half are flipped."""
    return [bool(view[..., : view.shape[-1] // 2].mean() < view[..., view.shape[-1] // 2 :].mean()) for view in views]


def _bright_on_the_left():
    values = np.zeros((16, 16, 3), np.uint8)
    values[:, :8] = 255
    return Image.fromarray(values)


@pytest.mark.solo
def test_solo_flips_all_views_and_refuses_dali():
    from omegaconf import OmegaConf

    from solo_ext.config import check_data
    from solo_ext.transforms import complete_views, pretrain_transform

    torch.manual_seed(0)
    view = {"rrc": {"enabled": False}, "translate": {"prob": 0.8, "pixels": 2}, "crop_size": 16, "num_crops": 2}
    views = complete_views([view])
    cfg = OmegaConf.create({"augmentations": views, "data": {"dataset": "digits"}, "shared_flip": 0.5})
    transform = pretrain_transform(cfg)
    found = [_flips(transform(_bright_on_the_left())) for _ in range(200)]
    assert all(first == second for first, second in found) and 50 < sum(first for first, _ in found) < 150
    assert "Translate(2, 0.8)" in repr(pretrain_transform(OmegaConf.merge(cfg, {"shared_flip": 0.0})))
    pytest.importorskip("nvidia.dali", reason="NOT TESTED: DALI is not installed")
    data = {"dataset": "custom", "format": "dali", "no_labels": False, "train_path": ".", "val_path": None}
    plain = complete_views([{key: value for key, value in view.items() if key != "translate"}])
    for change in ({}, {"shared_flip": 0.0}, {"augmentations": plain}):
        given = OmegaConf.create({**cfg, "accelerator": "cpu", "data": data, "dali": {"device": "cpu"}, **change})
        with pytest.raises(Exception, match=r"translate and shared_flip are not available with DALI; use data.format="):
            check_data(given)


@pytest.mark.lightly
def test_lightly_flips_both_views():
    from lightly_ext.transforms import AMDIMTransform

    torch.manual_seed(0)
    transform = AMDIMTransform(16, min_scale=None, translate=2, normalize=None)
    found = [_flips(transform(_bright_on_the_left())) for _ in range(200)]
    assert all(first == second for first, second in found) and 50 < sum(first for first, _ in found) < 150


@pytest.mark.vissl
@pytest.mark.parametrize("place", [0, 1, 3])
def test_vissl_flips_all_views_wherever_the_transform_is(place):
    from vissl_ext.registry import register

    register()
    from vissl.config import AttrDict
    from vissl.data.ssl_transforms import get_transform

    entries = [{"name": "ImgReplicatePil", "num_times": 2}, {"name": "ImgPilTranslate", "pixels": 2, "p": 0.8}]
    entries.append({"name": "ToTensor"})
    entries.insert(place, {"name": "ImgSharedFlip", "p": 0.5})
    transform = get_transform([AttrDict(entry) for entry in entries])
    torch.manual_seed(0)
    item = {"label": [0], "data_valid": [1], "data_idx": [0]}
    found = [_flips(transform({"data": [_bright_on_the_left()], **item})["data"]) for _ in range(200)]
    assert all(first == second for first, second in found) and 50 < sum(first for first, _ in found) < 150
