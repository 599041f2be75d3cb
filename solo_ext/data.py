"""Images for solo-learn: its datasets and ours, its augmentations as main's YAML writes them, in a repeatable order.

Which images make a batch, and how each is augmented, depends on (seed, epoch, index) alone: not on the number of
workers, and not on whether the run was interrupted. A resumed run therefore sees what an uninterrupted one sees.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from PIL import ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder

from solo_ext.compat import host_data, pl
from solo_ext.errors import UserError


class DatasetInfo(NamedTuple):
    """What is known about a dataset.

    Args:
        classes: number of classes; None where the folders say.
        mean, std: of each channel, in [0, 1]; None where the augmentation's YAML or ImageNet's values say.
        resize: (side to resize the shorter edge to, side of the centre crop) for evaluation, in pixels; None: as it is.
        flip: whether a mirrored image is still of its class, for the augmentation of a linear evaluation.
    """

    classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resize: tuple[int, int] | None
    flip: bool = True


_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
DATASETS = {
    "cifar10": DatasetInfo(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), None),
    "cifar100": DatasetInfo(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), None),
    "stl10": DatasetInfo(10, (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261), (96, 96)),
    "imagenet100": DatasetInfo(100, *_IMAGENET, (256, 224)),
    "imagenet": DatasetInfo(1000, *_IMAGENET, (256, 224)),
    "custom": DatasetInfo(None, None, None, None),
    "digits": DatasetInfo(10, (0.2692, 0.2715, 0.2712), (0.1796, 0.1785, 0.1798), None, flip=False),
}
CLASSES = {name: info.classes for name, info in DATASETS.items() if info.classes}


def statistics(dataset: str, cfg: Any = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of the dataset or else of ``cfg.mean`` and ``cfg.std``."""
    info = DATASETS[dataset]
    if info.mean is not None and info.std is not None:
        return info.mean, info.std
    given = cfg or {}
    return tuple(given.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(given.get("std", IMAGENET_DEFAULT_STD))


def view_transform(dataset: str, cfg: DictConfig) -> T.Compose:
    """One entry of ``augmentations`` as a transform of a PIL image, in main's order."""
    steps: list[Any] = []
    bicubic = T.InterpolationMode.BICUBIC
    if cfg.rrc.enabled:
        scale = (cfg.rrc.crop_min_scale, cfg.rrc.crop_max_scale)
        steps.append(T.RandomResizedCrop(cfg.crop_size, scale=scale, interpolation=bicubic))
    else:
        steps.append(T.Resize(cfg.crop_size, interpolation=bicubic))
    jitter = cfg.color_jitter
    if jitter.prob:
        strength = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        steps.append(T.RandomApply([T.ColorJitter(*strength)], p=jitter.prob))
    if cfg.grayscale.prob:
        steps.append(T.RandomGrayscale(p=cfg.grayscale.prob))
    if cfg.gaussian_blur.prob:
        steps.append(T.RandomApply([host_data.GaussianBlur()], p=cfg.gaussian_blur.prob))
    if cfg.solarization.prob:
        steps.append(T.RandomApply([host_data.Solarization()], p=cfg.solarization.prob))
    if cfg.equalization.prob:
        steps.append(T.RandomApply([ImageOps.equalize], p=cfg.equalization.prob))
    if cfg.horizontal_flip.prob:
        steps.append(T.RandomHorizontalFlip(p=cfg.horizontal_flip.prob))
    mean, std = statistics(dataset, cfg)
    return T.Compose([*steps, T.ToTensor(), T.Normalize(mean, std)])


def pretrain_transform(cfg: DictConfig) -> host_data.FullTransformPipeline:
    """All views of ``cfg.augmentations``: a PIL image → a list of tensors.

    Raises:
        UserError: an augmentation lacks an entry.
    """
    try:
        views = [
            host_data.NCropAugmentation(view_transform(cfg.data.dataset, view), view.num_crops)
            for view in cfg.augmentations
        ]
    except AttributeError as error:
        raise UserError(f"an entry of augmentations is incomplete: {error}") from None
    return host_data.FullTransformPipeline(views)


def evaluation_transform(dataset: str, crop_size: int = 224, cfg: Any = None) -> T.Compose:
    """The fixed transform of evaluation.

    Args:
        dataset: its name.
        crop_size: for custom data: side of the centre crop, of an image resized to 256/224 of it.
        cfg: for custom data: where ``mean`` and ``std`` stand.
    """
    resize = (round(crop_size * 256 / 224), crop_size) if dataset == "custom" else DATASETS[dataset].resize
    steps: list[Any] = [T.Resize(resize[0]), T.CenterCrop(resize[1])] if resize else []
    return T.Compose([*steps, T.ToTensor(), T.Normalize(*statistics(dataset, cfg))])


def linear_transform(dataset: str, cfg: DictConfig) -> T.Compose:
    """The training transform of a linear evaluation: a random crop, and a flip where the classes bear one.

    ``data.augmentations.crop_size`` (pixels) and ``data.augmentations.crop_min_scale`` (fraction of the area) set it.
    """
    given = cfg.data.get("augmentations") or {}
    sizes = {"cifar10": 32, "cifar100": 32, "stl10": 96, "digits": 16}
    crop = T.RandomResizedCrop(
        given.get("crop_size", sizes.get(dataset, 224)), scale=(given.get("crop_min_scale", 0.08), 1.0)
    )
    flip = [T.RandomHorizontalFlip()] if DATASETS[dataset].flip else []
    return T.Compose([crop, *flip, T.ToTensor(), T.Normalize(*statistics(dataset, given))])


def image_dataset(dataset: str, path: str, split: str, transform: Any, *, indexed: bool, no_labels: bool) -> Dataset:
    """Open a dataset.

    Args:
        dataset: a key of DATASETS.
        path: its folder; CIFAR and STL-10 are downloaded into it where they are missing.
        split: "pretrain", "train" or "val".
        transform: of a PIL image.
        indexed: whether an item starts with its index.
        no_labels: a flat folder of images (custom data); every label is -1.

    Raises:
        UserError: the folder holds no images, or a download fails.
    """
    wrap = host_data.dataset_with_index if indexed else (lambda cls: cls)
    try:
        if dataset in ("cifar10", "cifar100"):
            cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
            return wrap(cls)(path, train=split != "val", download=True, transform=transform)
        if dataset == "stl10":
            part = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
            return wrap(STL10)(path, split=part, download=True, transform=transform)
        if no_labels:
            return wrap(host_data.CustomDatasetWithoutLabels)(path, transform)
        return wrap(ImageFolder)(path, transform)
    except FileNotFoundError as error:
        raise UserError(f"no images of {dataset} in {path}: {str(error).splitlines()[0]}") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"{dataset} is not in {path} and could not be downloaded: {error}") from None


def check_same_classes(train: Dataset, val: Dataset | None) -> None:
    """Refuse class folders that differ: the same number would stand for different classes.

    Raises:
        UserError: it names folders that only one of the two has.
    """
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
        batch = cfg.optimizer.batch_size * (cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices))
        if drop_last and len(train) < batch:
            raise UserError(f"{cfg.data.train_path} holds {len(train)} images, fewer than one batch of {batch}")

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that repeats."""
        world, rank = processes()
        sampler = EpochSampler(self.train, world, rank, shuffle=True, seed=self.cfg.seed, drop_last=self.drop_last)
        sampler.set_epoch(self.start_epoch)
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


def processes() -> tuple[int, int]:
    """How many processes share the images, and which this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """A loader in order, the last batch as small as it comes."""
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)
