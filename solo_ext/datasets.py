"""Image datasets: those that torchvision downloads, class folders, flat folders and HDF5 files."""

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, STL10
from torchvision.datasets.folder import IMG_EXTENSIONS

from plugins.tools.bad_images import BadImages, LeavingOut, Replacing
from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.folders import ImageFolder
from plugins.tools.folders import check_same_classes as _check_same_classes
from plugins.tools.images import open_image
from solo_ext.compat import host_data
from solo_ext.transforms import DATASETS

_DOWNLOADS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}
DOWNLOADED = tuple(_DOWNLOADS)
"""Datasets that torchvision downloads; every other dataset is a folder with a subfolder for each class."""
DOWNLOAD_TIMEOUT = 15.0
"""Seconds without data after which a download fails."""
PREPARE = {
    "digits": "python -m plugins.tools.data digits",
    "tinyimagenet": "python -m plugins.tools.data tinyimagenet --archive tiny-imagenet-200.zip",
}
"""The commands that create the folders of a dataset."""


def preparation_hint(dataset: str) -> str:
    """Return the command that creates the folders of a dataset, as the end of an error message, or an empty string."""
    return f" (create it with: {PREPARE[dataset]})" if dataset in PREPARE else ""


def split_path(dataset: str, path: str, split: str) -> str:
    """Return the folder of a split: ``path/<dataset>/<split>`` if that exists, else ``path``.

    The ImageNet configurations of implicit-var-reg give ``./datasets``, the parent folder of all datasets.

    Args:
        dataset: a key of DATASETS.
        path: the path in the configuration.
        split: "train" or "val".
    """
    if dataset not in (*DOWNLOADED, "custom"):
        for name in (dataset, dataset.replace("imagenet100", "imagenet-100")):
            if (Path(path) / name / split).is_dir():
                return str(Path(path) / name / split)
    return path


def image_dataset(
    dataset: str,
    path: str,
    split: str,
    transform: Any,
    *,
    indexed: bool,
    no_labels: bool,
    data_format: str = "image_folder",
    fraction: float = -1,
    bad: BadImages | None = None,
) -> Dataset:
    """Open a dataset.

    Args:
        dataset: a key of DATASETS.
        path: its folder; CIFAR and STL-10 are downloaded into it if they are missing.
        split: "pretrain", "train" or "val".
        transform: transform of a PIL image.
        indexed: whether an item starts with its index.
        no_labels: whether the images of ``path`` and its subfolders have no classes (custom data); every label is -1.
        data_format: "h5" if ``path`` is an HDF5 file; any other value means folders.
        fraction: fraction of the images of each class to use, in (0, 1); any other value means all images.
        bad: record of the images that cannot be decoded. "val" leaves them out, the other splits replace them; None
            means that such an image is an error.

    Raises:
        UserError: the folder contains no images, or a download fails.
    """
    try:
        if dataset in _DOWNLOADS:
            found = _downloaded(dataset, path, split, transform)
        elif data_format == "h5":
            found = H5Images(path, transform, _subset_classes(dataset))
        elif no_labels:
            found = FlatFolder(path, transform)
        else:
            found = ImageFolder(path, transform, loader=open_image)
    except FileNotFoundError as error:
        raise UserError(
            f"no images of {dataset} in {path}: {str(error).splitlines()[0]}{preparation_hint(dataset)}"
        ) from None
    if dataset not in _DOWNLOADS and not no_labels:
        _check_classes(dataset, path, found.classes)
    if 0 < fraction < 1:
        found = Subset(found, _fraction(found, fraction))
    if bad is not None:
        found = (LeavingOut if split == "val" else Replacing)(found, bad)
    return Indexed(found) if indexed else found


def _downloaded(dataset: str, path: str, split: str, transform: Any) -> Dataset:
    """Open CIFAR or STL-10; download it if it is missing."""
    cls = _DOWNLOADS[dataset]
    if dataset == "stl10":
        choice = {"split": {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]}
    else:
        choice = {"train": split != "val"}
    try:
        return cls(path, **choice, transform=transform)
    except RuntimeError:
        pass  # the files are missing
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        # several processes may start at the same time, and only one of them must download
        with FileLock(Path(path) / f".{dataset}.lock"), _download_timeout():
            return cls(path, **choice, transform=transform, download=True)
    except (RuntimeError, OSError) as error:
        reason = f"{dataset} is not in {path} and could not be downloaded ({error})"
        raise UserError(f"{reason}; put {cls.filename} there, or repair the network connection") from None


