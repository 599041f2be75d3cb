"""Images: augmentations, statistics, order, which images, and what an item depends on."""

import io
import socket
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10
from torchvision.transforms import RandomApply

from plugins.tools.command import UserError
from solo_ext.compat import GENERATION
from solo_ext.config import parse_linear, parse_pretrain
from solo_ext.data import linear_images, pretrain_images
from solo_ext.datasets import H5Images, check_same_classes, image_dataset, paths_and_labels, split_path
from solo_ext.loaders import EpochSampler, EpochSeeded
from solo_ext.transforms import (
    DATASETS,
    complete_views,
    evaluation_transform,
    linear_crop,
    linear_transform,
    pretrain_transform,
    view_transform,
)

pytestmark = pytest.mark.solo


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - {"custom"}))
def test_t18_evaluation_is_normalised_with_the_datasets_own_statistics(dataset):
    info = DATASETS[dataset]
    own = 256 if info.resize else info.side  # CIFAR and digits are not resized
    image = evaluation_transform(dataset)(Image.new("RGB", (own, own), (128, 128, 128)))
    expected = (128 / 255 - torch.tensor(info.mean)) / torch.tensor(info.std)
    torch.testing.assert_close(image.mean((1, 2)), expected, rtol=1e-4, atol=1e-5)
    assert image.shape == (3, info.side, info.side)


@pytest.mark.parametrize("dataset", sorted(DATASETS))
@pytest.mark.parametrize("side", [None, 16, 32, 64, 96, 224])
def test_images_are_evaluated_at_the_size_they_are_trained_at(dataset, side):
    """Pre-training, linear training and both validations use the same size, because a ViT accepts only one."""
    picture = Image.new("RGB", (DATASETS[dataset].side,) * 2)
    wanted = side or DATASETS[dataset].side
    augmentations = {"crop_size": side} if side else {}
    cfg = OmegaConf.create({"data": {"dataset": dataset, "augmentations": augmentations}})
    view = OmegaConf.create(complete_views([_section(crop_size=wanted)])[0])
    for transform in (
        *(view_transform(dataset, view), evaluation_transform(dataset, view.crop_size, view)),
        *(linear_transform(dataset, cfg), evaluation_transform(dataset, linear_crop(dataset, cfg).side)),
    ):
        assert transform(picture).shape == (3, wanted, wanted)


def test_published_sizes_of_the_evaluation_stay():
    for dataset, steps in (("imagenet", [256, (224, 224)]), ("imagenet100", [256, (224, 224)]), ("cifar10", [])):
        assert [step.size for step in evaluation_transform(dataset).transforms[:-2]] == steps
        assert [step.size for step in evaluation_transform(dataset, DATASETS[dataset].side).transforms[:-2]] == steps
    assert [step.size for step in evaluation_transform("stl10", 96).transforms[:-2]] == [96, (96, 96)]


def test_custom_images_are_evaluated_at_the_size_they_are_trained_at():
    image = evaluation_transform("custom", 32, {"mean": [0.5] * 3, "std": [0.25] * 3})(Image.new("RGB", (90, 60)))
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image, torch.full((3, 32, 32), -2.0))


