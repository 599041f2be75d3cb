"""Masks in the three frameworks: the same pixels for the same image and mask, and the errors of each launcher."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from lightly_ext.transforms import ReLICv2Transform
from plugins.tools.command import UserError
from plugins.tools.images import open_image, with_path
from solo_ext.config import parse_pretrain
from solo_ext.data import pretrain_images
from solo_ext.stock import Scripts
from solo_ext.transforms import complete_views, pretrain_transform
from vissl_ext.masks import check_masks, complete_masks
from vissl_ext.parts import check_transforms
from vissl_ext.registry import register

register()

from vissl.config import AttrDict  # noqa: E402
from vissl.data.ssl_transforms import get_transform  # noqa: E402

pytestmark = [pytest.mark.solo, pytest.mark.lightly, pytest.mark.vissl]
PAGE = (Path(__file__).parents[1] / "docs" / "methods" / "relicv2.md").read_text()
CONFIGS = Path(__file__).parents[1] / "configs" / "solo" / "digits"
SIDE = 16
WHOLE = {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes of two images of 16 pixels, and masks with a random object."""
    generator = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        for folder, shape in (("images", (SIDE, SIDE, 3)), ("masks", (SIDE, SIDE))):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            values = (
                generator.integers(256, size=shape) if folder == "images" else 255 * generator.integers(2, size=shape)
            )
            Image.fromarray(values.astype(np.uint8)).save(path)
    return tmp_path


def _solo(folders: Path, *more: str, **masks: object):
    """The configuration of a run: one entry of large crops with masks, and one of small crops without."""
    entry = {"rrc": WHOLE, "crop_size": SIDE, "num_crops": 2}
    views = [{**entry, "masks": {"folder": str(folders / "masks"), **masks}}, {**entry, "num_crops": 1, "crop_size": 8}]
    words = ["data.dataset=custom", f"data.train_path={folders / 'images'}", "data.val_path=null"]
    words += ["optimizer.batch_size=2", f"augmentations={json.dumps(views).replace(chr(34), '')}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        return compose("relicv2", [*words, *more])


def _vissl(folders: Path, transforms: list[dict], **data: object):
    """The section ``config`` of a run, as far as the masks need it."""
    data = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(folders / "images")], **data}
    return OmegaConf.create({"DATA": {"TRAIN": {**data, "TRANSFORMS": transforms}}})


def _vissl_views(folders: Path, transforms: list[dict], path: Path | None) -> list[torch.Tensor]:
    config = _vissl(folders, [*transforms, {"name": "ToTensor"}])
    complete_masks(config)
    check_masks(config, {})
    entries = OmegaConf.to_container(config.DATA.TRAIN.TRANSFORMS)
    check_transforms("config.DATA.TRAIN.TRANSFORMS", entries)
    image = Image.new("RGB", (SIDE, SIDE), (9, 9, 9)) if path is None else open_image(path)
    item = {"data": [image], "label": [0], "data_valid": [1], "data_idx": [0]}
    return get_transform([AttrDict(entry) for entry in entries])(item)["data"]


def test_the_same_pixels_in_every_framework(folders: Path) -> None:
    path = folders / "images" / "b" / "2.png"
    image, mask = (np.asarray(open_image(folders / kind / "b" / "2.png")) for kind in ("images", "masks"))
    expected = torch.from_numpy(np.where(mask > 0, image, 128)).permute(2, 0, 1).float() / 255

    cfg = parse_pretrain(_solo(folders, prob=1.0, fill="gray"))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    *large, small = pretrain_transform(cfg)(open_image(path))
    for view in large:
        torch.testing.assert_close(view * std + mean, expected, rtol=0, atol=1e-6)
    assert small.shape == (3, 8, 8) and (small - large[0][:, ::2, ::2]).abs().max() > 0.5, "of the whole image"

    still = {"cj_prob": 0.0, "random_gray_scale": 0.0, "gaussian_blur": 0.0, "solarization_prob": 0.0, "hf_prob": 0.0}
    options = {"masks": folders / "masks", "images": folders / "images", "mask_prob": 1.0, "mask_fill": "gray"}
    views = ReLICv2Transform(SIDE, min_scale=1.0, normalize=None, **still, **options)(open_image(path))
    for view in views:
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)

    options = {"masks": str(folders / "masks"), "prob": 1.0, "fill": "gray"}
    copies = {"name": "ImgReplicatePil", "num_times": 2}
    views = _vissl_views(folders, [copies, {"name": "ImgPilRemoveBackground", **options}], path)
    assert len(views) == 2
    for view in views:
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)
    crops = {"total_num_crops": 3, "num_crops": [2, 1], "size_crops": [SIDE, 8], "crop_scales": [[1, 1], [1, 1]]}
    *large, small = _vissl_views(folders, [{"name": "ImgPilToMultiCrop", **crops, "background": options}], path)
    for view in large:
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)
    whole = _vissl_views(folders, [{"name": "ImgPilToMultiCrop", **crops}], path)
    assert torch.equal(small, whole[2]), "the small crops have their background"