@contextmanager
def _download_timeout() -> Iterator[None]:
    """Limit how long a connection may wait for data; by default Python waits without a limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _subset_classes(dataset: str) -> list[str] | None:
    """Return the classes that main selects from an HDF5 file of ImageNet for ImageNet-100; 1.0.2 lacks the list."""
    names = Path(host_data.__file__).parent / "dataset_subset" / "imagenet100_classes.txt"
    return names.read_text().split() if dataset == "imagenet100" and names.is_file() else None


def _check_classes(dataset: str, path: str, classes: list[str]) -> None:
    """Check the number of class folders, and print a line if some classes are missing."""
    known = DATASETS[dataset].classes
    if known is not None and len(classes) > known:
        raise UserError(f"{path} contains {len(classes)} classes, but {dataset} has {known}; check data.dataset")
    if known is not None and len(classes) < known:
        print_on_rank_zero(f"{path} contains {len(classes)} of the {known} classes of {dataset}")
    if dataset == "tinyimagenet" and classes == ["images"]:
        raise UserError(f"the images in {path} are not sorted into class folders{preparation_hint(dataset)}")


def _fraction(dataset: Dataset, fraction: float) -> list[int]:
    """Return the indices of the images that main selects for ``data.fraction``, in main's order."""
    from sklearn.model_selection import train_test_split

    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    indices = list(range(len(dataset)))
    try:
        return train_test_split(indices, train_size=fraction, stratify=labels, random_state=42)[0]
    except ValueError as error:
        raise UserError(f"data.fraction={fraction} is not possible with {len(indices)} images: {error}") from None


class Indexed(Dataset):
    """A dataset whose items start with their index.

    Args:
        dataset: the dataset without indexes.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        return (index, *self.dataset[index])


class FlatFolder(Dataset):
    """Images without classes, in the alphabetical order of their paths (solo-learn uses the order on the disk).

    Args:
        path: folder of the images, with or without subfolders.
        transform: transform of a PIL image.

    Raises:
        FileNotFoundError: the folder has no images.
    """

    def __init__(self, path: str, transform: Any) -> None:
        self.root, self.transform = Path(path), transform
        names = (os.path.join(folder, name) for folder, _, files in os.walk(path, followlinks=True) for name in files)
        found = (os.path.relpath(name, path) for name in names if name.lower().endswith(IMG_EXTENSIONS))
        self.images = sorted(found)
        if not self.images:
            raise FileNotFoundError(f"neither the folder {path} nor its subfolders contain an image")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(open_image(self.root / self.images[index])), -1


class H5Images(Dataset):
    """Images in an HDF5 file with solo-learn's layout: a group for each class, with the bytes of each image file.

    Args:
        path: the file.
        transform: transform of a PIL image.
        subset: names of the classes to read. If it is None or the file has none of them, all classes are read.

    Raises:
        UserError: the file has another layout.
    """

    def __init__(self, path: str, transform: Any, subset: list[str] | None = None) -> None:
        import h5py

        self.path, self.transform = str(path), transform
        self._file = None
        try:
            with h5py.File(self.path) as file:
                self.classes = sorted(set(file) & set(subset or ())) or sorted(file)
                for name in self.classes:
                    _check_link(file, name)
                self.names = [(name, image) for name in self.classes for image in file[name]]
        except (OSError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not an HDF5 file with a group of images for each class: {error}") from None
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.targets = [label_of[name] for name, _ in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import h5py

        if self._file is None:  # each worker needs its own file handle
            self._file = h5py.File(self.path)
        name, image = self.names[index]
        source = f"{name}/{image} in {self.path}"
        try:
            content = io.BytesIO(self._bytes(name, image))
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source} cannot be read: {error}") from None
        return self.transform(open_image(content, source)), self.targets[index]

    def _bytes(self, name: str, image: str) -> Any:
        group = self._file[name]
        _check_link(group, image)
        data = group[image]
        if data.external:
            raise OSError(f"its bytes are stored in another file, {data.external[0][0]}")
        return data[()]


def _check_link(group: Any, name: str) -> None:
    """Check that an entry of an HDF5 file is not a soft or external link, which may point to another file."""
    import h5py

    if group.get(name, getclass=False, getlink=True).__class__ is not h5py.HardLink:
        raise OSError(f"{name} is a link, which may point to another file")


def paths_and_labels(dataset: Dataset) -> tuple[list[str], list[int]]:
    """Return the paths and labels of the images of a class folder, a flat folder, or a subset of either."""
    if isinstance(dataset, Subset):
        paths, labels = paths_and_labels(dataset.dataset)
        return [paths[index] for index in dataset.indices], [labels[index] for index in dataset.indices]
    if isinstance(dataset, ImageFolder):
        return [path for path, _ in dataset.samples], dataset.targets
    return [str(dataset.root / name) for name in dataset.images], [-1] * len(dataset)


def check_same_classes(train: Dataset, val: Dataset | None) -> None:
    """Check that training and validation images have the same classes, so that a label means the same class in both.

    Raises:
        UserError: the classes differ; the message names some that only one of the two datasets has.
    """
    while isinstance(train, Indexed | Subset):
        train = train.dataset
    while isinstance(val, Subset):
        val = val.dataset
    if isinstance(train, ImageFolder) and isinstance(val, ImageFolder):
        _check_same_classes(train.root, train.classes, val.root, val.classes)
    if isinstance(train, H5Images) and isinstance(val, H5Images):
        _check_same_classes(train.path, train.classes, val.path, val.classes)
