"""Read training images with NVIDIA DALI (``data.format: dali``), in the same way for both generations of solo-learn.

This module does not use solo-learn's pipelines, for these reasons:

* solo-learn's pipelines need a GPU: their ``device_id`` is a number, but must be None on a CPU.
* solo-learn uses DALI's order of images, which ignores the seed and restarts when a run is resumed.
* solo-learn resets the iterator at the end of each epoch, after which Lightning skips every second epoch.
* 1.0.2 computes every random step for every image and discards half of the results, and both generations blur with a
  kernel of 23 pixels for every width. On a CPU, DALI is then slower than the ordinary loader.

A new pipeline for each epoch reads the files of that epoch in the order of the ordinary loader. Its seed
depends on (seed of the run, epoch, rank). Building it takes 0.1 s, or 2 s for the 1.28 million files of ImageNet.
Consequences:

* Both formats put the same images into a batch.
* Labels and indexes are always correct, with or without ``dali.encode_indexes_into_labels``.
* On a CPU, a resumed run reads the same pixels as an uninterrupted one, for any ``data.num_workers`` and the same
  number of processes. On a GPU, the order, the labels and the random numbers are reproducible too; the pixels are if
  the GPU's decoder is deterministic.

Each step draws from the same distribution as in solo-learn. The pixels differ from those of the ordinary loader, which
uses Pillow: DALI's contrast is relative to mid-grey, Pillow's to the mean of the image.

The ordinary loader reads validation images, as in solo-learn's main branch.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from omegaconf import DictConfig
from torch.utils.data import Dataset

from plugins.tools.images import check_dali_reads, open_image
from solo_ext.datasets import paths_and_labels
from solo_ext.loaders import EpochSampler, Images
from solo_ext.transforms import LinearCrop, statistics


def _cropped(images: Any, side: int, area: tuple[float, float]) -> Any:
    """Crop each image at random, with a random aspect ratio, and resize the crop to a square."""
    return fn.random_resized_crop(images, size=side, random_area=area, interp_type=types.INTERP_CUBIC)


def _normalized(images: Any, side: int, flip: float, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Flip at random, crop at the centre and normalise: the last step of every view."""
    return fn.crop_mirror_normalize(
        images,
        crop=(side, side),
        mirror=fn.random.coin_flip(probability=flip),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
    )


def _sometimes(prob: float, change: Callable[[Any], Any], images: Any) -> Any:
    """Apply a step to each image with a probability. DALI converts the ``if`` to a branch for each image."""
    if fn.random.coin_flip(probability=prob, dtype=types.BOOL):  # noqa: SIM108  (DALI needs this form)
        result = change(images)
    else:
        result = images
    return result


def _uniform(low: float, high: float) -> Any:
    """Draw a number for each image. DALI does not accept an empty range."""
    return fn.random.uniform(range=[low, high]) if low < high else low


def _jitter(cfg: DictConfig) -> Callable[[Any], Any]:
    """Return the step ``color_jitter``: brightness, contrast, saturation and hue."""

    def jitter(images: Any) -> Any:
        return fn.color_twist(
            images,
            brightness=_uniform(max(1 - cfg.brightness, 0), 1 + cfg.brightness),
            contrast=_uniform(max(1 - cfg.contrast, 0), 1 + cfg.contrast),
            saturation=_uniform(max(1 - cfg.saturation, 0), 1 + cfg.saturation),
            hue=_uniform(-360 * cfg.hue, 360 * cfg.hue),
        )

    return jitter


def _gray(images: Any) -> Any:
    gray = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    return fn.cat(gray, gray, gray, axis=2)


def _blur(images: Any) -> Any:
    return fn.gaussian_blur(images, sigma=_uniform(0.1, 2.0))


def _solarize(images: Any) -> Any:
    dark = images < 128
    return fn.cast(dark * images + (dark ^ True) * (255 - images), dtype=types.UINT8)


