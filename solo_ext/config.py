"""Validate a configuration before training starts.

:mod:`solo_ext.schema` defines the entries; this module checks what depends on files, the machine and other packages.
The format is that of solo-learn's main branch. An invalid configuration raises a UserError that lists all errors.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plugins.install import not_installed
from plugins.spec import large_views
from plugins.tools.command import UserError, did_you_mean, print_on_rank_zero
from solo_ext.checkpoint import find_checkpoint, identity
from solo_ext.compat.common import fill_defaults
from solo_ext.compat.optim import OPTIMIZERS
from solo_ext.datasets import DOWNLOADED, H5Images, preparation_hint, split_path
from solo_ext.launch import as_user_error, trainer_arguments
from solo_ext.loaders import process_count
from solo_ext.schema import FORK_ENTRIES, Linear, Pretrain, Run, join_messages, validate
from solo_ext.transforms import CLASSES, has_masks, is_stack


def parse_pretrain(cfg: DictConfig) -> DictConfig:
    """Complete and validate the configuration of a pre-training.

    ``lr`` and ``classifier_lr`` are multiplied by (batch size × devices × nodes) / 256, as in solo-learn.

    Raises:
        UserError: the configuration is invalid.
    """
    cfg = fill_defaults(_checked(cfg, Pretrain))
    cfg.data.num_large_crops, cfg.data.num_small_crops = large_and_small(cfg.augmentations)
    if cfg.data.val_path is None or cfg.data.no_labels:
        cfg.knn_eval.enabled = False  # there are no labelled validation images
    cfg.identity = identity(cfg)
    scale = _batch_scale(cfg)
    cfg.optimizer.lr *= scale
    cfg.optimizer.classifier_lr *= scale
    return cfg


def large_and_small(augmentations: Sequence[Any]) -> tuple[int, int]:
    """Return the number of large views and of small crops that ``augmentations`` produces of an image, without stacks.

    Raises:
        UserError: small crops come before large views, or stacks of patches before either.
    """
    stacked = [is_stack(pipeline) for pipeline in augmentations]
    if stacked != sorted(stacked):
        raise UserError("augmentations: entries with jigsaw, rotation or grid come after the views, at the end")
    if all(stacked):
        return 0, 0
    sizes = [
        pipeline.crop_size for pipeline in augmentations if not is_stack(pipeline) for _ in range(pipeline.num_crops)
    ]
    try:
        large = large_views(sizes)
    except ValueError as error:
        raise UserError(f"augmentations: {error}") from None
    return large, len(sizes) - large


def count_stacks(augmentations: Sequence[Any]) -> int:
    """Return how many stacks of patches ``augmentations`` makes of an image."""
    return sum(pipeline.num_crops for pipeline in augmentations if is_stack(pipeline))


def parse_linear(cfg: DictConfig) -> DictConfig:
    """Complete and validate the configuration of a linear evaluation; learning rates are scaled as in pre-training.

    Raises:
        UserError: the configuration is invalid.
    """
    cfg = _checked(cfg, Linear)
    if "backbone_lr" in cfg.optimizer and cfg.optimizer.get("layer_decay"):
        raise UserError("optimizer.backbone_lr and optimizer.layer_decay exclude each other; remove one of them")
    cfg.identity = identity(cfg)
    scale = _batch_scale(cfg)
    cfg.optimizer.lr *= scale
    if "backbone_lr" in cfg.optimizer:
        cfg.optimizer.backbone_lr *= scale
    return cfg


def _checked(cfg: DictConfig, model: type[Run]) -> DictConfig:
    """Return the complete configuration. Report all invalid entries at once, then all other errors at once."""
    variables = set(re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(cfg)))
    try:
        given = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        key = f" ({error.full_key})" if error.full_key else ""
        raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}{key}") from None
    _drop_fork_entries(given)
    cfg = OmegaConf.create(validate(model, given, trainer_arguments(), variables))
    errors = []
    for check in (check_data, _check_trainer, _check_optimizer):
        try:
            check(cfg)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError(join_messages(errors))
    return cfg


def _drop_fork_entries(given: Any) -> None:
    """Remove the entries that only a fork of solo-learn reads, in place, with a line for each."""
    method = given.get("method")
    for path, reason in FORK_ENTRIES.get(method if isinstance(method, str) else "", {}).items():
        *parents, key = path
        section = given
        for parent in parents:
            section = section.get(parent) or {}
        if key in section:
            del section[key]
            print_on_rank_zero(f"{'.'.join(path)} is ignored: {reason}")


def check_data(cfg: DictConfig) -> None:
    """Fill in the defaults of ``data`` and ``dali``, and check that the files exist.

    Raises:
        UserError: an entry is invalid or a file is missing.
    """
    data = cfg.data
    if data.format != "image_folder" and data.dataset in DOWNLOADED:
        raise UserError(f"data.format={data.format} needs image files, but {data.dataset} has none; use image_folder")
    if data.no_labels and (data.dataset != "custom" or data.format == "h5"):
        raise UserError("data.no_labels needs data.dataset=custom and a folder of images without class folders")
    if any(has_masks(view) for view in cfg.get("augmentations") or ()):
        _check_masks(data)
    if data.format == "dali":
        _check_dali(cfg)
    for key, split in (("train_path", "train"), ("val_path", "val")):
        if data[key] is None or data.dataset in DOWNLOADED:
            continue
        if data.format == "h5":
            if not Path(data[key]).is_file():
                raise UserError(f"data.{key} is not a file: {data[key]}")
            continue
        data[key] = split_path(data.dataset, str(data[key]), split)
        if not Path(data[key]).is_dir():
            raise UserError(f"data.{key} is not a folder: {data[key]}{preparation_hint(data.dataset)}")
    data.num_classes = CLASSES.get(data.dataset) or _count_classes(data)


def _check_masks(data: DictConfig) -> None:
    """Check that the images are files, because a mask is found by the path of its image, and that Pillow reads them."""
    if data.dataset in DOWNLOADED:
        raise UserError(f"augmentations.masks needs image files, but {data.dataset} has none; remove masks")
    if data.format != "image_folder":
        raise UserError(
            f"augmentations.masks is not available with data.format={data.format}; use data.format=image_folder"
        )


def _count_classes(data: DictConfig) -> int:
    """Return the number of classes of custom images; 1 without labels, since solo-learn's classifier needs a class."""
    if data.no_labels:
        return 1
    if data.format == "h5":
        return len(H5Images(data.train_path, None).classes)
    return max(1, sum(entry.is_dir() for entry in Path(data.train_path).iterdir()))


