"""UMAP: the points, the pictures, the command, and the callback that must not disturb the training."""

import argparse
import csv
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.modes import in_mode
from plugins.tools import umap
from plugins.tools.command import UserError
from solo_ext import main_umap
from solo_ext.checkpoint import find_checkpoint
from solo_ext.main_pretrain import pretrain

pytestmark = pytest.mark.solo

ROOT = Path(__file__).parents[2]


# points


def _blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds of 40 points in ten dimensions, far from one another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    centres = 20 * torch.eye(3, 10)
    return centres[labels] + torch.randn(120, 10, generator=generator), labels


def _state() -> tuple:
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return *drawn, torch.get_num_threads()


@pytest.mark.slow
def test_clouds_stay_apart_and_points_repeat_and_the_process_is_left_as_it_was():
    """The first import of umap draws random numbers, and its first use sets torch's threads."""
    assert "umap" not in sys.modules, "another test has imported umap: this one must come first"
    features, labels = _blobs()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = _state()
    points = umap.embed(features, seed=3)
    assert _state() == before
    torch.set_num_threads(threads)
    assert points.shape == (120, 2) and points.dtype == np.float32
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(120)
    nearest = distance.argsort(axis=1)[:, :10]
    assert (labels.numpy()[nearest] == labels.numpy()[:, None]).all()
    assert np.array_equal(points, umap.embed(features, seed=3))
    assert not np.array_equal(points, umap.embed(features, seed=4))


def test_too_few_and_broken_features_are_refused():
    with pytest.raises(UserError, match="needs more than 15 images, got 15"):
        umap.embed(torch.zeros(15, 4))
    features = torch.zeros(30, 4)
    features[7, 2] = torch.nan
    with pytest.raises(UserError, match="the network has diverged"):
        umap.embed(features)


def test_without_umap_learn_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(umap, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        umap.check_installed()


# pictures


def _pixels(file: Path) -> np.ndarray:
    """The distinct colours of a picture that are not grey."""
    colours = np.unique(np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).astype(int), axis=0)
    return colours[np.ptp(colours, axis=1) > 60]


@pytest.mark.slow
def test_one_colour_for_each_class(tmp_path):
    """Points far apart, so that nothing is blended: the pictures contain the three colours, and blends with white."""
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    umap.plot(points, [0, 1, 2, 0], ["cat", "dog", "owl"], "a title", [tmp_path / "a" / "p.png", tmp_path / "p.pdf"])
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    hues = {tuple((colour == colour.max()).tolist()) for colour in _pixels(tmp_path / "a" / "p.png")}
    assert {(False, False, True), (True, False, False), (False, True, False)} <= hues  # blue, orange, green


@pytest.mark.slow
def test_unlabelled_points_are_grey(tmp_path):
    points = np.random.default_rng(0).normal(size=(50, 2))
    umap.plot(points, [-1] * 50, [], "a title", [tmp_path / "p.png"])
    assert len(_pixels(tmp_path / "p.png")) == 0
    assert np.asarray(Image.open(tmp_path / "p.png").convert("L")).min() < 60  # title and frame


@pytest.mark.parametrize("count", [1, 10, 11, 20, 21, 100, 1000])
def test_colours_differ(count):
    colours = umap._colours(count)
    assert len(colours) == count == len({tuple(np.round(colour, 6)) for colour in colours})


@pytest.mark.slow
def test_the_legend_hides_no_point(tmp_path):
    """The picture grows to the right with the legend; the axes keep their place and size."""
    points, labels = np.random.default_rng(0).uniform(size=(200, 2)), list(range(100)) * 2
    umap.plot(points, labels, [f"class number {i}" for i in range(100)], "t", [tmp_path / "many.png"])
    umap.plot(points, [-1] * 200, [], "t", [tmp_path / "none.png"])
    many, none = (Image.open(tmp_path / name) for name in ("many.png", "none.png"))
    assert many.width > none.width + 300 and abs(many.height - none.height) < 20


def test_points_are_written(tmp_path):
    umap.write_points(np.array([[1.0, -2.5], [0.0, 3.0]]), [1, -1], ["cat", "dog"], tmp_path / "p.csv")
    assert list(csv.reader((tmp_path / "p.csv").open())) == [
        ["x", "y", "label", "class"],
        ["1.00000", "-2.50000", "1", "dog"],
        ["0.00000", "3.00000", "", ""],
    ]


# the command


@pytest.fixture(scope="module")
def run(digits, tiny, tmp_path_factory) -> Path:
    """The folder of a run that was not trained."""
    from hydra import compose, initialize_config_dir

    overrides = [
        tiny,
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", "optimizer.batch_size=32"),
        *("++max_epochs=0", f"++checkpoint.dir={tmp_path_factory.mktemp('runs')}", "++checkpoint.version=v"),
    ]
    with initialize_config_dir(str(ROOT / "configs" / "solo" / "digits"), version_base="1.2"):
        return pretrain(compose("ssl_ey", overrides))


def _arguments(run: Path, digits: Path, *more: str) -> argparse.Namespace:
    options = [
        *("--pretrained_checkpoint_dir", str(run), "--dataset", "digits", "--num_workers", "0"),
        *("--train_data_path", str(digits / "train"), "--val_data_path", str(digits / "val"), *more),
    ]
    return main_umap.parser().parse_args(options)


