"""Images for solo-learn: its datasets and ours, in an order that can be repeated.

Which images make a batch, and how each is augmented, depends on (seed, epoch, index) alone: not on the number of
workers, and not on whether the run was interrupted. A resumed run therefore sees what an uninterrupted one sees.
``data.format`` says who reads the files: ``image_folder`` and ``h5`` are read here, ``dali`` in :mod:`solo_ext.dali`.
"""

import io
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import CIFAR10, CIFAR100, STL10
from torchvision.datasets.folder import IMG_EXTENSIONS

from plugins.tools.command import UserError, say
from plugins.tools.folders import ImageFolder
from plugins.tools.images import open_image
from solo_ext.compat import host_data, pl
from solo_ext.transforms import (
    DATASETS,
    evaluation_transform,
    linear_crop,
    linear_transform,
    pretrain_transform,
)

_DOWNLOADS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}
DOWNLOADED = tuple(_DOWNLOADS)
"""Datasets that torchvision fetches; all others are folders with one folder of images for each class."""
DOWNLOAD_TIMEOUT = 15.0
"""Seconds without an answer after which a download is given up."""
PREPARE = {
    "digits": "python -m plugins.tools.data digits",
    "tinyimagenet": "python -m plugins.tools.data tinyimagenet --archive tiny-imagenet-200.zip",
}
"""The commands that make a dataset's folders."""


def hint(dataset: str) -> str:
    """How to make the folders of a dataset, to be put behind a sentence; empty where we cannot."""
    return f" (make it with: {PREPARE[dataset]})" if dataset in PREPARE else ""


def split_path(dataset: str, path: str, split: str) -> str:
    """Where a split's images are: ``path``, or ``path/<dataset>/<split>`` if that is a folder.

    implicit-var-reg's ImageNet files give ``./datasets``, the common folder of all datasets, as their path.

    Args:
        dataset: a key of DATASETS.
        path: what the configuration gives.
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
) -> Dataset:
    """Open a dataset.

    Args:
        dataset: a key of DATASETS.
        path: its folder; CIFAR and STL-10 are downloaded into it where they are missing.
        split: "pretrain", "train" or "val".
        transform: of a PIL image.
        indexed: whether an item starts with its index.
        no_labels: a flat folder of images (custom data); every label is -1.
        data_format: "h5" if ``path`` is an HDF5 file, else folders.
        fraction: of the images to take, the same of each class; all of them unless above 0.

    Raises:
        UserError: the folder holds no images, or a download fails.
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
        raise UserError(f"no images of {dataset} in {path}: {str(error).splitlines()[0]}{hint(dataset)}") from None
    if dataset not in _DOWNLOADS and not no_labels:
        _check_classes(dataset, path, found.classes)
    if 0 < fraction < 1:
        found = Subset(found, _fraction(found, fraction))
    return Indexed(found) if indexed else found


def _downloaded(dataset: str, path: str, split: str, transform: Any) -> Dataset:
    """CIFAR or STL-10 from the disk, or else from the network."""
    cls = _DOWNLOADS[dataset]
    if dataset == "stl10":
        choice = {"split": {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]}
    else:
        choice = {"train": split != "val"}
    try:
        return cls(path, **choice, transform=transform)
    except RuntimeError:
        pass  # it is not there
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        # several processes may start at once, and one broken download would stop them all
        with FileLock(Path(path) / f".{dataset}.lock"), _impatient_sockets():
            return cls(path, **choice, transform=transform, download=True)
    except (RuntimeError, OSError) as error:
        reason = f"{dataset} is not in {path} and could not be downloaded ({error})"
        raise UserError(f"{reason}; put {cls.filename} there, or mend the network") from None


@contextmanager
def _impatient_sockets() -> Iterator[None]:
    """Give up a connection that does not answer: Python waits without end, the system for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _subset_classes(dataset: str) -> list[str] | None:
    """The classes of ImageNet-100, which main takes from an HDF5 file of all ImageNet; 1.0.2 does not list them."""
    names = Path(host_data.__file__).parent / "dataset_subset" / "imagenet100_classes.txt"
    return names.read_text().split() if dataset == "imagenet100" and names.is_file() else None


def _check_classes(dataset: str, path: str, classes: list[str]) -> None:
    """Refuse folders that are not the classes of the dataset."""
    known = DATASETS[dataset].classes
    if known is not None and len(classes) > known:
        raise UserError(f"{path} holds {len(classes)} classes, {dataset} has {known}")
    if known is not None and len(classes) < known:
        say(f"{path} holds {len(classes)} of the {known} classes of {dataset}")
    if dataset == "tinyimagenet" and classes == ["images"]:
        raise UserError(f"the images in {path} are not sorted into class folders{hint(dataset)}")


def _fraction(dataset: Dataset, fraction: float) -> list[int]:
    """The rows that main takes for ``data.fraction``, in its order."""
    from sklearn.model_selection import train_test_split

    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    rows = list(range(len(dataset)))
    try:
        kept, _ = train_test_split(rows, train_size=fraction, stratify=labels, random_state=42)
    except ValueError as error:
        raise UserError(f"data.fraction={fraction} cannot be taken of {len(rows)} images: {error}") from None
    return kept


class Indexed(Dataset):
    """A dataset each item of which starts with its index.

    Args:
        dataset: what is read.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        return (index, *self.dataset[index])


