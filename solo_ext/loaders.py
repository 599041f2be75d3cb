"""Data loaders with a reproducible order and reproducible augmentations.

The images of a batch and their augmentations depend only on (seed, epoch, index), and not on the number of workers or
on interruptions. A resumed run therefore reads the same batches as an uninterrupted one.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from plugins.tools.bad_images import BadImages, decoded_batch
from plugins.tools.command import UserError
from solo_ext.compat import pl


class EpochSampler(DistributedSampler):
    """Sampler with an order that depends only on (seed, epoch).

    It yields epoch·n + index, from which the dataset reads the epoch.
    """

    _start = 0, 0  # an epoch, and the number of its images that a resumed run has seen

    def start(self, epoch: int, seen: int = 0) -> None:
        """Set the first epoch of a resumed run, and the number of its images that are left out.

        The length of the sampler does not change, because a trainer counts the batches from the epoch's start.
        """
        self._start = epoch, seen
        self.set_epoch(epoch)

    @property
    def seen(self) -> int:
        """Number of images at the start of the present epoch that are left out."""
        return self._start[1] if self.epoch == self._start[0] else 0

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)
        return (self.epoch * size + index for index in islice(super().__iter__(), self.seen, None))


class EpochSeeded(Dataset):
    """Dataset that seeds the augmentation of each image with (seed, epoch, index).

    Args:
        dataset: the dataset of images; its random numbers are those of torch, NumPy and Python.
        seed: the seed of the run.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> Any:
        epoch, index = divmod(key, len(self.dataset))
        seed = hash((self.seed, epoch, index)) & 0x7FFFFFFFFFFFFFFF
        # torch.manual_seed would also initialise every GPU
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        return self.dataset[index]


class Images(pl.LightningDataModule):
    """Training and validation images of a run.

    The loaders are built when Lightning requests them, since the number of processes is unknown before.

    Args:
        train: training images.
        val: validation images, or None.
        cfg: the configuration.
        drop_last: whether the last, smaller batch of an epoch is dropped.
        bad: the record of images that cannot be decoded, which both data sets have; None if such an image is an error.

    Raises:
        UserError: there are fewer training images than one batch.
    """

    def __init__(
        self, train: Dataset, val: Dataset | None, cfg: DictConfig, *, drop_last: bool, bad: BadImages | None = None
    ) -> None:
        super().__init__()
        self.train, self.val, self.cfg, self.drop_last, self.bad = train, val, cfg, drop_last, bad
        self.start_epoch = 0
        """The first epoch of a resumed run; the loader reads images before Lightning sets the epoch."""
        self.start_batch = 0
        """Number of batches of that epoch on which each process has been trained, and which are left out."""
        batch = cfg.optimizer.batch_size * process_count(cfg)
        if drop_last and len(train) < batch:
            raise UserError(
                f"{cfg.data.train_path} contains {len(train)} images, fewer than one batch of {batch}; "
                "set a smaller optimizer.batch_size"
            )

    def train_dataloader(self) -> Any:
        """Return the training batches of this process, in a reproducible order."""
        world, rank = processes()
        sampler = EpochSampler(self.train, world, rank, shuffle=True, seed=self.cfg.seed, drop_last=self.drop_last)
        sampler.start(self.start_epoch, self.start_batch * self.cfg.optimizer.batch_size)
        return self.loader(sampler)

    def loader(self, sampler: EpochSampler) -> Any:
        """Return the batches of this process, in the sampler's order."""
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
        """Return the validation batches of this process, in order."""
        if self.val is None:
            return []
        world, rank = processes()
        mine = self.val if world == 1 else Subset(self.val, range(rank, len(self.val), world))
        return evaluation_loader(mine, self.cfg.optimizer.batch_size, self.cfg.data.num_workers)


def finish_bad_images(images: Images, trainer: Any) -> dict[str, int]:
    """Print and list the images that could not be decoded, when training has ended.

    Args:
        images: the data module.
        trainer: Lightning's Trainer; all processes must call this function.

    Returns:
        The entry ``bad_images`` of the run's summary; an empty dictionary without ``data.skip_bad_images``.
    """
    if images.bad is None:
        return {}
    trainer.strategy.barrier()  # until the last process has read its last image
    return {"bad_images": images.bad.finish()} if trainer.is_global_zero else {}


def process_count(cfg: DictConfig) -> int:
    """Return the number of processes of the run; ``devices`` must be validated."""
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    return devices * cfg.get("num_nodes", 1)


def processes() -> tuple[int, int]:
    """Return the number of processes and the rank of this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def evaluation_loader(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Return a loader without shuffling that keeps the last, smaller batch, without the images that are left out."""
    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": decoded_batch}
    return DataLoader(dataset, batch_size=batch_size, **options)
