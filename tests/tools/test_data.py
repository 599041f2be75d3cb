"""Data on disk: split, bytes, and what happens when the folder is there already."""

import io
import json
import zipfile

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


@pytest.mark.slow
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


# Tiny ImageNet, in an archive laid out as Stanford's

_CLASSES = ("n02", "n01", "n03")


def _image(colour):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(data, "JPEG")
    return data.getvalue()


def _tiny_files():
    """{name: bytes}: three classes with four images for training and two for validation each."""
    files, annotations = {"wnids.txt": "\n".join(_CLASSES).encode() + b"\n", "words.txt": b"n01\ttench\n"}, []
    for label, name in enumerate(_CLASSES):
        files[f"train/{name}/{name}_boxes.txt"] = b"".join(
            f"{name}_{i}.JPEG\t0\t10\t63\t58\n".encode() for i in range(4)
        )
        for index in range(4):
            files[f"train/{name}/images/{name}_{index}.JPEG"] = _image((80 * label, 50 * index, 0))
        for index in range(2):
            number = 2 * ((label + 1) % 3) + index
            files[f"val/images/val_{number}.JPEG"] = _image((80 * label, 50 * index, 255))
            annotations.append(f"val_{number}.JPEG\t{name}\t0\t32\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    files["test/images/test_0.JPEG"] = _image((0, 0, 0))
    return files


def _zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", data)
    return path


def _check_tiny(out, files):
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.JPEG")}
    wanted = {name.replace("/images/", "/"): data for name, data in files.items() if name.startswith("train/n")}
    wanted = {name: data for name, data in wanted.items() if name.endswith(".JPEG")}
    for line in files["val/val_annotations.txt"].decode().splitlines():
        image, name = line.split()[:2]
        wanted[f"val/{name}/{image}"] = files[f"val/images/{image}"]
    assert found == wanted and len(found) == 3 * 4 + 3 * 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 12, "val": 6} and manifest["classes"] == 3


def test_tinyimagenet_is_sorted_into_class_folders(tmp_path, capsys):
    files, out = _tiny_files(), tmp_path / "datasets" / "tinyimagenet"
    archive = _zip(tmp_path / "tiny-imagenet-200.zip", files)
    assert data.main(["tinyimagenet", "--archive", str(archive), "--out", str(out)]) == 0
    assert "written (train 12, val 6; 64 px)" in capsys.readouterr().out
    _check_tiny(out, files)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    archive.unlink()  # not needed a second time
    assert data.main(["tinyimagenet", "--archive", str(archive), "--out", str(out)]) == 0
    assert "already there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize("inner", [".", "tiny-imagenet-200"])
def test_tinyimagenet_may_be_unpacked(tmp_path, inner):
    files = _tiny_files()
    for name, content in files.items():
        (tmp_path / "unpacked" / inner / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / inner / name).write_bytes(content)
    assert data.make_tinyimagenet(tmp_path / "unpacked", tmp_path / "out")
    _check_tiny(tmp_path / "out", files)


def test_solo_learn_and_torchvision_read_it(tmp_path):
    from torchvision.datasets import ImageFolder

    data.make_tinyimagenet(_zip(tmp_path / "a.zip", _tiny_files()), tmp_path / "out")
    train, val = ImageFolder(tmp_path / "out" / "train"), ImageFolder(tmp_path / "out" / "val")
    assert train.classes == val.classes == sorted(_CLASSES)
    assert [val.targets.count(label) for label in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("wnids.txt", "is not tiny-imagenet-200: it has no wnids.txt"),
        ("val/val_annotations.txt", "is incomplete: it has no tiny-imagenet-200/val/val_annotations.txt"),
        ("train/n03/images/n03_2.JPEG", "is incomplete: it has no tiny-imagenet-200/train/n03/images/n03_2.JPEG"),
        ("train/n01/n01_boxes.txt", "is incomplete: it has no tiny-imagenet-200/train/n01/n01_boxes.txt"),
        ("val/images/val_5.JPEG", "is incomplete: it has no tiny-imagenet-200/val/images/val_5.JPEG"),
    ],
)
def test_an_incomplete_tinyimagenet_is_refused(tmp_path, missing, sentence, capsys):
    files = _tiny_files()
    del files[missing]
    archive = _zip(tmp_path / "tiny.zip", files)
    assert data.main(["tinyimagenet", "--archive", str(archive), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.zip"]


def test_a_broken_tinyimagenet_is_refused(tmp_path, capsys):
    archive, out = _zip(tmp_path / "tiny.zip", _tiny_files()), str(tmp_path / "out")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])  # a download that stopped
    assert data.main(["tinyimagenet", "--archive", str(archive), "--out", out]) == 2
    assert "is not a complete zip archive" in capsys.readouterr().err
    spoiled = bytearray(whole)
    spoiled[whole.index(b"\xff\xd8") + 30] ^= 0xFF  # in the first image
    archive.write_bytes(spoiled)
    assert data.main(["tinyimagenet", "--archive", str(archive), "--out", out]) == 2
    assert "is corrupt" in capsys.readouterr().err
    files = _tiny_files()
    files["train/n01/n01_boxes.txt"] += b"../../../../evil.JPEG\t0\n"
    _zip(archive, files)
    assert data.main(["tinyimagenet", "--archive", str(archive), "--out", out]) == 2
    assert "contains an invalid image name" in capsys.readouterr().err
    assert data.main(["tinyimagenet", "--archive", str(tmp_path / "none.zip"), "--out", out]) == 2
    assert "download tiny-imagenet-200.zip and give its path with --archive" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.zip"]


