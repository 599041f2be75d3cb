"""solo-learn's configuration: defaults, and every check that can be made before training starts.

The format is that of solo-learn's main branch. What main leaves to an assertion deep inside is one sentence here.
"""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plugins.spec import large_views
from plugins.tools.command import UserError, say
from solo_ext.checkpoint import identity
from solo_ext.compat.common import METHOD_DEFAULTS, complete
from solo_ext.compat.optim import OPTIMIZERS
from solo_ext.data import DOWNLOADED, H5Images, hint, split_path
from solo_ext.launch import refused
from solo_ext.transforms import CLASSES, DATASETS, complete_views

_SHARED_DEFAULTS: dict[str, Any] = {
    "name": "run",
    "seed": 5,
    "devices": 1,
    "num_nodes": 1,
    "accelerator": "auto",
    "strategy": "auto",
    "precision": 32,
    "sync_batchnorm": False,
    "resume_from_checkpoint": None,
    "debug_augmentations": False,
    "checkpoint": {
        "enabled": True,
        "dir": "trained_models",
        "frequency": 1,
        "keep_prev": False,
        "version": None,
        "group": None,
    },
    "auto_resume": {"enabled": False, "max_hours": 36},
    "auto_umap": {"enabled": False, "dir": "auto_umap", "frequency": 1},
    "wandb": {"enabled": False, "entity": None, "project": "solo-learn", "offline": False},
    "data": {"val_path": None, "format": "image_folder", "no_labels": False, "fraction": -1, "num_workers": 4},
}
_LINEAR_DEFAULTS: dict[str, Any] = {
    "finetune": False,
    "normalized_classifier": False,
    "check_val_every_n_epoch": 1,
    "auto_augment": False,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
}
_WORDS = ("name", "checkpoint.dir", "checkpoint.version", "checkpoint.group", "resume_from_checkpoint")
_WHOLE = {
    **{"optimizer.batch_size": 1, "max_epochs": 0, "checkpoint.frequency": 1, "seed": 0, "num_nodes": 1},
    **{"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 1, "data.num_workers": 0},
}
"""Entries that are whole numbers, and the least they can be."""
_LIGHTNING_DECIDES = ("check_val_every_n_epoch", "log_every_n_steps")  # null is Lightning's own value
_NOT_NEGATIVE = (
    *("optimizer.lr", "optimizer.classifier_lr", "optimizer.weight_decay", "optimizer.layer_decay"),
    *("scheduler.warmup_epochs", "scheduler.min_lr", "scheduler.warmup_start_lr", "auto_resume.max_hours"),
    *("mixup", "cutmix", "label_smoothing"),
)
"""Entries that are numbers, at least 0."""
_FORMATS = ("image_folder", "dali", "h5")
_SCHEDULERS = ("warmup_cosine", "step", "none")
_REQUIRED = ("backbone.name", "data.dataset", "data.train_path", "max_epochs")
_REQUIRED_OPTIMIZER = ("optimizer.name", "optimizer.batch_size", "optimizer.lr", "optimizer.weight_decay")


def parse_pretrain(cfg: DictConfig) -> DictConfig:
    """Complete and check the configuration of a pre-training.

    ``lr`` and ``classifier_lr`` come out multiplied by (batch size x devices x nodes) / 256, as solo-learn does.

    Raises:
        UserError: something is missing or wrong.
    """
    cfg = complete(_shared(cfg, METHOD_DEFAULTS))
    _require(cfg, "method", "augmentations", "optimizer.classifier_lr")
    _whole(cfg, "optimizer.batch_size", least=2)
    cfg.augmentations = complete_views(cfg.augmentations)
    for key in ("base_tau", "final_tau"):
        if not isinstance(cfg.momentum[key], int | float) or not 0 <= cfg.momentum[key] <= 1:
            raise UserError(f"momentum.{key} must be in [0, 1], got {cfg.momentum[key]!r}")
    if cfg.momentum.base_tau > cfg.momentum.final_tau:
        raise UserError("momentum.base_tau must not be above momentum.final_tau")
    if cfg.knn_eval.enabled:
        _whole(cfg, "knn_eval.k", least=1)
        if cfg.knn_eval.distance_func not in ("cosine", "euclidean"):
            raise UserError(f"knn_eval.distance_func must be cosine or euclidean, got {cfg.knn_eval.distance_func!r}")
    cfg.data.num_large_crops, cfg.data.num_small_crops = large_and_small(cfg.augmentations)
    if cfg.data.val_path is None or cfg.data.no_labels:
        cfg.knn_eval.enabled = False  # nobody would ask for its answer
    cfg.identity = identity(cfg)
    scale = _batch_scale(cfg)
    cfg.optimizer.lr *= scale
    cfg.optimizer.classifier_lr *= scale
    return cfg


def large_and_small(augmentations: Sequence[Any]) -> tuple[int, int]:
    """How many large views and how many small crops the entries of ``augmentations`` make of an image.

    Raises:
        UserError: small crops come before large views.
    """
    sizes = [pipeline.crop_size for pipeline in augmentations for _ in range(pipeline.num_crops)]
    try:
        large = large_views(sizes)
    except ValueError as error:
        raise UserError(f"augmentations: {error}") from None
    return large, len(sizes) - large


def parse_linear(cfg: DictConfig) -> DictConfig:
    """Complete and check the configuration of a linear evaluation or fine-tuning; ``lr`` is scaled as above.

    Raises:
        UserError: something is missing or wrong.
    """
    shared = ("backbone", "optimizer", "accumulate_grad_batches", "scheduler", "performance")
    cfg = _shared(cfg, {**{key: METHOD_DEFAULTS[key] for key in shared}, **_LINEAR_DEFAULTS})
    _require(cfg, "pretrained_feature_extractor", "data.val_path")
    for key in ("max_epochs", "check_val_every_n_epoch"):
        _whole(cfg, key, least=1)
    if cfg.label_smoothing >= 1:
        raise UserError(f"label_smoothing must be below 1, got {cfg.label_smoothing}")
    if (cfg.mixup or cfg.cutmix) and cfg.optimizer.batch_size % 2:
        raise UserError(
            f"mixup and cutmix pair images: optimizer.batch_size must be even, got {cfg.optimizer.batch_size}"
        )
    cfg.identity = identity(cfg)
    cfg.optimizer.lr *= _batch_scale(cfg)
    return cfg


def _shared(cfg: DictConfig, defaults: dict[str, Any]) -> DictConfig:
    OmegaConf.set_struct(cfg, False)
    try:
        cfg = OmegaConf.merge(_SHARED_DEFAULTS, defaults, cfg)
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from None
    if cfg.get("method_kwargs", {}) is None:
        cfg.method_kwargs = {}
    _check_kinds(cfg, {**_SHARED_DEFAULTS, **defaults})
    _none_words_to_none(cfg)
    _words(cfg, *_WORDS)
    _require(cfg, *_REQUIRED, *_REQUIRED_OPTIMIZER)
    for key, least in _WHOLE.items():
        absent = (..., None) if key in _LIGHTNING_DECIDES else (...,)
        if OmegaConf.select(cfg, key, default=...) not in absent:
            _whole(cfg, key, least=least)
    if cfg.seed >= 2**32:
        raise UserError(f"seed must be below 2**32, got {cfg.seed}")
    for key in _NOT_NEGATIVE:
        if OmegaConf.select(cfg, key, default=...) is not ...:
            _not_negative(cfg, key)
    check_data(cfg)
    _check_trainer(cfg)
    _check_optimizer(cfg)
    return cfg


def _check_kinds(cfg: DictConfig, defaults: dict[str, Any], above: str = "") -> None:
    """Refuse a value where a section of entries belongs, and anything but true and false where these do."""
    for key, default in defaults.items():
        value, name = cfg.get(key), above + key
        if isinstance(default, dict):
            if not OmegaConf.is_dict(value):
                raise UserError(f"{name} must be a section with entries of its own, got {value!r}")
            _check_kinds(value, default, f"{name}.")
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, got {value!r}")


def _words(cfg: DictConfig, *keys: str) -> None:
    """Make words of what YAML reads as numbers: a version 3, a name 2024."""
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is None and key not in ("name", "checkpoint.dir"):
            continue
        if not isinstance(value, str | int | float) or isinstance(value, bool) or value == "":
            raise UserError(f"{key} must be a word, got {value!r}")
        if key in ("name", "checkpoint.version") and "/" in str(value):
            raise UserError(f"{key} becomes the name of a file: it cannot hold a slash, got {value!r}")
        OmegaConf.update(cfg, key, str(value))


def _not_negative(cfg: DictConfig, key: str) -> None:
    value = OmegaConf.select(cfg, key)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-5 as a word
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{key} must be a number, at least 0, got {value!r}")
    if isinstance(value, str):
        OmegaConf.update(cfg, key, number)


def _none_words_to_none(cfg: DictConfig) -> None:
    """YAML files of solo-learn write None where YAML has null."""
    for key, value in cfg.items():
        if isinstance(value, DictConfig):
            _none_words_to_none(value)
        elif value == "None":
            cfg[key] = None


def _require(cfg: DictConfig, *keys: str) -> None:
    for key in keys:
        try:
            missing = OmegaConf.select(cfg, key, default=...) is ... or OmegaConf.is_missing(cfg, key)
        except OmegaConfBaseException:
            missing = True
        if missing or OmegaConf.select(cfg, key) in (None, [], ""):
            raise UserError(f"the configuration lacks {key}")


def _whole(cfg: DictConfig, key: str, *, least: int) -> None:
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key} must be a whole number, at least {least}, got {value!r}")