class View:
    """An entry of ``augmentations`` in DALI, which maps a batch of images to a batch of crops.

    Args:
        cfg: the complete entry.
        mean, std: mean and standard deviation of each channel, in [0, 1].
    """

    def __init__(self, cfg: DictConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        self.cfg, self.mean, self.std = cfg, mean, std
        steps = [
            (cfg.color_jitter.prob, _jitter(cfg.color_jitter)),
            (cfg.grayscale.prob, _gray),
            (cfg.gaussian_blur.prob, _blur),
            (cfg.solarization.prob, _solarize),
            (cfg.equalization.prob, fn.equalize),
        ]
        # in main's order
        self.steps = [(prob, change) for prob, change in steps if prob]

    def __call__(self, images: Any) -> Any:
        """Add the view to the pipeline that is being defined."""
        side, crop = self.cfg.crop_size, self.cfg.rrc
        if crop.enabled:
            images = _cropped(images, side, (crop.crop_min_scale, crop.crop_max_scale))
        else:
            images = fn.resize(images, resize_shorter=side, interp_type=types.INTERP_CUBIC)
        for prob, change in self.steps:
            images = _sometimes(prob, change, images)
        return _normalized(images, side, self.cfg.horizontal_flip.prob, self.mean, self.std)


def pretrain_views(cfg: DictConfig) -> list[View]:
    """Return the views of ``cfg.augmentations``, each repeated ``num_crops`` times."""
    views: list[View] = []
    for view in cfg.augmentations:
        views += [View(view, *statistics(cfg.data.dataset, view))] * view.num_crops
    return views


def linear_view(crop: LinearCrop) -> Callable[[Any], Any]:
    """Return the training augmentation of a linear evaluation, which maps a batch of images to a batch of crops."""

    def view(images: Any) -> Any:
        images = _cropped(images, crop.side, (crop.min_scale, 1.0))
        return _normalized(images, crop.side, 0.5 if crop.flip else 0.0, crop.mean, crop.std)

    return view


@pipeline_def(enable_conditionals=True)
def _epoch(files: list[str], rows: list[int], views: Sequence[Any], device: str) -> tuple[Any, ...]:
    """Define the pipeline of one epoch: the crops of each file and its index in the dataset."""
    encoded, row = fn.readers.file(files=files, labels=rows, name="Reader")
    images = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", output_type=types.RGB)
    return (*(view(images) for view in views), fn.cast(row, dtype=types.INT64))


class DALILoader:
    """The batches of one process, with the part of a DataLoader's interface that Lightning uses.

    Args:
        sampler: the order of the images; Lightning sets its epoch.
        dataset: a class folder, a flat folder, or a subset of either.
        views: functions of DALI that map a batch of images to a batch of crops.
        cfg: the configuration.
        indexed: whether batches are ``[indexes, [crops], targets]`` or ``[crops of the first view, targets]``.

    Raises:
        UserError: DALI cannot read one of the files; the message names it.
    """

    def __init__(
        self, sampler: EpochSampler, dataset: Dataset, views: Sequence[Any], cfg: DictConfig, *, indexed: bool
    ) -> None:
        self.sampler, self.dataset, self.views, self.cfg, self.indexed = sampler, dataset, views, cfg, indexed
        self.batch_size = cfg.optimizer.batch_size
        files, labels = paths_and_labels(dataset)
        for file in files:
            check_dali_reads(file)
        self.files, self.labels = files, torch.tensor(labels)

    def __len__(self) -> int:
        """Return the number of batches in an epoch, which is that of the ordinary loader."""
        count = len(self.sampler)
        return count // self.batch_size if self.sampler.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the batches of the sampler's epoch.

        Raises:
            UserError: an image cannot be decoded; the message names it.
        """
        rows = [key % len(self.files) for key in self.sampler]
        rows = rows[: len(self) * self.batch_size - self.sampler.seen]
        batches, done = None, 0
        try:
            batches = self._start(rows)
            for (batch,) in batches:
                index = batch["row"].flatten()
                crops = [batch[f"view{number}"] for number in range(len(self.views))]
                yield [index, crops, self.labels[index]] if self.indexed else [crops[0], self.labels[index]]
                done += self.batch_size
        except RuntimeError:
            # DALI's error does not name the image, which is at most a few batches ahead: read these with Pillow, whose
            # error does. (DALI 2.4 may crash instead: after an error, its decoder may still read freed memory.)
            for row in rows[done : done + 4 * self.batch_size]:
                open_image(self.files[row])
            raise
        finally:
            # DALI's objects form reference cycles, so that the memory of old epochs would be freed late
            del batches
            gc.collect()

    def _start(self, rows: list[int]) -> DALIGenericIterator:
        """Build a pipeline that reads these rows in this order."""
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
    """A data module that reads training images with DALI and validation images with the ordinary loader.

    Args:
        train: training images: a class folder, a flat folder, or a subset of either.
        val: validation images, or None.
        cfg: the configuration.
        views: see :class:`DALILoader`.
        indexed: see :class:`DALILoader`.
        drop_last: whether the last, smaller batch of an epoch is dropped.

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
        """Return the batches of this process, in the sampler's order."""
        return DALILoader(sampler, self.train, self.views, self.cfg, indexed=self.indexed)