# ---------------------------------------------------------------------------------------------------------- subset


@pytest.mark.parametrize(("fraction", "each"), [(0.01, 1), (0.1, 13), (0.5, 65)])
def test_a_share_of_the_labels_is_balanced(digits, tmp_path, fraction, each):
    """1297 images of ten classes: a tenth are 13 of each class."""
    assert data.make_subset(digits / "train", tmp_path / "few", fraction=fraction)
    chosen = names(tmp_path, "few")
    assert chosen < names(digits, "train")
    for label in range(10):
        assert len(list((tmp_path / "few" / str(label)).iterdir())) == each
    assert all((tmp_path / "few" / name).read_bytes() == (digits / "train" / name).read_bytes() for name in chosen)
    assert json.loads((tmp_path / "few" / "manifest.json").read_text())["counts"] == {"images": 10 * each}


def test_smaller_shares_are_parts_of_larger_ones_and_seeds_differ(digits, tmp_path):
    for name, fraction, seed in (("one", 0.05, 3), ("ten", 0.4, 3), ("other", 0.05, 4)):
        data.make_subset(digits / "train", tmp_path / name, fraction=fraction, seed=seed)
    assert names(tmp_path, "one") < names(tmp_path, "ten")
    assert names(tmp_path, "one") != names(tmp_path, "other")


def test_a_published_list_names_the_images(digits, tmp_path, capsys):
    wanted = sorted(names(digits, "train"))[::100]
    (tmp_path / "list.txt").write_text("\n".join(name.partition("/")[2] for name in wanted) + "\n\n")
    arguments = ["subset", "--source", str(digits / "train"), "--names", str(tmp_path / "list.txt")]
    assert data.main([*arguments, "--out", str(tmp_path / "few")]) == 0
    assert names(tmp_path, "few") == set(wanted)
    assert "few: written (images 13; 10 classes)" in capsys.readouterr().out
    assert data.main([*arguments, "--out", str(tmp_path / "few")]) == 0
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fraction", "0"], "fraction must be above 0 and at most 1, got 0.0"),
        ([], "a subset needs either --fraction or --names"),
        (["--fraction", "1"], " images, but the fraction needs 130 per class"),
        (["--names", "gone.txt"], "gone.txt is not a readable list of images"),
        (["--fraction", "0.1", "--seed", "-1"], "seed must not be negative, got -1"),
        (["--fraction", "0.1", "--source", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_about_a_subset_are_one_sentence(digits, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert data.main(["subset", "--source", str(digits / "train"), "--out", "few", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_there_or_in_two_classes_is_refused(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / label / "1.png")
    for text, count in (("2.png", 0), ("1.png", 2)):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(
            data.UserError, match=f"lists {text}, which must exist once in the source, got {count} files"
        ):
            data.make_subset(tmp_path / "train", tmp_path / "few", names=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("dog/1.png")
    data.make_subset(tmp_path / "train", tmp_path / "few", names=tmp_path / "list.txt")
    assert names(tmp_path, "few") == {"dog/1.png"}
