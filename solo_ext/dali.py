"""Training images through NVIDIA DALI (``data.format: dali``), for both generations of solo-learn.

The random steps of an augmentation (colour jitter, grey scale, blur, solarisation) are the host's own classes. What
stands around them is ours, for three reasons:

* the host's pipelines need a GPU: ``device_id`` is a number in them, which on a CPU must be None;
* the host's order of images is DALI's, which no seed changes, and starts anew when a run is resumed;
* the host's iterator is reset at each epoch's end, after which Lightning skipped every second epoch.

So each epoch gets a pipeline of its own, which reads just the files of that epoch, in the order in which the ordinary
loader takes them, and draws from a seed made of (run's seed, epoch, process). Building one takes a tenth of a second,
2 s for the 1.28 million files of ImageNet. What follows: the same images make a batch with either format; labels and
indexes are always right; and a resumed run on the CPU sees the very bytes that an uninterrupted one sees, with any
``data.num_workers``, as long as it has as many processes. On a GPU order, labels and random draws repeat, too, and the
pixels do as far as the GPU's decoder does. The augmentations are those of the YAML, but not bit for bit those of the
ordinary loader, whose images come from PIL.

Validation images are read by the ordinary loader, as in solo-learn's main branch.
"""

import gc
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from omegaconf import DictConfig
from torch.utils.data import Dataset

from solo_ext.compat import GENERATION
from solo_ext.data import EpochSampler, Images, listing
from solo_ext.decode import open_image
from solo_ext.transforms import LinearCrop, statistics

host = importlib.import_module("solo.data.dali_dataloader" if GENERATION == "main" else "solo.utils.dali_dataloader")


class View:
    """One entry of ``augmentations`` in DALI: a batch of images → a batch of crops.

    Args:
        cfg: the entry, complete.
        mean, std: of each channel, in [0, 1].
        device: "cpu" or "gpu".
    """

    def __init__(self, cfg: DictConfig, mean: Sequence[float], std: Sequence[float], device: str) -> None:
        self.cfg = cfg
        self.steps: list[Any] = []
        self.statistics = {"mean": [255 * value for value in mean], "std": [255 * value for value in std]}
        jitter = cfg.color_jitter
        if jitter.prob:
            strength = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            self.steps.append(host.RandomColorJitter(*strength, prob=jitter.prob, device=device))
        if cfg.grayscale.prob:
            self.steps.append(host.RandomGrayScaleConversion(prob=cfg.grayscale.prob, device=device))
        if cfg.gaussian_blur.prob:
            self.steps.append(host.RandomGaussianBlur(prob=cfg.gaussian_blur.prob, device=device))
        if cfg.solarization.prob:
            self.steps.append(host.RandomSolarize(prob=cfg.solarization.prob))
        if cfg.equalization.prob:
            self.steps.append(_RandomEqualization(cfg.equalization.prob))

    def __call__(self, images: Any) -> Any:
        """Add the view to the pipeline that is being defined."""
        side, crop = self.cfg.crop_size, self.cfg.rrc
        if crop.enabled:
            area = (crop.crop_min_scale, crop.crop_max_scale)
            images = fn.random_resized_crop(images, size=side, random_area=area, interp_type=types.INTERP_CUBIC)
        else:
            images = fn.resize(images, resize_shorter=side, interp_type=types.INTERP_CUBIC)
        for step in self.steps:
            images = step(images)
        return _normalized(images, side, self.cfg.horizontal_flip.prob, self.statistics)