class _Draws(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, torch.rand(()).item()


def test_an_item_depends_on_seed_epoch_and_index_alone():
    data = EpochSeeded(_Draws(), seed=3)
    first = [data[20 + index] for index in range(10)]
    torch.rand(7)
    assert [data[20 + index] for index in reversed(range(10))] == first[::-1]
    assert [index for index, _ in first] == list(range(10))
    draws = {data[key][1] for key in range(40)} | {EpochSeeded(_Draws(), seed=4)[key][1] for key in range(40)}
    assert len(draws) == 80


def test_each_epoch_and_seed_has_an_order_of_its_own_and_processes_share_it():
    def order(epoch, seed=0, world=1, rank=0):
        sampler = EpochSampler(_Draws(), world, rank, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1) != [key + 10 for key in order(0)]
    assert sorted(order(2)) == list(range(20, 30))
    assert order(0) != order(0, seed=1)
    halves = [order(0, world=2, rank=rank) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(10))


def test_digits_are_never_mirrored(compose):
    names = {
        type(step).__name__
        for step in linear_transform("digits", compose("linear", "pretrained_feature_extractor=x")).transforms
    }
    assert "RandomHorizontalFlip" not in names and "RandomResizedCrop" in names


# augmentations as the YAML writes them


def _section(**changes):
    view = {"rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0}, "crop_size": 8, "num_crops": 2}
    return {**view, **changes}


def _names(view):
    steps = view_transform("custom", OmegaConf.create(complete_views([view])[0])).transforms
    return [type(step.transforms[0] if isinstance(step, RandomApply) else step).__name__ for step in steps]


def test_a_section_that_is_left_out_is_switched_off():
    assert _names(_section()) == ["RandomResizedCrop", "ToTensor", "Normalize"]
    assert _names(_section(color_jitter={"prob": 0.0}, grayscale={"prob": 0.0})) == _names(_section())
    assert _names(_section(solarization={"enabled": False, "prob": 0.5})) == _names(_section())


def test_the_steps_come_in_mains_order():
    jitter = {"prob": 0.5, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.1}
    others = ("horizontal_flip", "equalization", "solarization", "gaussian_blur", "grayscale")
    assert _names(_section(**{name: {"prob": 0.5} for name in others}, color_jitter=jitter)) == [
        *("RandomResizedCrop", "ColorJitter", "RandomGrayscale", "GaussianBlur", "Solarization", "function"),
        *("RandomHorizontalFlip", "ToTensor", "Normalize"),
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gausian_blur": {"prob": 0.5}}, r"augmentations\[0\] has no entry 'gausian_blur'; known entries: rrc,"),
        ({"grayscale": {"probability": 0.5}}, "has no entry 'probability'; known entries: enabled, prob"),
        ({"grayscale": {"prob": 1.5}}, r"grayscale.prob must be in \[0, 1\], got 1.5"),
        ({"grayscale": 0.5}, "grayscale must be a mapping, got 0.5"),
        ({"color_jitter": {"prob": 0.8}}, "color_jitter.brightness must be a number, at least 0, got None"),
        (
            {"color_jitter": {"prob": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.6}},
            r"hue must be in \[0, 0.5\]",
        ),
        ({"rrc": None}, r"needs a value for augmentations\[0\].rrc"),
        ({"rrc": {"enabled": True, "crop_min_scale": 0.5, "crop_max_scale": 0.2}}, "not above crop_max_scale"),
        ({"rrc": {"enabled": True, "crop_min_scale": 0.5}}, r"crop_max_scale must be in \[0, 1\], got None"),
        ({"crop_size": 0}, r"crop_size must be an integer in \[1, 16384\], got 0"),
        ({"num_crops": "two"}, r"num_crops must be an integer in \[1, 1024\], got 'two'"),
        ({"mean": [0.5]}, r"mean must be three numbers, at least 0, got \[0.5\]"),
        ({"std": [0.5, 0.0, 0.5]}, "std must be three numbers, at least 1e-06"),
    ],
)
def test_a_mistake_in_an_augmentation_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        complete_views([_section(**changes)])
    with pytest.raises(UserError, match="augmentations must be a list of views"):
        complete_views(_section())


def test_without_a_random_crop_views_have_one_shape():
    view = OmegaConf.create(complete_views([_section(rrc={"enabled": False})])[0])
    assert view_transform("custom", view)(Image.new("RGB", (30, 20))).shape == (3, 8, 8)


def test_views_of_several_sizes_come_in_their_order():
    views = complete_views([_section(crop_size=12), _section(crop_size=8, num_crops=3)])
    cfg = OmegaConf.create({"data": {"dataset": "custom"}, "augmentations": views})
    assert [view.shape[-1] for view in pretrain_transform(cfg)(Image.new("RGB", (20, 20)))] == [12, 12, 8, 8, 8]


_FOLDERS = {
    **{"cifar": "cifar10", "cifar-multicrop": "cifar100", "custom": "custom", "imagenet": "imagenet"},
    **{"imagenet-100": "imagenet100", "imagenet-100-multicrop": "imagenet100"},
}


def test_every_augmentation_file_of_main_builds(checkout):
    files = sorted((checkout / "scripts" / "pretrain").glob("*/augmentations/*.yaml"))
    assert len(files) > 15
    for file in files:
        views = complete_views(OmegaConf.load(file))
        cfg = OmegaConf.create({"data": {"dataset": _FOLDERS[file.parent.parent.name]}, "augmentations": views})
        found = pretrain_transform(cfg)(Image.new("RGB", (40, 30), (9, 99, 199)))
        sizes = [view["crop_size"] for view in views for _ in range(view["num_crops"])]
        assert [tuple(view.shape) for view in found] == [(3, size, size) for size in sizes], file


@pytest.mark.slow
def test_every_data_section_of_main_is_accepted(checkout, tmp_path):
    """Pre-training, linear evaluation and fine-tuning, DALI or not, with folders in place of the images."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    paths = [f"data.train_path={tmp_path / 'train'}", f"++data.val_path={tmp_path / 'val'}"]
    formats = []
    for kind, parse in (("pretrain", parse_pretrain), ("linear", parse_linear), ("finetune", parse_linear)):
        more = [] if kind == "pretrain" else ["pretrained_feature_extractor=x"]
        for file in sorted((checkout / "scripts" / kind).glob("*/*.yaml")):
            with initialize_config_dir(str(file.parent), version_base="1.2"):
                cfg = hydra_compose(file.name, [*paths, *more, "++accelerator=cpu", "++devices=1"])
            formats.append(parse(cfg).data.format)
    assert formats.count("dali") > 30 and formats.count("image_folder") > 20


def test_automatic_augmentation_is_repeatable(compose):
    """timm draws from NumPy, too."""
    more = ("pretrained_feature_extractor=x", "++auto_augment=true")
    transform = linear_transform("digits", compose("linear", *more))
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    data = EpochSeeded(_Images(image, transform), seed=1)
    first = [data[key] for key in range(20)]
    assert all(view.shape == (3, 16, 16) for view in first)
    assert all(torch.equal(data[key], first[key]) for key in reversed(range(20)))
    assert not torch.equal(first[0], first[10])


class _Images(torch.utils.data.Dataset):
    def __init__(self, image, transform):
        self.image, self.transform = image, transform

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.transform(self.image)


# which images


def _folder(root, classes=("a", "b"), count=5, shade=0):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (50 * label, 10 * index, shade)).save(root / name / f"{index}.png")
    return root


def test_a_fraction_takes_as_much_of_each_class(tmp_path):
    from sklearn.model_selection import train_test_split

    open_ = partial(image_dataset, "custom", str(_folder(tmp_path)), "train", None, no_labels=False)
    labels = [0] * 5 + [1] * 5
    for fraction, count in ((0.4, 4), (0.8, 8)):
        found = open_(indexed=True, fraction=fraction)
        items = [found[row] for row in range(len(found))]
        assert [index for index, _, _ in items] == list(range(count))
        assert sorted(label for _, _, label in items) == [0] * (count // 2) + [1] * (count // 2)
        # the very images that main takes
        rows, _ = train_test_split(list(range(10)), train_size=fraction, stratify=labels, random_state=42)
        assert [image.getpixel((0, 0))[:2] for _, image, _ in items] == [(50 * (r // 5), 10 * (r % 5)) for r in rows]
    assert len(open_(indexed=False, fraction=-1)) == len(open_(indexed=False, fraction=1)) == 10
    with pytest.raises(UserError, match=r"data.fraction=0.01 is not possible with 10 images"):
        open_(indexed=False, fraction=0.01)


def test_images_without_labels_come_in_alphabetical_order(tmp_path):
    for shade, name in enumerate(("b.png", "a.JPG", "c.jpeg")):
        Image.new("RGB", (8, 8), (0, 0, shade)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = image_dataset("custom", str(tmp_path), "train", lambda image: image, indexed=True, no_labels=True)
    assert [(index, label) for index, _, label in (found[row] for row in range(3))] == [(0, -1), (1, -1), (2, -1)]
    assert [path.rsplit("/", 1)[1] for path in paths_and_labels(found.dataset)[0]] == ["a.JPG", "b.png", "c.jpeg"]


def test_images_without_labels_may_be_in_subfolders(tmp_path):
    for shade, name in enumerate(("b.png", "cats/z.png", "cats/old/a.png", "dogs/a.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (0, 0, shade)).save(tmp_path / name)
    (tmp_path / "empty" / "more").mkdir(parents=True)
    open_ = partial(image_dataset, "custom", split="train", transform=lambda image: image, indexed=True, no_labels=True)
    found = open_(str(tmp_path))
    assert [(image.getpixel((0, 0))[2], label) for _, image, label in (found[row] for row in range(4))] == [
        *((0, -1), (2, -1), (1, -1), (3, -1)),
    ]
    paths = [str(tmp_path / name) for name in ("b.png", "cats/old/a.png", "cats/z.png", "dogs/a.png")]
    assert paths_and_labels(found.dataset) == (paths, [-1] * 4)
    with pytest.raises(UserError, match="nor its subfolders contain an image"):
        open_(str(tmp_path / "empty"))


def test_more_class_folders_than_classes_are_refused(tmp_path):
    _folder(tmp_path, [f"n{number:03}" for number in range(101)], count=1)
    with pytest.raises(UserError, match="contains 101 classes, but imagenet100 has 100"):
        image_dataset("imagenet100", str(tmp_path), "train", None, indexed=False, no_labels=False)
    assert len(image_dataset("imagenet", str(tmp_path), "train", None, indexed=False, no_labels=False)) == 101


def test_unsorted_tinyimagenet_names_the_command(tmp_path):
    _folder(tmp_path, ["images"])
    with pytest.raises(
        UserError, match=r"not sorted into class folders \(create it with: python -m plugins.tools.data tiny"
    ):
        image_dataset("tinyimagenet", str(tmp_path), "val", None, indexed=False, no_labels=False)


def test_the_common_folder_of_all_datasets_is_understood(tmp_path, compose):
    """implicit-var-reg's ImageNet files give the common folder."""
    for split in ("train", "val"):
        _folder(tmp_path / "imagenet" / split)
        _folder(tmp_path / "imagenet-100" / split)
    for dataset, folder in (("imagenet", "imagenet"), ("imagenet100", "imagenet-100")):
        paths = (f"data.dataset={dataset}", f"data.train_path={tmp_path}", f"data.val_path={tmp_path}")
        data = parse_pretrain(compose("isoloss", *paths)).data
        assert (data.train_path, data.val_path) == tuple(str(tmp_path / folder / s) for s in ("train", "val"))
    assert split_path("custom", str(tmp_path), "train") == str(tmp_path)
    assert split_path("tinyimagenet", str(tmp_path), "train") == str(tmp_path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("data.fraction=1.5",), "data.fraction must be above 0 and at most 1, or -1 for all images, got 1.5"),
        (("data.fraction=0",), "data.fraction must be above 0"),
        (("data.no_labels=true",), "data.no_labels needs data.dataset=custom"),
        (("data.num_workers=-1",), r"data.num_workers must be an integer in \[0, 1024\], got -1"),
        (("data.format=h5", "data.dataset=cifar10"), "data.format=h5 needs image files, but cifar10 has none"),
        (("data.format=h5", "data.train_path=nowhere.h5"), "data.train_path is not a file: nowhere.h5"),
        (
            ("data.dataset=tinyimagenet", "data.train_path=nowhere"),
            r"not a folder: nowhere \(create it with: python -m plugins.tools.data tinyimagenet --archive",
        ),
    ],
)
def test_a_mistake_in_data_is_one_sentence(more, sentence, compose):
    with pytest.raises(UserError, match=sentence):
        parse_pretrain(compose("isoloss", *("++" + entry for entry in more)))


