"""A folder on the command line is enough: labelled, unlabelled, nested, missing."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plugins.tools.command import UserError
from vissl_ext import catalog
from vissl_ext.catalog import _images
from vissl_ext.compat.folder_images import PairedReads
from vissl_ext.compose import compose

pytestmark = pytest.mark.vissl
SIMCLR = "config=pretrain/simclr/simclr_8node_resnet"
SUPERVISED = "config=pretrain/supervised/supervised_1gpu_resnet_example"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """labelled/{0,1}/*.png, flat/*.png and flat/deeper/*.png, no images in empty."""
    for name in ("labelled/0/a", "labelled/0/b", "labelled/1/c", "flat/z", "flat/deeper/y", "flat/x"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, ord(name[-1]))).save(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    return tmp_path


def complete(config: str, path: Path, *overrides: str):
    split = [f"config.DATA.TRAIN.DATA_PATHS=[{path}]", f"config.CHECKPOINT.DIR={path.parent / 'run'}"]
    cfg, given = compose([config, *split, "config.TEST_MODEL=false", *overrides])
    return cfg.config, catalog.complete(cfg.config, given)


def dataset(config):
    from omegaconf import OmegaConf
    from vissl.config import AttrDict
    from vissl.data import build_dataset

    catalog.register(config)
    config.DATA.TRAIN.TRANSFORMS = []
    return build_dataset(AttrDict(OmegaConf.to_container(config)), "TRAIN")


def test_labelled_folder_without_labels(folders):
    config, lists = complete(SIMCLR, folders / "labelled")
    assert lists == {} and list(config.DATA.TRAIN.DATA_SOURCES) == ["disk_folder"]
    assert list(config.DATA.TRAIN.LABEL_SOURCES) == []
    data = dataset(config)
    assert len(data) == 3 and data[2]["label"] == [2], "the index stands for a label"


def test_labelled_folder_with_labels(folders):
    config, _ = complete(SUPERVISED, folders / "labelled")
    assert list(config.DATA.TRAIN.LABEL_SOURCES) == ["disk_folder"]
    data = dataset(config)
    assert [int(data[index]["label"][0]) for index in range(3)] == [0, 0, 1]


def test_unlabelled_folder_is_read_whole_and_in_order(folders):
    config, lists = complete(SIMCLR, folders / "flat")
    ((path, images),) = lists.items()
    assert [Path(image).stem for image in images] == ["y", "x", "z"]
    assert not Path(path).exists(), "nothing is written before everything is checked"
    catalog.write_lists(lists)
    assert np.load(path).tolist() == images
    data = dataset(config)
    assert len(data) == 3
    assert [data[index]["data"][0].getpixel((0, 0))[2] for index in range(3)] == [ord("y"), ord("x"), ord("z")]
    assert all(data[index]["data_valid"] == [1] for index in range(3))


def test_a_list_of_images_is_taken_as_it_is(folders):
    np.save(folders / "some.npy", np.array([str(folders / "flat" / "x.png")]))
    config, lists = complete(SIMCLR, folders / "some.npy")
    assert lists == {} and list(config.DATA.TRAIN.DATA_SOURCES) == ["disk_filelist"]
    assert len(dataset(config)) == 1


def test_a_home_folder_is_found(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    cfg, given = compose([SIMCLR, "config.DATA.TRAIN.DATA_PATHS=['~/labelled']"])
    catalog.complete(cfg.config, given)
    assert list(cfg.config.DATA.TRAIN.DATA_PATHS) == [str(folders / "labelled")]


def test_other_sources_are_not_changed(folders):
    cfg, given = compose([SIMCLR, "config.DATA.TRAIN.DATA_SOURCES=[synthetic]", "config.DATA.TRAIN.DATA_PATHS=[x]"])
    assert catalog.complete(cfg.config, given) == {}
    assert list(cfg.config.DATA.TRAIN.DATA_SOURCES) == ["synthetic"]


@pytest.mark.sample("*-missing-*")
@pytest.mark.parametrize(
    ("config", "name", "overrides", "text"),
    [
        (SIMCLR, "missing", [], "is neither a folder nor a .npy list of images"),
        (SIMCLR, "empty", [], "there is no image in"),
        (SUPERVISED, "flat", [], "LABEL_SOURCES needs labels, but"),
        (SIMCLR, "digits", [], "create the digits with: python -m plugins.tools.data digits"),
        (SIMCLR, "splits", [], "contains train and val; choose one of the two"),
        (
            SIMCLR,
            "labelled",
            ["config.DATA.TRAIN.DATA_SOURCES=[disk_filelist]"],
            "but DATA_PATHS needs ['disk_folder']",
        ),
    ],
)
def test_invalid_paths_raise_a_one_line_error(folders, config, name, overrides, text):
    path = {"digits": folders / "digits" / "train", "splits": folders / "splits"}.get(name, folders / name)
    if name == "splits":
        for split in ("train", "val"):
            (path / split).mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(text)):
        complete(config, path, *overrides)


def test_classes_of_training_and_test_images_must_be_the_same(folders):
    """Labels are the numbers of class folders: without the first one, each would mean another class."""
    train, test = folders / "labelled", folders / "fewer"
    shutil.copytree(train, test)
    shutil.rmtree(test / "0")
    words = [f"config.DATA.{split}.DATA_PATHS=[{path}]" for split, path in (("TRAIN", train), ("TEST", test))]
    cfg, given = compose([SUPERVISED, *words])
    with pytest.raises(UserError, match=r"labelled and .*/fewer have different class folders: only one of them has 0$"):
        catalog.complete(cfg.config, given)
    catalog.complete(cfg.config, given, same_classes=False)
    cfg, given = compose([SUPERVISED, *words, "config.DATA.TRAIN.LABEL_TYPE=sample_index"])
    catalog.complete(cfg.config, given)
    cfg, given = compose([SUPERVISED, *words])
    cfg.config.DATA.TEST.LABEL_SOURCES = []
    catalog.complete(cfg.config, given)


def test_an_empty_class_is_named(folders):
    (folders / "labelled" / "2").mkdir()
    with pytest.raises(UserError, match=r"there is no image in .*labelled/2"):
        complete(SIMCLR, folders / "labelled")


def test_a_catalogue_with_a_missing_folder_is_an_error():
    from vissl.data.dataset_catalog import VisslDatasetCatalog

    VisslDatasetCatalog.register_data("gone", {"train": ["/gone/train", ""], "val": ["/gone/val", ""]})
    try:
        cfg, given = compose([SIMCLR, "config.DATA.TRAIN.DATASET_NAMES=[gone]"])
        with pytest.raises(UserError, match="has /gone/train for 'gone', which does not exist"):
            catalog.complete(cfg.config, given)
    finally:
        VisslDatasetCatalog.remove("gone")


def test_each_real_folder_is_read_once(tmp_path):
    """A link to the folder itself made 41 images of one."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
        (tmp_path / name / "again").symlink_to(tmp_path / name)
    (tmp_path / "more").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "more" / "b.png")
    (tmp_path / "1" / "linked").symlink_to(tmp_path / "more")
    assert len(list(_images(tmp_path / "0"))) == 1 and len(list(_images(tmp_path / "1"))) == 2
    root = tmp_path / "classes"
    root.mkdir()
    for name in ("0", "1"):
        (root / name).symlink_to(tmp_path / name)
    names = [(Path(path).name, label) for path, label in PairedReads(str(root)).samples]
    assert names == [("a.png", 0), ("a.png", 1), ("b.png", 1)]
    (root / "2").mkdir()
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes 2"):
        PairedReads(str(root))
