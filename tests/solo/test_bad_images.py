"""``skip_bad_images``: training replaces images that cannot be decoded, evaluations leave them out, all are counted."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from plugins.testing import spoil
from plugins.tools.bad_images import LIST, BadImages, LeavingOut, Replacing
from plugins.tools.command import UserError
from plugins.tools.images import ImageError, open_image
from solo_ext.datasets import check_same_classes, image_dataset, paths_and_labels
from solo_ext.loaders import EpochSeeded, evaluation_loader

pytestmark = pytest.mark.solo


@pytest.fixture
def images(tmp_path):
    """Ten images of two classes, each with its number as grey value: 2, 3 and the last one are bad."""
    paths = []
    for index in range(10):
        path = tmp_path / "images" / f"{index // 5}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (index, index, index)).save(path)
        paths.append(path)
    return tmp_path / "images", [str(spoil(paths[index])) for index in (2, 3, 9)]


def _numbers(image):
    return torch.tensor(np.asarray(image)[0, 0, 0].item())


def _opened(folder, split="pretrain", *, transform=_numbers, **options):
    given = {"indexed": False, "no_labels": False, **options}
    return image_dataset("custom", str(folder), split, transform, **given)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_replaces_a_bad_one_for_any_number_of_workers(images, workers, tmp_path):
    folder, names = images
    bad = BadImages(tmp_path)
    loader = DataLoader(_opened(folder, indexed=True, bad=bad), batch_size=3, num_workers=workers)
    index, values, labels = (torch.cat(column) for column in zip(*loader, strict=True))
    assert index.tolist() == [*range(10)]  # the position remains, as methods with a memory of the images need
    assert values.tolist() == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert bad.names() == sorted(names)


def test_the_augmentation_of_a_replacement_does_not_depend_on_the_order_of_reading(images, tmp_path):
    def augmented(image):
        return _numbers(image) + torch.rand(())

    dataset = EpochSeeded(_opened(images[0], transform=augmented, bad=BadImages(tmp_path)), seed=7)
    forwards = [float(dataset[index][0]) for index in range(10)]
    assert [float(dataset[index][0]) for index in reversed(range(10))] == forwards[::-1]
    assert len(set(forwards)) == 10  # each position draws its own


def test_files_are_counted_once_over_processes_and_parts_of_a_run(images, tmp_path, capsys):
    folder, names = images
    (tmp_path / LIST).write_text(f"{names[0]}\nearlier.png\n")  # of the run before it was interrupted
    bad = BadImages(tmp_path)
    dataset = _opened(folder, bad=bad)
    for workers in (1, 1, 0):  # three processes, as those of ranks
        list(DataLoader(dataset, num_workers=workers))
    list(dataset)  # the next epoch
    parts = list(tmp_path.glob(f".{LIST}-*"))
    assert [sorted(part.read_text().splitlines()) for part in parts] == [sorted(names)] * 3
    assert bad.finish() == 4
    assert (tmp_path / LIST).read_text().splitlines() == sorted([*names, "earlier.png"])
    assert not list(tmp_path.glob(f".{LIST}-*"))
    assert "4 images could not be decoded: replaced by other images in training, left out of" in capsys.readouterr().out


def test_evaluations_leave_bad_images_out(images, tmp_path):
    folder, names = images
    bad = BadImages(tmp_path)
    batches = list(evaluation_loader(_opened(folder, "val", bad=bad), 4, 0))
    assert torch.cat([values for values, _ in batches]).tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert bad.names() == sorted(names)
    with pytest.raises(
        UserError, match="none of the 1 image of a batch of the evaluation can be decoded; use a larger"
    ):
        list(evaluation_loader(_opened(folder, "val", bad=bad), 3, 0))  # the last batch has only the last image


def test_other_layouts_and_a_fraction(images, tmp_path):
    import h5py

    folder, _ = images
    bad = BadImages(tmp_path)
    assert [int(value) for value, _ in _opened(folder / "1", no_labels=True, bad=bad)] == [5, 6, 7, 8, 5]
    with h5py.File(tmp_path / "images.h5", "w") as file:
        for path in sorted(folder.rglob("*.*g")):
            file[f"{path.parent.name}/{path.name}"] = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    found = _opened(tmp_path / "images.h5", data_format="h5", bad=bad)
    assert [int(value) for value, _ in found] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert f"1/9.jpg in {tmp_path / 'images.h5'}" in bad.names()
    half = _opened(folder, fraction=0.5, bad=bad)
    chosen = {int(path.rpartition("/")[2][0]) for path in paths_and_labels(half)[0]}
    assert len(half) == 5 and {int(value) for value, _ in half} <= chosen - {2, 3, 9}


def test_other_errors_remain(images, tmp_path):
    folder, _ = images
    dataset = _opened(folder, bad=BadImages(tmp_path))
    (folder / "0" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image: .*No such file") as refused:
        dataset[1]
    assert not isinstance(refused.value, ImageError)
    broken = [path for path in folder.rglob("*.jpg")]
    for path in folder.rglob("*.png"):
        spoil(path)
    with pytest.raises(UserError, match=r"none of the \d+ images can be decoded: .* cannot be read as an image"):
        _opened(folder, bad=BadImages(tmp_path))[0]
    with pytest.raises(ImageError) as refused:
        open_image(broken[0])
    assert refused.value.name == str(broken[0])


def test_classes_are_still_compared(images, tmp_path):
    folder, _ = images
    shutil.copytree(folder / "0", tmp_path / "other" / "0")
    bad = BadImages(tmp_path)
    with pytest.raises(UserError, match="only one of them has 1"):
        check_same_classes(_opened(folder, bad=bad), _opened(tmp_path / "other", "val", bad=bad))


def test_dali_is_refused(compose):
    from solo_ext.config import parse_pretrain

    with pytest.raises(UserError, match=r"data\.skip_bad_images=true is not possible with data\.format=dali"):
        parse_pretrain(compose("ssl_ey", "++data.skip_bad_images=true", "data.format=dali"))


def test_a_run_that_stopped_at_a_bad_image_resumes_with_the_option(compose):
    from solo_ext.config import parse_pretrain

    runs = [parse_pretrain(compose("ssl_ey", f"++data.skip_bad_images={value}")) for value in (True, False)]
    assert runs[0].identity == runs[1].identity
    assert runs[0].data.skip_bad_images and not runs[1].data.skip_bad_images


@pytest.mark.slow
def test_training_and_evaluations_go_on(compose, digits, tmp_path, capsys):
    """One epoch with two workers, then linear evaluation and kNN of the run."""
    from solo_ext.main_knn import evaluate as knn
    from solo_ext.main_knn import parser
    from solo_ext.main_linear import evaluate as linear
    from solo_ext.main_pretrain import pretrain

    bad = {}
    for split, classes in (("train", "35"), ("val", "7")):
        shutil.copytree(digits / split, tmp_path / split)
        bad[split] = [str(spoil(sorted(tmp_path.glob(f"{split}/{label}/*.png"))[0])) for label in classes]
    every = sorted(bad["train"] + bad["val"])
    options = [
        f"data.train_path={tmp_path / 'train'}",
        f"data.val_path={tmp_path / 'val'}",
        "++data.skip_bad_images=true",
    ]
    folder = pretrain(compose("ssl_ey", *options, "data.num_workers=2"))
    assert (folder / LIST).read_text().splitlines() == every
    assert json.loads((folder / "pretrain.json").read_text())["bad_images"] == 3
    assert (
        f"3 images could not be decoded: replaced by other images in training, left out of validation; list: {folder}"
        in (capsys.readouterr().out)
    )
    probe = linear(compose("linear", *options, f"pretrained_feature_extractor={folder}"))
    assert (probe / LIST).read_text().splitlines() == every
    assert json.loads((probe / "linear.json").read_text())["bad_images"] == 3
    words = ["--pretrained_checkpoint_dir", folder, "--dataset", "digits", "--train_data_path", tmp_path / "train"]
    words += ["--val_data_path", tmp_path / "val", "--num_workers", "1", "--k", "5"]
    capsys.readouterr()
    knn(parser().parse_args([str(word) for word in [*words, "--skip_bad_images"]]))
    output = capsys.readouterr().out
    assert f"train: 2 images cannot be decoded and are left out: {', '.join(sorted(bad['train']))}\n" in output
    assert f"val: 1 image cannot be decoded and is left out: {bad['val'][0]}\n" in output
    with pytest.raises(UserError, match="cannot be read as an image"):
        knn(parser().parse_args([str(word) for word in words]))


def test_wrappers_read_single_items_and_several_alike(images, tmp_path):
    """torch's loader asks a Subset for several items at once."""
    dataset = _opened(images[0])
    for kind in (Replacing, LeavingOut):
        found = kind(dataset, BadImages(tmp_path))
        assert found.__getitems__([2, 0]) == [found[2], found[0]]