def check_data(cfg: DictConfig) -> None:
    """Complete and check ``data`` and ``dali``.

    Raises:
        UserError: something is missing or wrong.
    """
    data = cfg.data
    if data.dataset not in DATASETS:
        raise UserError(f"unknown data.dataset {data.dataset!r}; choose from {', '.join(sorted(DATASETS))}")
    if data.format not in _FORMATS:
        raise UserError(f"unknown data.format {data.format!r}; choose from {', '.join(_FORMATS)}")
    if data.format != "image_folder" and data.dataset in DOWNLOADED:
        raise UserError(f"data.format={data.format} needs image files, {data.dataset} has none; use image_folder")
    fraction = data.fraction
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not (fraction == -1 or 0 < fraction <= 1):
        raise UserError(f"data.fraction must be above 0 and at most 1, or -1 for all images, got {fraction!r}")
    if data.no_labels and (data.dataset != "custom" or data.format == "h5"):
        raise UserError("data.no_labels is for data.dataset=custom, a folder of images without class folders")
    if data.format == "dali":
        _check_dali(cfg)
    for key, split in (("train_path", "train"), ("val_path", "val")):
        if data[key] is None or data.dataset in DOWNLOADED:
            continue
        if data.format == "h5":
            if not Path(data[key]).is_file():
                raise UserError(f"data.{key} is no file: {data[key]}")
            continue
        data[key] = split_path(data.dataset, str(data[key]), split)
        if not Path(data[key]).is_dir():
            raise UserError(f"data.{key} is no folder: {data[key]}{hint(data.dataset)}")
    data.num_classes = CLASSES.get(data.dataset) or _count_classes(data)