class _RandomEqualization:
    """The host has none for DALI."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, images: Any) -> Any:
        if fn.random.coin_flip(probability=self.prob, dtype=types.BOOL):
            result = fn.equalize(fn.cast(images, dtype=types.UINT8))
        else:
            result = fn.cast(images, dtype=types.UINT8)
        return result


def _normalized(images: Any, side: int, flip: float, statistics: dict[str, list[float]]) -> Any:
    """The last step of every view: flip, crop at the centre, normalise."""
    return fn.crop_mirror_normalize(
        images,
        crop=(side, side),
        mirror=fn.random.coin_flip(probability=flip),
        dtype=types.FLOAT,
        output_layout="CHW",
        **statistics,
    )


def pretrain_views(cfg: DictConfig) -> list[View]:
    """All views of ``cfg.augmentations``, each as often as it is wanted."""
    views: list[View] = []
    for view in cfg.augmentations:
        views += [View(view, *statistics(cfg.data.dataset, view), cfg.dali.device)] * view.num_crops
    return views


def linear_view(crop: LinearCrop) -> Any:
    """The training augmentation of a linear evaluation: a batch of images → a batch of crops."""
    numbers = {"mean": [255 * value for value in crop.mean], "std": [255 * value for value in crop.std]}

    def view(images: Any) -> Any:
        area = (crop.min_scale, 1.0)
        images = fn.random_resized_crop(images, size=crop.side, random_area=area, interp_type=types.INTERP_CUBIC)
        return _normalized(images, crop.side, 0.5 if crop.flip else 0.0, numbers)

    return view


@pipeline_def(enable_conditionals=True)
def _epoch(files: list[str], rows: list[int], views: Sequence[Any], device: str) -> tuple[Any, ...]:
    """One epoch: the crops of each file, and its row in the dataset."""
    encoded, row = fn.readers.file(files=files, labels=rows, name="Reader")
    images = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB)
    return (*(view(images) for view in views), fn.cast(row, dtype=types.INT64))


class DALILoader:
    """Batches of one process, epoch after epoch; looks to Lightning like a DataLoader.

    Args:
        sampler: the order of the images; Lightning tells it the epoch.
        dataset: a class folder or flat folder, or a subset of one.
        views: each makes of a batch of images a batch of crops, in DALI.
        cfg: the configuration.
        indexed: whether batches are ``[indexes, [crops], targets]``, else ``[crops of the first view, targets]``.
    """

    def __init__(
        self, sampler: EpochSampler, dataset: Dataset, views: Sequence[Any], cfg: DictConfig, *, indexed: bool
    ) -> None:
        self.sampler, self.dataset, self.views, self.cfg, self.indexed = sampler, dataset, views, cfg, indexed
        self.batch_size = cfg.optimizer.batch_size
        files, labels = listing(dataset)
        self.files, self.labels = files, torch.tensor(labels)

    def __len__(self) -> int:
        """Batches in an epoch; as of an ordinary loader."""
        count = len(self.sampler)
        return count // self.batch_size if self.sampler.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        """One epoch, the one that the sampler has been told.

        Raises:
            UserError: an image is broken; it is named.
        """
        rows = [key % len(self.files) for key in self.sampler]
        rows = rows[: len(self) * self.batch_size]
        batches, done = None, 0
        try:
            batches = self._start(rows)
            for (batch,) in batches:
                index = batch["row"].flatten()
                crops = [batch[f"view{number}"] for number in range(len(self.views))]
                yield [index, crops, self.labels[index]] if self.indexed else [crops[0], self.labels[index]]
                done += self.batch_size
        except RuntimeError:
            # DALI does not say which image it cannot read; it is at most a few batches ahead. Nothing helps where DALI
            # 2.4 dies of one: its decoder may leave threads at work behind an error, which then read freed memory
            for row in rows[done : done + 4 * self.batch_size]:
                open_image(self.files[row])
            raise
        finally:
            # DALI's objects refer to each other: without this, memory of old epochs is freed late
            del batches
            gc.collect()

    def _start(self, rows: list[int]) -> DALIGenericIterator:
        """A pipeline over these rows, in this order."""
        device = self.cfg.dali.device
        pipeline = _epoch(
            *([self.files[row] for row in rows], rows, self.views, device),
            batch_size=self.batch_size,
            num_threads=max(self.cfg.data.num_workers, 1),
            device_id=torch.cuda.current_device() if device == "gpu" else None,
            seed=hash((self.cfg.seed, self.sampler.epoch, self.sampler.rank)) & 0x7FFFFFFF,
        )
        names = [*(f"view{number}" for number in range(len(self.views))), "row"]
        return DALIGenericIterator(
            pipeline, names, reader_name="Reader", auto_reset=False, last_batch_policy=LastBatchPolicy.PARTIAL
        )


class DALIImages(Images):
    """Training images through DALI, validation images through the ordinary loader.

    Args:
        train: training images: a class folder or flat folder, or a subset of one.
        val: validation images, or None.
        cfg: the configuration.
        views: as of DALILoader.
        indexed: as of DALILoader.
        drop_last: whether the last, smaller batch of an epoch is left out.

    Raises:
        UserError: there are fewer training images than one batch.
    """

    def __init__(
        self,
        train: Dataset,
        val: Dataset | None,
        cfg: DictConfig,
        views: Sequence[Any],
        *,
        indexed: bool,
        drop_last: bool,
    ) -> None:
        super().__init__(train, val, cfg, drop_last=drop_last)
        self.views, self.indexed = views, indexed

    def loader(self, sampler: EpochSampler) -> DALILoader:
        """The batches of this process, in the sampler's order."""
        return DALILoader(sampler, self.train, self.views, self.cfg, indexed=self.indexed)
