"""The data modules of pre-training and linear evaluation.

``data.format`` selects the reader: :mod:`solo_ext.loaders` reads ``image_folder`` and ``h5``, :mod:`solo_ext.dali`
reads ``dali``.
"""

from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from plugins.tools.bad_images import BadImages
from plugins.tools.command import UserError, print_on_rank_zero
from solo_ext.datasets import check_same_classes, image_dataset, paths_and_labels
from solo_ext.loaders import Images, process_count
from solo_ext.transforms import (
    evaluation_of_pretraining,
    evaluation_transform,
    has_masks,
    linear_crop,
    linear_transform,
    pretrain_transform,
    remove_background,
)


def pretrain_images(cfg: DictConfig) -> Images:
    """Build the data module of a pre-training.

    There are no validation images if ``data.val_path`` is null or ``data.no_labels`` is set.

    Args:
        cfg: the validated configuration.

    Returns:
        A data module with batches ``[indexes, [views], targets]`` for training and ``[images, targets]`` for
        validation. A resumed run sets its ``start_epoch`` and ``start_batch``.

    Raises:
        UserError: images or masks are missing, or there are too few.
    """
    transform = pretrain_transform(cfg)
    if cfg.debug_augmentations:
        print_on_rank_zero(f"views:\n{transform}")
    dali, bad, evaluation = cfg.data.format == "dali", _record(cfg), evaluation_of_pretraining(cfg)
    train, val = _train_and_val(cfg, "pretrain", None if dali else transform, evaluation, indexed=not dali, bad=bad)
    _check_masks(cfg, train)
    if not dali:
        return Images(train, val, cfg, drop_last=_drops_last(cfg, len(train)), bad=bad)
    from solo_ext.dali import DALIImages, pretrain_views

    return DALIImages(train, val, cfg, pretrain_views(cfg), indexed=True, drop_last=True)


def evaluated_images(cfg: DictConfig) -> tuple[Dataset, Dataset | None]:
    """Open the training and the validation images of a pre-training, both with the transform of the evaluation.

    Args:
        cfg: the validated configuration.

    Returns:
        Datasets of (image, label); the second is None if there are no validation images.

    Raises:
        UserError: images are missing.
    """
    transform = evaluation_of_pretraining(cfg)
    return _train_and_val(cfg, "pretrain", transform, transform, indexed=False, bad=None)


def _drops_last(cfg: DictConfig, images: int) -> bool:
    """Return ``data.drop_last``.

    Raises:
        UserError: the last batch has one image, of which neither a batch norm nor most losses can be trained.
    """
    drops = cfg.data.get("drop_last", True)
    if not drops and _leaves_one_image(cfg, images):
        raise UserError(
            f"the last batch of an epoch has a single image: {images} images in batches of "
            f"{cfg.optimizer.batch_size}; set another batch size"
        )
    return drops


def _record(cfg: DictConfig) -> BadImages | None:
    """Return the record of images that cannot be decoded, without its folder; None if such an image is an error."""
    return BadImages() if cfg.data.get("skip_bad_images") else None


def _check_masks(cfg: DictConfig, train: Any) -> None:
    """Check that each training image has a mask in each folder of masks."""
    steps = {view.masks.folder: remove_background(cfg, view) for view in cfg.augmentations if has_masks(view)}
    for step in filter(None, steps.values()):
        step.check(paths_and_labels(train.dataset)[0])  # without the wrapper that adds the indexes


def linear_images(cfg: DictConfig) -> Images:
    """Build the data module of a linear evaluation or fine-tuning.

    Args:
        cfg: the validated configuration.

    Returns:
        A data module with batches ``[images, targets]``. A resumed run sets its ``start_epoch`` and ``start_batch``.

    Raises:
        UserError: images are missing.
    """
    data = cfg.data
    crop = linear_crop(data.dataset, cfg)
    evaluation = evaluation_transform(data.dataset, crop.side, data.get("augmentations"))
    dali, bad = data.format == "dali", _record(cfg)
    transform = None if dali else linear_transform(data.dataset, cfg)
    train, val = _train_and_val(cfg, "train", transform, evaluation, indexed=False, bad=bad)
    # mixup pairs the images of a batch, so that every batch must have an even number of images
    drop_last = cfg.get("mixup", 0) > 0 or cfg.get("cutmix", 0) > 0 or _ends_in_one_image(cfg, len(train))
    if not dali:
        return Images(train, val, cfg, drop_last=drop_last, bad=bad)
    from solo_ext.dali import DALIImages, linear_view

    return DALIImages(train, val, cfg, [linear_view(crop)], indexed=False, drop_last=drop_last)


def _ends_in_one_image(cfg: DictConfig, images: int) -> bool:
    """Return whether batch norm is trained and the last batch of an epoch is a single image, which has no variance.

    Raises:
        UserError: every batch has one image.
    """
    if not (cfg.finetune or cfg.normalized_classifier):
        return False
    if cfg.optimizer.batch_size == 1:
        raise UserError(
            "finetune and normalized_classifier train batch norm, which needs optimizer.batch_size above 1, got 1"
        )
    return _leaves_one_image(cfg, images)


def _leaves_one_image(cfg: DictConfig, images: int) -> bool:
    """Return whether the last batch of an epoch of each process is a single image."""
    return -(-images // process_count(cfg)) % cfg.optimizer.batch_size == 1


def _train_and_val(
    cfg: DictConfig, split: str, transform: Any, evaluation: Any, *, indexed: bool, bad: BadImages | None
) -> tuple[Dataset, Dataset | None]:
    data = cfg.data
    options = {"indexed": indexed, "no_labels": data.no_labels, "fraction": data.fraction, "data_format": data.format}
    options["bad"] = bad
    train, val = image_dataset(data.dataset, data.train_path, split, transform, **options), None
    if data.val_path is not None and not data.no_labels:
        options = {"indexed": False, "no_labels": False, "data_format": data.format, "bad": bad}
        val = image_dataset(data.dataset, data.val_path, "val", evaluation, **options)
    check_same_classes(train, val)
    return train, val