def test_without_masks_nothing_changes(folders: Path) -> None:
    """Transforms and identity of a run are unchanged, so that earlier runs can be resumed."""
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        words = ["data.dataset=custom", f"data.train_path={folders / 'images'}", "data.val_path=null"]
        cfg = parse_pretrain(compose("relicv2", words))
    assert "masks" not in cfg.augmentations[0] and "RemoveBackground" not in repr(pretrain_transform(cfg))
    assert "RemoveBackground" not in repr([view for view in ReLICv2Transform(SIDE).transforms])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.dataset=cifar10"], "needs image files, but cifar10 has none"),
        (["data.format=h5"], "masks is not available with data.format=h5"),
        (["data.format=dali", "++dali.device=cpu"], "masks is not available with data.format=dali"),
        ({"prob": 2}, r"masks.prob must be in \[0, 1\], got 2"),
        ({"fill": "white"}, r"unknown augmentations\[0\].masks.fill .white.; choose from random, gray, black"),
        ({"probability": 1}, "masks has no entry .probability."),
    ],
)
def test_solo_learn_refuses_what_has_no_masks(folders: Path, given: list[str] | dict, message: str) -> None:
    words, masks = (given, {}) if isinstance(given, list) else ([], given)
    with pytest.raises(UserError, match=message):
        parse_pretrain(_solo(folders, *words, **masks))


def test_the_script_of_solo_learn_refuses_masks(folders: Path, capsys: pytest.CaptureFixture) -> None:
    """The script would ignore the entry, because it uses solo-learn's transforms."""
    cfg = OmegaConf.create({"strategy": None, **OmegaConf.to_container(_solo(folders))})
    with pytest.raises(SystemExit):
        Scripts({}).parse_pretrain(lambda cfg: cfg, cfg)
    said = "augmentations.masks is not available in solo-learn's own script; run the same configuration with"
    assert said in "".join(capsys.readouterr())


def test_the_examples_of_the_page_run(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    imagenet = folders / "datasets" / "imagenet"
    imagenet.mkdir(parents=True)
    for name, target in (("masks", "masks"), ("train", "images")):
        (imagenet / name).symlink_to(folders / target)
    solo, vissl = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    assert complete_views(solo["augmentations"])[0]["masks"]["prob"] == 0.1
    config = _vissl(folders, vissl["TRANSFORMS"], DATA_PATHS=[str(imagenet / "train")])
    complete_masks(config)
    check_masks(config, {})
    check_transforms("config.DATA.TRAIN.TRANSFORMS", OmegaConf.to_container(config.DATA.TRAIN.TRANSFORMS))
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found: dict = {}
    exec(code, found)
    dataset = found["training_set"](str(folders / "images"), str(folders / "masks"))
    assert [view.shape for view in dataset[0][0]] == [(3, 224, 224)] * 2


def test_missing_masks_are_an_error_before_the_training_in_every_framework(folders: Path) -> None:
    (folders / "masks" / "a" / "2.png").unlink()
    missing = r"1 of 4 images have no mask in .*masks; the first is .*a/2.png"
    with pytest.raises(UserError, match=missing):
        pretrain_images(parse_pretrain(_solo(folders)))
    with pytest.raises(UserError, match=missing):
        ReLICv2Transform(masks=folders / "masks", images=folders / "images")
    entry = {"name": "ImgPilRemoveBackground", "masks": str(folders / "masks")}
    for options in ({}, {"DATA_PATHS": [], "images": str(folders / "images")}):
        config = _vissl(folders, [{**entry, **options}], **options)
        complete_masks(config)
        with pytest.raises(UserError, match=missing):
            check_masks(config, {})
    # the images of a list, in place of all images of a folder
    entry["images"], listed = str(folders / "images"), [str(folders / "images" / "a" / "1.png")]
    np.save(folders / "few.npy", np.array(listed))
    for path, lists in (("other.npy", {"other.npy": listed}), (str(folders / "few.npy"), {})):
        check_masks(_vissl(folders, [entry], DATA_PATHS=[path]), lists)


def test_what_vissl_and_lightly_cannot_do_is_refused(folders: Path) -> None:
    entry = {"name": "ImgPilRemoveBackground", "masks": str(folders / "masks")}
    for data, message in (
        ({"DATA_SOURCES": ["torchvision_dataset"]}, r"needs image files.*got .*\['torchvision_dataset'\]"),
        ({"DATA_PATHS": ["a.npy"]}, "needs the option images"),
        ({"DATA_PATHS": [str(folders / "images")] * 2}, "needs the option images"),
    ):
        config = _vissl(folders, [entry], **data)
        complete_masks(config)
        with pytest.raises(UserError, match=message):
            check_masks(config, {})
    for options in ({"masks": "none", "images": str(folders / "images")}, {"prob": 0.1}):
        with pytest.raises(UserError, match=r"ImgPilRemoveBackground cannot be|folder of masks does not exist"):
            check_transforms("config.DATA.TRAIN.TRANSFORMS", [{"name": entry["name"], **options}])
    grey = _vissl_views(folders, [{**entry, "prob": 1.0}], None)
    assert torch.equal(grey[0], torch.full((3, SIDE, SIDE), 9 / 255)), "VISSL's replacement of an unreadable image"
    with pytest.raises(ValueError, match="masks needs images"):
        ReLICv2Transform(masks=folders / "masks")
    transform = ReLICv2Transform(SIDE, masks=folders / "masks", images=folders / "images")
    with pytest.raises(UserError, match="has no path"):
        transform(Image.new("RGB", (SIDE, SIDE)))
    transform(with_path(Image.new("RGB", (SIDE, SIDE)), folders / "images" / "a" / "1.png"))