# HDF5


def _h5(path, classes, count=4, side=16):
    with h5py.File(path, "w") as file:
        for label, name in enumerate(classes):
            for index in range(count):
                data = io.BytesIO()
                Image.new("RGB", (side, side), (20 * label, 10 * index, 0)).save(data, "PNG")
                file.create_dataset(f"{name}/{index}.png", data=np.frombuffer(data.getvalue(), np.uint8))
    return str(path)


def test_an_hdf5_file_is_a_folder_of_classes(tmp_path):
    path = _h5(tmp_path / "a.h5", ("dog", "cat"))
    found = image_dataset("custom", path, "train", lambda image: image, indexed=True, no_labels=False, data_format="h5")
    colours = [(index, label, image.getpixel((3, 3))) for index, image, label in (found[row] for row in range(8))]
    assert colours[0] == (0, 0, (20, 0, 0)) and colours[5] == (5, 1, (0, 10, 0))  # cat before dog
    with pytest.raises(UserError, match=r"is not an HDF5 file with a group of images for each class"):
        (tmp_path / "b.h5").write_text("no")
        image_dataset("custom", str(tmp_path / "b.h5"), "train", None, indexed=True, no_labels=False, data_format="h5")


def test_classes_of_two_hdf5_files_must_be_the_same(tmp_path):
    files = []
    for name, classes in (("train", "abc"), ("val", "ac")):
        files.append(tmp_path / f"{name}.h5")
        with h5py.File(files[-1], "w") as file:
            for letter in classes:
                file[f"{letter}/image"] = np.zeros(1, dtype=np.uint8)
    train, val = (H5Images(str(path), None) for path in files)
    check_same_classes(train, train)
    with pytest.raises(UserError, match=r"train\.h5 and .*val\.h5 have different class folders: .* has b$"):
        check_same_classes(train, val)


