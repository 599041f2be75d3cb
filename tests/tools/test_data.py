"""The digits on disk: split, bytes, and what happens when the folder is there already."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from plugins.tools import data


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    assert data.make_digits(folder)
    return folder


def names(folder, split):
    return {str(path.relative_to(folder / split)) for path in (folder / split).glob("*/*.png")}


def test_every_digit_is_in_exactly_one_of_train_and_val(digits):
    train, val = names(digits, "train"), names(digits, "val")
    assert (len(train), len(val)) == (1297, 500)
    assert not train & val
    labels = load_digits().target
    assert train | val == {f"{label}/{row:04d}.png" for row, label in enumerate(labels)}


def test_splits_are_stratified(digits):
    for label in range(10):
        assert len(list((digits / "val" / str(label)).iterdir())) == 50
        assert len(list((digits / "train_5" / str(label)).iterdir())) == 5


def test_labelled_few_are_train_images(digits):
    few = names(digits, "train_5")
    assert few < names(digits, "train")
    for name in few:
        assert (digits / "train_5" / name).read_bytes() == (digits / "train" / name).read_bytes()


def test_images_are_rgb_of_the_asked_size(digits, tmp_path):
    assert all(Image.open(digits / "val" / name).size == (16, 16) for name in names(digits, "val"))
    assert all(Image.open(digits / "val" / name).mode == "RGB" for name in names(digits, "val"))
    data.make_digits(tmp_path / "large", size=20)
    assert Image.open(next((tmp_path / "large" / "val").glob("*/*.png"))).size == (20, 20)


def test_bytes_depend_on_the_seed_alone(digits, tmp_path):
    data.make_digits(tmp_path / "again")
    data.make_digits(tmp_path / "other", seed=1)
    files = sorted(path.relative_to(digits) for path in digits.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((digits / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert names(digits, "val") != names(tmp_path / "other", "val")


def test_manifest_states_the_statistics_of_train(digits):
    manifest = json.loads((digits / "manifest.json").read_text())
    pixels = np.stack([np.asarray(Image.open(digits / "train" / name)) for name in names(digits, "train")]) / 255
    assert manifest["counts"] == {"train": 1297, "val": 500, "train_5": 50}
    np.testing.assert_allclose(manifest["mean"], pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(manifest["std"], pixels.std((0, 1, 2)), atol=1e-4)


def test_second_call_changes_nothing(digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert data.main(["digits", "--out", str(digits)]) == 0
    assert "already there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in digits.rglob("*")}


@pytest.mark.parametrize("option", [("--size", "24"), ("--seed", "3")])
def test_other_settings_in_the_same_folder_are_an_error(digits, option, capsys):
    before = (digits / "manifest.json").read_bytes()
    assert data.main(["digits", "--out", str(digits), *option]) == 2
    error = capsys.readouterr().err
    assert f"{option[0][2:]} {16 if option[0] == '--size' else 0} instead of {option[1]}" in error
    assert len(error.splitlines()) == 1
    assert (digits / "manifest.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert data.main(["digits", "--out", str(tmp_path)]) == 2
    assert "not made by this command" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("option", [("--size", "4"), ("--seed", "-1")])
def test_settings_out_of_range_are_an_error(tmp_path, option, capsys):
    assert data.main(["digits", "--out", str(tmp_path / "digits"), *option]) == 2
    assert "must" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        data.make_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_identity_placement_enlarges_the_digit():
    digit = load_digits().images[0] / 16
    ink = data.place_digit(digit, size=16, scale=1.0, shift=(0, 0), angle=0)
    assert abs(ink.mean() - digit.mean()) < 0.01
    coarse = ink.reshape(8, 2, 8, 2).mean((1, 3))
    assert np.corrcoef(coarse.ravel(), digit.ravel())[0, 1] > 0.95


def test_rotation_by_a_quarter_turns_the_image():
    digit = load_digits().images[2] / 16
    upright = data.place_digit(digit, size=16, scale=0.9, shift=(0, 0), angle=0)
    turned = data.place_digit(digit, size=16, scale=0.9, shift=(0, 0), angle=np.pi / 2)
    np.testing.assert_allclose(turned, np.rot90(upright, k=-1), atol=1e-9)


def test_shift_moves_right_and_down():
    digit = load_digits().images[2] / 16
    centred = data.place_digit(digit, size=16, scale=0.5, shift=(0, 0), angle=0)
    moved = data.place_digit(digit, size=16, scale=0.5, shift=(2 / 16, 1 / 16), angle=0)
    np.testing.assert_allclose(moved, np.roll(centred, (1, 2), axis=(0, 1)), atol=1e-9)
