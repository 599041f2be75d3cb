"""The training set as a whole: its size, and passes over each of its images, for methods with memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from plugins.tools.bad_images import BadImages
from plugins.tools.command import UserError
from plugins.tools.feed import WholeSet
from solo_ext.datasets import image_dataset
from solo_ext.loaders import EpochSeeded
from solo_ext.transforms import evaluation_of_pretraining, pretrain_transform


def training_set_size(trainer: Any) -> int:
    """Return the number of training images, which may differ from the number of images in an epoch.

    Args:
        trainer: Lightning's Trainer, with the data module of solo_ext or the loader of a script of solo-learn.
    """
    images = getattr(getattr(trainer, "datamodule", None), "train", None)
    return len(trainer.train_dataloader.dataset if images is None else images)


class WholeTrainingSet:
    """The :class:`plugins.clock.Feed` of a run of solo-learn.

    The views are those of the configuration, drawn from (seed, epoch, image), also if DALI makes those of the training.
    Evaluation views are those of the online evaluation.

    Args:
        trainer: Lightning's Trainer.
        encode: views → their features.
        network: the modules behind ``encode``.

    Raises:
        UserError: (when called) the run is one of solo-learn's own scripts, which cannot read all images once.
    """

    def __init__(
        self, trainer: Any, encode: Callable[[list[Tensor]], list[Tensor]], network: Sequence[nn.Module]
    ) -> None:
        self.trainer, self.encode, self.network = trainer, encode, network

    def __call__(self, *, view: str = "eval", mode: str = "eval") -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield the positions of b images in the training set, ``[b]``, and the features ``[b, F]`` of each view."""
        cfg = getattr(getattr(self.trainer, "datamodule", None), "cfg", None)
        if cfg is None:
            raise UserError(
                "the method reads the whole training set at the start of an epoch, but solo-learn's own script cannot; "
                "start it with python -m solo_ext.main_pretrain"
            )
        bad = getattr(self.trainer.datamodule, "bad", None)
        epoch, device = self.trainer.current_epoch, self.trainer.strategy.root_device
        feed = WholeSet(
            {
                "train": lambda: _Epoch(_images(cfg, pretrain_transform(cfg), bad), cfg, epoch),
                "eval": lambda: _images(cfg, evaluation_of_pretraining(cfg), bad),
            },
            lambda item: item[0][: cfg.data.num_large_crops] if view == "train" else [item[0]],
            self.encode,
            self.network,
            batch_size=cfg.optimizer.batch_size,
            workers=cfg.data.num_workers,
            device=device,
            seed=epoch,
        )
        return feed(view=view, mode=mode)


class _Epoch(EpochSeeded):
    """The images with the augmentations that they have in one epoch."""

    def __init__(self, dataset: Dataset, cfg: DictConfig, epoch: int) -> None:
        super().__init__(dataset, cfg.seed)
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(self.epoch * len(self.dataset) + index)


def _images(cfg: DictConfig, transform: Any, bad: BadImages | None) -> Dataset:
    data = cfg.data
    form = "image_folder" if data.format == "dali" else data.format
    options = {"no_labels": data.no_labels, "fraction": data.fraction, "data_format": form, "bad": bad}
    return image_dataset(data.dataset, data.train_path, "pretrain", transform, indexed=False, **options)