def test_imagenet100_is_taken_from_an_hdf5_file_of_imagenet(tmp_path):
    classes = [f"n{number:08}" for number in range(120)]
    path = _h5(tmp_path / "a.h5", [*classes, "n02869837", "n01749939"], count=1)
    open_ = partial(image_dataset, "imagenet100", path, "train", None, indexed=False, no_labels=False)
    if GENERATION == "main":  # it lists the classes of ImageNet-100
        assert open_(data_format="h5").classes == ["n01749939", "n02869837"]
    else:
        with pytest.raises(UserError, match="contains 122 classes, but imagenet100 has 100"):
            open_(data_format="h5")


def test_hdf5_and_fraction_reach_the_loaders(tmp_path, compose):
    path = _h5(tmp_path / "a.h5", ("cat", "dog"), count=20)
    more = ("data.format=h5", "data.dataset=custom", f"data.train_path={path}", f"data.val_path={path}")
    cfg = parse_pretrain(
        compose("isoloss", *more, "++data.fraction=0.5", "optimizer.batch_size=4", "data.num_workers=2")
    )
    assert cfg.data.num_classes == 2
    images = pretrain_images(cfg)
    batches = list(images.train_dataloader())
    assert len(batches) == 5 and sorted(torch.cat([b[0] for b in batches]).tolist()) == list(range(20))
    assert sum(len(labels) for _, labels in images.val_dataloader()) == 40