@pytest.mark.slow
def test_command_draws_both_splits(run, digits, tmp_path, capsys):
    found = main_umap.draw(_arguments(run, digits, "--output", str(tmp_path / "out"), "--max_images", "50"))
    assert {path.name for path in found.iterdir()} == {
        f"{split}_umap.{ending}" for split in ("train", "val") for ending in ("csv", "pdf", "png")
    }
    train, val = (list(csv.DictReader((found / f"{split}_umap.csv").open())) for split in ("train", "val"))
    assert len(train) == 50 and len(val) == 40
    assert [row["label"] for row in val] == [str(index // 4) for index in range(40)]  # in the order of the folders
    assert all(row["class"] == row["label"] for row in train + val)
    said = capsys.readouterr().out
    assert "train: 50 of 96 images, chosen at random" in said and "val: UMAP of 40 features of width 32" in said
    again = main_umap.draw(_arguments(run, digits, "--output", str(tmp_path / "again"), "--max_images", "50"))
    assert (again / "train_umap.csv").read_text() == (found / "train_umap.csv").read_text()


@pytest.mark.slow
def test_umap_sh_of_the_branch_ssley(ssley):
    """Its options, after a pre-training with the branch's file."""
    run = ssley.pretrain("ssley")
    ssley(main_umap.main, [*ssley.words("main_umap", run=run), "--num_workers", "0"])
    counts = {path.name: len(path.read_text().splitlines()) - 1 for path in Path(run, "umap").glob("*.csv")}
    assert counts == {"train_umap.csv": 240, "val_umap.csv": 30}


@pytest.mark.slow
def test_unlabelled_images_are_drawn_grey(run, digits, tmp_path):
    """A folder without class folders, with and without --no_labels, beside a labelled one or alone."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((digits / "val").glob("*/*.png")):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    options = [
        *("--pretrained_checkpoint_dir", str(run), "--dataset", "custom", "--num_workers", "0"),
        *("--train_data_path", str(flat), "--output", str(tmp_path / "out")),
    ]
    for more in (["--no_labels"], []):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        found = main_umap.draw(main_umap.parser().parse_args([*options, *more]))
        assert {path.name for path in found.iterdir()} == {"train_umap.csv", "train_umap.pdf", "train_umap.png"}
        assert all(row["label"] == row["class"] == "" for row in csv.DictReader((found / "train_umap.csv").open()))
        assert len(_pixels(found / "train_umap.png")) == 0


_OPTIONS = {
    "is not the folder of a run": ("--pretrained_checkpoint_dir", "nowhere"),
    "UMAP needs more than --n_neighbors 40 validation images, got 40": ("--n_neighbors", "40"),
    "--n_neighbors must be at least 2": ("--n_neighbors", "1"),
    "--max_images must be above --n_neighbors 15, got 15": ("--max_images", "15"),
    "--no_labels needs --dataset custom": ("--no_labels",),
    "--val_data_path is not a folder": ("--val_data_path", "nowhere"),
    "--device nonsense cannot be used": ("--device", "nonsense"),
}


@pytest.mark.parametrize("sentence", sorted(_OPTIONS))
def test_command_refuses(sentence, run, digits):
    with pytest.raises(UserError, match=sentence):
        main_umap.draw(_arguments(run, digits, *_OPTIONS[sentence]))


def test_a_broken_image_is_named(run, digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "train")
    image = sorted(tmp_path.glob("train/7/*.png"))[1]
    image.write_bytes(b"not an image")
    with pytest.raises(UserError, match=f"{image} cannot be read as an image"):
        main_umap.draw(_arguments(run, digits, "--train_data_path", str(tmp_path / "train")))


def test_all_of_solo_learns_options(checkout, monkeypatch):
    from solo.args.umap import parse_args_umap

    class Seen(Exception):
        pass

    def parse_args(self):
        raise Seen({option for action in self._actions for option in action.option_strings})

    ours = {option for action in main_umap.parser()._actions for option in action.option_strings}
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Seen) as seen:
        parse_args_umap()
    assert seen.value.args[0] <= ours


# while a method is trained


@pytest.fixture
def compose(compose, tiny):
    """The same with a backbone of one convolution."""
    return lambda name, *overrides: compose(name, tiny, *overrides)


@pytest.mark.slow
def test_callback_draws_and_leaves_the_training_as_it_was(compose, tmp_path):
    def train(version: str, *more: str) -> dict[str, torch.Tensor]:
        folder = pretrain(compose("isoloss", "++max_epochs=3", f"++checkpoint.version={version}", *more))
        return torch.load(find_checkpoint(folder), weights_only=True)["state_dict"]

    plain = train("plain")
    options = ("++auto_umap.enabled=True", "++auto_umap.frequency=2", f"++auto_umap.dir={tmp_path / 'umap'}")
    watched = train("watched", *options)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    folder = tmp_path / "umap" / "isoloss" / "watched"
    assert {path.name for path in folder.iterdir()} == {
        f"isoloss-digits-watched-ep={epoch}.{ending}" for epoch in (1, 2) for ending in ("pdf", "png")
    }


def test_callback_refuses_before_anything_is_trained(compose, tmp_path):
    enabled = ("++auto_umap.enabled=True", f"++auto_umap.dir={tmp_path / 'umap'}")
    with pytest.raises(UserError, match=r"auto_umap\.frequency must be an integer, at least 1, got 0"):
        pretrain(compose("isoloss", *enabled, "++auto_umap.frequency=0"))
    with pytest.raises(UserError, match=r"set data\.val_path"):
        pretrain(compose("isoloss", *enabled, "data.val_path=null"))
    assert not list(tmp_path.glob("runs/*/*/*.ckpt")) and not (tmp_path / "umap").exists()


def test_evaluation_mode_is_given_back():
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    network.train()
    network[0].eval()
    with in_mode(False, network):
        assert not any(module.training for module in network.modules())
    assert (network.training, network[0].training, network[1].training) == (True, False, True)