def _check_dali(cfg: DictConfig) -> None:
    """Check that DALI is installed and can use ``dali.device``; the default is the device of the network."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(f"data.format=dali needs NVIDIA DALI ({error}): {not_installed('nvidia.dali')}") from None
    gpu = torch.cuda.is_available()
    default = "gpu" if gpu and cfg.accelerator in ("auto", "gpu", "cuda") else "cpu"
    cfg.dali = {"device": default, "encode_indexes_into_labels": False, **(cfg.get("dali") or {})}
    if cfg.dali.device == "gpu" and not gpu:
        raise UserError("dali.device is gpu, but this machine has no GPU; add ++dali.device=cpu")
    steps = cfg.get("augmentations") or ()
    if cfg.get("shared_flip") or any(is_stack(view) or view.photometric.prob or view.translate.prob for view in steps):
        raise UserError(
            "jigsaw, rotation, grid, photometric, translate and shared_flip are not available with DALI; "
            "use data.format=image_folder"
        )
    if any(view.get("steps") is not None for view in steps):
        raise UserError("augmentations.steps is not available with data.format=dali; use data.format=image_folder")
    if cfg.get("auto_augment"):
        raise UserError("auto_augment is not available with data.format=dali; use data.format=image_folder")


def device_list(given: Any) -> int | list[int]:
    """Convert ``devices`` to a number or a list of indexes; "auto" and -1 mean all devices.

    Raises:
        UserError: the value is neither a number above 0 nor a list of indexes.
    """
    if given in ("auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1)
    try:
        if isinstance(given, str):
            given = given.split(",") if "," in given else int(given)
        devices = given if isinstance(given, int) else [int(index) for index in given if index != ""]
    except (TypeError, ValueError):
        devices = 0
    if not devices or (isinstance(devices, int) and devices < 1):
        raise UserError(f"devices must be a number above 0 or a list of indexes, got {given!r}")
    return devices


def settle_devices(cfg: DictConfig, devices: int | list[int]) -> None:
    """Set ``accelerator``, ``devices``, ``strategy`` and ``sync_batchnorm`` to values that Lightning accepts here.

    Args:
        cfg: the configuration, changed in place.
        devices: what :func:`device_list` returned.
    """
    if cfg.get("accelerator", "auto") == "auto":
        cfg.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    cfg.devices = devices
    if cfg.accelerator == "cpu":
        # on a CPU, Lightning accepts only a number of processes
        cfg.devices = devices if isinstance(devices, int) else len(devices)
        cfg.sync_batchnorm = False
    if cfg.strategy is None:
        cfg.strategy = "auto"


def _check_trainer(cfg: DictConfig) -> None:
    settle_devices(cfg, device_list(cfg.devices))
    if cfg.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("accelerator is gpu, but this machine has no GPU; add ++accelerator=cpu to train on the CPU")
    if cfg.accelerator == "cpu" and str(cfg.precision).startswith("16"):
        print_on_rank_zero(f"precision={cfg.precision} needs a GPU; training uses precision=32 on the CPU")
        cfg.precision = 32
    if cfg.resume_from_checkpoint is not None:
        try:
            cfg.resume_from_checkpoint = str(find_checkpoint(cfg.resume_from_checkpoint))
        except UserError as error:
            raise UserError(f"resume_from_checkpoint: {error}") from None


def _check_optimizer(cfg: DictConfig) -> None:
    optimizer = cfg.optimizer
    if optimizer.name in ("sgd", "lars"):
        optimizer.kwargs.setdefault("momentum", 0.9)
    known = set(inspect.signature(OPTIMIZERS[optimizer.name]).parameters) - {"params", "lr", "weight_decay"}
    for key in optimizer.kwargs:
        if key not in known:
            raise UserError(
                f"optimizer {optimizer.name} has no option {key!r}; known options: {', '.join(sorted(known))}"
                f"{did_you_mean(key, known)}"
            )
    rates = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    with as_user_error("the optimizer"):
        OPTIMIZERS[optimizer.name](
            [torch.zeros(1, requires_grad=True)], **rates, **OmegaConf.to_container(optimizer.kwargs)
        )


def _batch_scale(cfg: DictConfig) -> float:
    return cfg.optimizer.batch_size * process_count(cfg) / 256