# downloads


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    for dataset, cls in (("cifar10", CIFAR10), ("cifar100", CIFAR100), ("stl10", STL10)):
        monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/nothing")
        with pytest.raises(
            UserError, match=rf"{dataset} is not in .* could not be downloaded .*; put {cls.filename} there"
        ):
            image_dataset(dataset, str(tmp_path / "new"), "pretrain", None, indexed=True, no_labels=False)
    assert socket.getdefaulttimeout() is None


@pytest.mark.timeout(300)
def test_a_network_without_an_answer_is_given_up(tmp_path, monkeypatch):
    """The server accepts the connection and never answers: the timeout of the socket ends the download."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/silence")
        monkeypatch.setattr("solo_ext.datasets.DOWNLOAD_TIMEOUT", 0.5)
        with pytest.raises(UserError, match=r"could not be downloaded \(.*timed out"):
            image_dataset("cifar10", str(tmp_path), "pretrain", None, indexed=True, no_labels=False)


@pytest.mark.parametrize("option", ["finetune", "normalized_classifier"])
def test_batch_norm_sees_no_batch_of_one_image(option, compose):
    """96 images are five batches of 19 and one image, of which batch norm has no variance."""
    given = ("pretrained_feature_extractor=x", "optimizer.batch_size=19", "data.num_workers=0")
    for more, last in (((), 1), ((f"++{option}=true",), 19)):
        images = linear_images(parse_linear(compose("linear", *given, *more)))
        assert [len(targets) for _, targets in images.train_dataloader()][-1] == last
    cfg = parse_linear(compose("linear", *given[:1], "optimizer.batch_size=1", f"++{option}=true"))
    with pytest.raises(UserError, match=r"needs optimizer\.batch_size above 1, got 1"):
        linear_images(cfg)