class FlatFolder(Dataset):
    """A folder of images without classes, in alphabetical order: solo-learn takes the order of the disk.

    Args:
        path: the folder.
        transform: of a PIL image.

    Raises:
        FileNotFoundError: it holds no images.
    """

    def __init__(self, path: str, transform: Any) -> None:
        self.root, self.transform = Path(path), transform
        self.images = sorted(file.name for file in self.root.iterdir() if file.name.lower().endswith(IMG_EXTENSIONS))
        if not self.images:
            raise FileNotFoundError("with data.no_labels the images lie in the folder itself")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(open_image(self.root / self.images[index])), -1


class H5Images(Dataset):
    """Images in an HDF5 file as solo-learn lays it out: a group for each class, in it the bytes of each image file.

    Args:
        path: the file.
        transform: of a PIL image.
        subset: names of the classes to read, if the file has any of them; None: all.

    Raises:
        UserError: it is no such file.
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
            raise UserError(f"{path} is no HDF5 file with a group of images for each class: {error}") from None
        rank = {name: index for index, name in enumerate(self.classes)}
        self.targets = [rank[name] for name, _ in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import h5py

        if self._file is None:  # each worker needs its own
            self._file = h5py.File(self.path)
        name, image = self.names[index]
        place = f"{name}/{image} in {self.path}"
        try:
            content = io.BytesIO(self._bytes(name, image))
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place} cannot be read: {error}") from None
        opened = open_image(content, place)
        return self.transform(opened), self.targets[index]

    def _bytes(self, name: str, image: str) -> Any:
        group = self._file[name]
        _check_link(group, image)
        data = group[image]
        if data.external:
            raise OSError(f"its bytes are in another file, {data.external[0][0]}")
        return data[()]


def _check_link(group: Any, name: str) -> None:
    """Refuse a link, which may lead to another file."""
    import h5py

    if group.get(name, getclass=False, getlink=True).__class__ is not h5py.HardLink:
        raise OSError(f"{name} is a link, which may lead to another file")


def listing(dataset: Dataset) -> tuple[list[str], list[int]]:
    """Paths and labels of the images of a class folder, a flat folder, or a subset of one."""
    if isinstance(dataset, Subset):
        files, labels = listing(dataset.dataset)
        return [files[row] for row in dataset.indices], [labels[row] for row in dataset.indices]
    if isinstance(dataset, ImageFolder):
        return [path for path, _ in dataset.samples], dataset.targets
    return [str(dataset.root / name) for name in dataset.images], [-1] * len(dataset)


def check_same_classes(train: Dataset, val: Dataset | None) -> None:
    """Refuse class folders that differ: the same number would stand for different classes.

    Raises:
        UserError: it names folders that only one of the two has.
    """
    while isinstance(train, Indexed | Subset):
        train = train.dataset
    if isinstance(train, ImageFolder) and isinstance(val, ImageFolder) and train.classes != val.classes:
        alone = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:5])
        raise UserError(f"{train.root} and {val.root} have different class folders: only one of them has {alone}")


class EpochSampler(DistributedSampler):
    """A new order each epoch, from (seed, epoch) alone, that tells the dataset the epoch: yields epoch·n + index."""

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)
        return (self.epoch * size + index for index in super().__iter__())


class EpochSeeded(Dataset):
    """Draws the random numbers of an item's augmentation from (seed, epoch, index) alone.

    Args:
        dataset: what is read.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> Any:
        epoch, index = divmod(key, len(self.dataset))
        seed = hash((self.seed, epoch, index)) & 0x7FFFFFFFFFFFFFFF
        # not torch.manual_seed, which also prepares every GPU
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        return self.dataset[index]


