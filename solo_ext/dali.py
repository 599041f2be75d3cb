"""Training images through NVIDIA DALI (``data.format: dali``), the same for both generations of solo-learn.

DALI does the work; the few lines that tell it what to do are ours and not the host's, for these reasons:

* the host's pipelines need a GPU: ``device_id`` is a number in them, which on a CPU must be None;
* the host's order of images is DALI's, which no seed changes, and starts anew when a run is resumed;
* the host's iterator is reset at each epoch's end, after which Lightning skipped every second epoch;
* 1.0.2 computes every random step for every image and then throws half of them away; both blur with a kernel of 23
  pixels whatever the width of the blur. On a CPU that makes DALI slower than the ordinary loader.

So each epoch gets a pipeline of its own, which reads just the files of that epoch, in the order in which the ordinary
loader takes them, and draws from a seed made of (run's seed, epoch, process). Building one takes a tenth of a second,
2 s for the 1.28 million files of ImageNet. What follows: the same images make a batch with either format; labels and
indexes are always right, so that ``dali.encode_indexes_into_labels`` has nothing to add; and a resumed run on the CPU
sees the very bytes that an uninterrupted one sees, with any ``data.num_workers``, as long as it has as many processes.
On a GPU order, labels and random draws repeat, too, and the pixels as far as the GPU's decoder does.

Each step draws from the same distribution as in the host. The pixels are not those of the ordinary loader, whose images
come from Pillow: DALI's contrast turns about mid-grey, Pillow's about the image's mean.

Validation images are read by the ordinary loader, as in solo-learn's main branch.
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
from solo_ext.datasets import listing
from solo_ext.loaders import EpochSampler, Images
from solo_ext.transforms import LinearCrop, statistics


def _cropped(images: Any, side: int, area: tuple[float, float]) -> Any:
    """A random part of each image, of a random shape, resized to a square."""
    return fn.random_resized_crop(images, size=side, random_area=area, interp_type=types.INTERP_CUBIC)


def _normalized(images: Any, side: int, flip: float, mean: Sequence[float], std: Sequence[float]) -> Any:
    """The last step of every view: flip, crop at the centre, normalise."""
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
    """Change each image with this probability; DALI makes a branch of the ``if``."""
    if fn.random.coin_flip(probability=prob, dtype=types.BOOL):  # noqa: SIM108  (DALI takes no other form)
        result = change(images)
    else:
        result = images
    return result


def _uniform(low: float, high: float) -> Any:
    """A number for each image; DALI refuses an empty range."""
    return fn.random.uniform(range=[low, high]) if low < high else low


def _jitter(cfg: DictConfig) -> Callable[[Any], Any]:
    """Change brightness, contrast, saturation and hue, as ``color_jitter`` says."""

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
    """One entry of ``augmentations`` in DALI: a batch of images → a batch of crops, steps in main's order.

    Args:
        cfg: the entry, complete.
        mean, std: of each channel, in [0, 1].
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
    """All views of ``cfg.augmentations``, each as often as it is wanted."""
    views: list[View] = []
    for view in cfg.augmentations:
        views += [View(view, *statistics(cfg.data.dataset, view))] * view.num_crops
    return views


def linear_view(crop: LinearCrop) -> Callable[[Any], Any]:
    """The training augmentation of a linear evaluation: a batch of images → a batch of crops."""

    def view(images: Any) -> Any:
        images = _cropped(images, crop.side, (crop.min_scale, 1.0))
        return _normalized(images, crop.side, 0.5 if crop.flip else 0.0, crop.mean, crop.std)

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

    Raises:
        UserError: DALI cannot read one of the files; it is named.
    """

    def __init__(
        self, sampler: EpochSampler, dataset: Dataset, views: Sequence[Any], cfg: DictConfig, *, indexed: bool
    ) -> None:
        self.sampler, self.dataset, self.views, self.cfg, self.indexed = sampler, dataset, views, cfg, indexed
        self.batch_size = cfg.optimizer.batch_size
        files, labels = listing(dataset)
        for file in files:
            check_dali_reads(file)
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