def _count_classes(data: DictConfig) -> int:
    """How many classes custom images have; 1 if none, since solo-learn's classifier needs one."""
    if data.no_labels:
        return 1
    if data.format == "h5":
        return len(H5Images(data.train_path, None).classes)
    return max(1, sum(entry.is_dir() for entry in Path(data.train_path).iterdir()))


def _check_dali(cfg: DictConfig) -> None:
    """Is there a DALI, and can it run where ``dali.device`` says; without one, it runs where the network does."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"data.format=dali needs NVIDIA DALI ({error}); install it with: uv sync --extra dali, "
            "or pip install nvidia-dali-cuda120"
        ) from None
    gpu = torch.cuda.is_available()
    default = "gpu" if gpu and cfg.accelerator in ("auto", "gpu", "cuda") else "cpu"
    given = cfg.get("dali") or {}
    if not hasattr(given, "items"):
        raise UserError(f"dali must have entries, such as device: cpu, got {given!r}")
    given = {"device": default, "encode_indexes_into_labels": False, **given}
    cfg.dali = given
    for key in given:
        if key not in ("device", "encode_indexes_into_labels"):
            raise UserError(f"dali has no entry {key!r}; it knows device, encode_indexes_into_labels")
    if given["device"] not in ("cpu", "gpu"):
        raise UserError(f"dali.device must be cpu or gpu, got {given['device']!r}")
    if given["device"] == "gpu" and not gpu:
        raise UserError("dali.device is gpu, but there is no GPU here; add ++dali.device=cpu")
    if cfg.get("auto_augment"):
        raise UserError("auto_augment is not there in DALI; use data.format=image_folder")


def device_list(given: Any) -> int | list[int]:
    """How many devices, or which: ``devices`` as Lightning would read it; "auto" and -1 are all there are.

    Raises:
        UserError: it is neither a number nor a list.
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