class Images(pl.LightningDataModule):
    """Training and validation images of one run.

    The loaders are made when Lightning asks, since only then is it known how many processes share the training images.

    Args:
        train: training images.
        val: validation images, or None.
        cfg: the configuration.
        drop_last: whether the last, smaller batch of an epoch is left out.

    Raises:
        UserError: there are fewer training images than one batch.
    """

    def __init__(self, train: Dataset, val: Dataset | None, cfg: DictConfig, *, drop_last: bool) -> None:
        super().__init__()
        self.train, self.val, self.cfg, self.drop_last = train, val, cfg, drop_last
        self.start_epoch = 0
        """The epoch at which a resumed run begins: its loader fetches before Lightning tells it the epoch."""
        batch = cfg.optimizer.batch_size * process_count(cfg)
        if drop_last and len(train) < batch:
            raise UserError(f"{cfg.data.train_path} holds {len(train)} images, fewer than one batch of {batch}")

    def train_dataloader(self) -> Any:
        """Batches in an order that repeats."""
        world, rank = processes()
        sampler = EpochSampler(self.train, world, rank, shuffle=True, seed=self.cfg.seed, drop_last=self.drop_last)
        sampler.set_epoch(self.start_epoch)
        return self.loader(sampler)

    def loader(self, sampler: EpochSampler) -> Any:
        """The batches of this process, in the sampler's order."""
        workers = self.cfg.data.num_workers
        return DataLoader(
            EpochSeeded(self.train, self.cfg.seed),
            batch_size=self.cfg.optimizer.batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=self.drop_last,
            persistent_workers=workers > 0,
        )

    def val_dataloader(self) -> DataLoader | list[Any]:
        """All validation images, in order."""
        if self.val is None:
            return []
        world, rank = processes()
        mine = self.val if world == 1 else Subset(self.val, range(rank, len(self.val), world))
        return evaluation_loader(mine, self.cfg.optimizer.batch_size, self.cfg.data.num_workers)


def process_count(cfg: DictConfig) -> int:
    """How many processes will share the images, by a configuration whose ``devices`` have been checked."""
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    return devices * cfg.get("num_nodes", 1)


def processes() -> tuple[int, int]:
    """How many processes share the images, and which this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """A loader in order, the last batch as small as it comes."""
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)


def pretrain_images(cfg: DictConfig) -> Images:
    """The data module of a pre-training; no validation images where there are none, or no labels.

    Args:
        cfg: the configuration, checked.

    Returns:
        Batches ``[indexes, [views], targets]`` for training, ``[images, targets]`` for validation. A resumed run sets
        ``start_epoch``.

    Raises:
        UserError: images are missing, or too few.
    """
    transform = pretrain_transform(cfg)
    if cfg.debug_augmentations:
        say(f"views:\n{transform}")
    view = cfg.augmentations[0]
    evaluation = evaluation_transform(cfg.data.dataset, view.crop_size, view)
    dali = cfg.data.format == "dali"
    train, val = _train_and_val(cfg, "pretrain", None if dali else transform, evaluation, indexed=not dali)
    if not dali:
        return Images(train, val, cfg, drop_last=True)
    from solo_ext.dali import DALIImages, pretrain_views

    return DALIImages(train, val, cfg, pretrain_views(cfg), indexed=True, drop_last=True)


def linear_images(cfg: DictConfig) -> Images:
    """The data module of a linear evaluation or fine-tuning.

    Args:
        cfg: the configuration, checked.

    Returns:
        Batches ``[images, targets]``. A resumed run sets ``start_epoch``.

    Raises:
        UserError: images are missing.
    """
    data = cfg.data
    crop = linear_crop(data.dataset, cfg)
    evaluation = evaluation_transform(data.dataset, crop.side, data.get("augmentations"))
    dali = data.format == "dali"
    transform = None if dali else linear_transform(data.dataset, cfg)
    train, val = _train_and_val(cfg, "train", transform, evaluation, indexed=False)
    # mixup pairs the images of a batch: their number must be even
    drop_last = cfg.get("mixup", 0) > 0 or cfg.get("cutmix", 0) > 0 or _ends_in_one_image(cfg, len(train))
    if not dali:
        return Images(train, val, cfg, drop_last=drop_last)
    from solo_ext.dali import DALIImages, linear_view

    return DALIImages(train, val, cfg, [linear_view(crop)], indexed=False, drop_last=drop_last)


def _ends_in_one_image(cfg: DictConfig, images: int) -> bool:
    """Whether batch norm is trained and an epoch's last batch has one image, of which there is no variance.

    Raises:
        UserError: every batch has one image.
    """
    if not (cfg.finetune or cfg.normalized_classifier):
        return False
    batch = cfg.optimizer.batch_size
    if batch == 1:
        raise UserError("finetune and normalized_classifier train batch norm: set optimizer.batch_size above 1")
    return -(-images // process_count(cfg)) % batch == 1


def _train_and_val(
    cfg: DictConfig, split: str, transform: Any, evaluation: Any, *, indexed: bool
) -> tuple[Dataset, Dataset | None]:
    data = cfg.data
    options = {"indexed": indexed, "no_labels": data.no_labels, "fraction": data.fraction, "data_format": data.format}
    train, val = image_dataset(data.dataset, data.train_path, split, transform, **options), None
    if data.val_path is not None and not data.no_labels:
        options = {"indexed": False, "no_labels": False, "data_format": data.format}
        val = image_dataset(data.dataset, data.val_path, "val", evaluation, **options)
    check_same_classes(train, val)
    return train, val