def _check_trainer(cfg: DictConfig) -> None:
    devices = device_list(cfg.devices)
    listed = not isinstance(devices, int)
    if cfg.accelerator == "auto":
        cfg.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if cfg.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("accelerator is gpu, but there is no GPU here; add ++accelerator=cpu to train on the CPU")
    if cfg.accelerator == "cpu":
        # Lightning takes a number of processes here, not a list of indexes
        cfg.devices = len(devices) if listed else devices
        if str(cfg.precision).startswith("16"):
            say("precision 16 needs a GPU: training in 32 bits on the CPU")
            cfg.precision = 32
        cfg.sync_batchnorm = False
    else:
        cfg.devices = list(devices) if listed else devices
    if cfg.strategy is None:
        cfg.strategy = "auto"
    cfg.auto_resume.enabled = bool(cfg.auto_resume.enabled)
    if cfg.resume_from_checkpoint is not None and not Path(cfg.resume_from_checkpoint).is_file():
        raise UserError(f"resume_from_checkpoint is no file: {cfg.resume_from_checkpoint}")


def _check_optimizer(cfg: DictConfig) -> None:
    optimizer = cfg.optimizer
    if optimizer.name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer.name {optimizer.name!r}; choose from {', '.join(OPTIMIZERS)}")
    if cfg.scheduler.name not in _SCHEDULERS:
        raise UserError(f"unknown scheduler.name {cfg.scheduler.name!r}; choose from {', '.join(_SCHEDULERS)}")
    if cfg.scheduler.interval not in ("step", "epoch"):
        raise UserError(f"scheduler.interval must be step or epoch, got {cfg.scheduler.interval!r}")
    if cfg.scheduler.name == "step":
        steps = cfg.scheduler.lr_decay_steps
        if not OmegaConf.is_list(steps) or any(type(step) is not int or step < 0 for step in steps):
            raise UserError(f"scheduler.lr_decay_steps must be a list of epochs, got {steps!r}")
    if optimizer.name in ("sgd", "lars"):
        optimizer.kwargs.setdefault("momentum", 0.9)
    known = set(inspect.signature(OPTIMIZERS[optimizer.name]).parameters) - {"params", "lr", "weight_decay"}
    for key in optimizer.kwargs:
        if key not in known:
            raise UserError(f"optimizer {optimizer.name} has no option {key!r}; it knows {', '.join(sorted(known))}")
    rates = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    with refused("the optimizer"):
        OPTIMIZERS[optimizer.name](
            [torch.zeros(1, requires_grad=True)], **rates, **OmegaConf.to_container(optimizer.kwargs)
        )


def _batch_scale(cfg: DictConfig) -> float:
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    return cfg.optimizer.batch_size * max(devices, 1) * cfg.num_nodes / 256
