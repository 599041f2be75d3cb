"""Validate a configuration before the run starts.

VISSL ignores some of these errors, and for others ends with a failed assertion in the processes of the run.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from plugins.tools.command import UserError, nearest
from vissl_ext.catalog import class_count
from vissl_ext.compose import defaults
from vissl_ext.labels import uses_class_labels
from vissl_ext.parts import (
    check_choice,
    check_heads,
    check_layers,
    check_mapping,
    check_schedules,
    check_transforms,
    is_number,
)
from vissl_ext.views import resolutions

_OPTIONAL = {
    "cross_entropy_multiple_output_single_target": {"label_smoothing"},
    "nce_loss_with_memory": {"ignore_index"},
    "dino_loss": {"num_crops"},
}
"""Options of stock losses that are missing in VISSL's defaults.yaml."""
_MINIMUM: dict[str, tuple[int, type | UnionType]] = {
    "OPTIMIZER.num_epochs": (1, int),
    "DATA.TRAIN.BATCHSIZE_PER_REPLICA": (1, int),
    "DISTRIBUTED.NUM_PROC_PER_NODE": (1, int),
    "SEED_VALUE": (0, int | float),
    "DATA.NUM_DATALOADER_WORKERS": (0, int | float),
}
"""Key → its smallest value and its type."""
EXTRACTING = ("extract_features", "knn", "svm", "svm_low_shot", "cluster")
"""Engines that extract the features of the images in ``DATA``."""
_LARC = ("clip", "eps", "trust_coefficient", "exclude_bias_and_norm")
_MISPLACED = {"ignore_index"}
"""Keys directly below LOSS in stock files (pretrain/rotnet/rotnet_8gpu_resnet), where VISSL ignores them."""


def check_sections(cfg: DictConfig) -> None:
    """Check that no section or list is missing or of another type, and that no key is misspelt.

    Args:
        cfg: the composed configuration, with ``config`` as top-level key.

    Raises:
        UserError: there is such an error, or a value is missing.
    """
    _sections("config", _plain(cfg.config), _plain(defaults().config))
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{missing[0]} has no value (???) in the configuration: add {missing[0]}=VALUE")
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if type(cfg.node_id) is not int:
        raise UserError(f"node_id must be an integer, got {cfg.node_id!r}")


def _sections(above: str, given: dict[str, Any], default: dict[str, Any]) -> None:
    from classy_vision.losses import LOSS_REGISTRY

    known = {*default, *(LOSS_REGISTRY if above == "config.LOSS" else ())}
    for key in given:
        near = None if key in known else nearest(key, default, cutoff=0.8)
        if near:
            raise UserError(f"VISSL has no option {above}.{key}; did you mean {near}?")
    for key, value in default.items():
        if key not in given:
            if above != "config.LOSS":
                expected = "it must be a mapping" if isinstance(value, dict) else f"VISSL's default is {value}"
                raise UserError(f"{above}.{key} is missing; {expected}")
        elif isinstance(value, dict):
            check_mapping(f"{above}.{key}", given[key])
            if above != "config.LOSS":  # ``_check_loss`` checks its sections
                _sections(f"{above}.{key}", given[key], value)
        elif isinstance(value, list) and not isinstance(given[key], list):
            raise UserError(f"{above}.{key} must be a list, got {given[key]!r}")


def check(cfg: DictConfig, given: dict[str, Any]) -> None:
    """Check names, types and ranges of values, and the options of the loss.

    Args:
        cfg: the composed configuration, with ``config`` as top-level key.
        given: overrides of the command line, key below ``config`` → value.

    Raises:
        UserError: a value is invalid.
    """
    from classy_vision.meters import METER_REGISTRY
    from classy_vision.optim import OPTIMIZER_REGISTRY
    from vissl.config import AttrDict
    from vissl.data import DATASET_SOURCE_MAP
    from vissl.data.collators import COLLATOR_REGISTRY
    from vissl.engines.engine_registry import _ENGINE_REGISTRY
    from vissl.models import MODEL_REGISTRY
    from vissl.models.heads import MODEL_HEADS_REGISTRY
    from vissl.models.trunks import MODEL_TRUNKS_REGISTRY
    from vissl.trainer.train_steps import TRAIN_STEP_REGISTRY

    from vissl_ext.task import check_config

    config = cfg.config
    _check_types(given)
    skip = config.DATA.get("SKIP_BAD_IMAGES", False)  # VISSL's defaults do not contain it
    if not isinstance(skip, bool):
        raise UserError(f"config.DATA.SKIP_BAD_IMAGES must be true or false, got {skip!r}")
    check_choice("engine_name", cfg.engine_name, _ENGINE_REGISTRY)
    choices = {
        "MACHINE.DEVICE": ("cpu", "gpu"),
        "MODEL.BASE_MODEL_NAME": MODEL_REGISTRY,
        "MODEL.TRUNK.NAME": MODEL_TRUNKS_REGISTRY,
        "OPTIMIZER.name": OPTIMIZER_REGISTRY,
        "TRAINER.TRAIN_STEP_NAME": TRAIN_STEP_REGISTRY,
        **{f"DATA.{split}.COLLATE_FUNCTION": {"default_collate", *COLLATOR_REGISTRY} for split in ("TRAIN", "TEST")},
    }
    for key, allowed in choices.items():
        check_choice(f"config.{key}", OmegaConf.select(config, key), allowed)
    for key, (least, kind) in _MINIMUM.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, kind) or value < least:
            integer = "an integer, " if kind is int else ""
            raise UserError(f"config.{key} must be {integer}at least {least}, got {value!r}")
    for head in _head_names(_plain(config.MODEL.HEAD.PARAMS)):
        check_choice("config.MODEL.HEAD.PARAMS", head, MODEL_HEADS_REGISTRY)
    for meter in (config.METERS.get("name"), *config.METERS.get("names", ())):
        if meter:
            check_choice("config.METERS", meter, METER_REGISTRY)
    _check_loss(_plain(config.LOSS))
    for key in given:
        section = key.removeprefix("LOSS.").partition(".")[0]
        if key.startswith("LOSS.") and section not in {"name", config.LOSS.name}:
            raise UserError(f"config.{key} has no effect: config.LOSS.name is {config.LOSS.name}")
    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        for source in data.DATA_SOURCES:
            check_choice(f"config.DATA.{split}.DATA_SOURCES", source, DATASET_SOURCE_MAP)
        if split == "TRAIN" or config.TEST_MODEL:
            check_transforms(f"config.DATA.{split}.TRANSFORMS", _plain(data.TRANSFORMS))
    for key in ("LOG_FREQUENCY", "CHECKPOINT.CHECKPOINT_FREQUENCY"):
        if OmegaConf.select(config, key) == 0:
            raise UserError(f"config.{key} must not be 0; -1 turns it off")
    if not 0 <= cfg.node_id < config.DISTRIBUTED.NUM_NODES:
        raise UserError(f"node_id must be below config.DISTRIBUTED.NUM_NODES={config.DISTRIBUTED.NUM_NODES}")
    check_schedules(_plain(config.OPTIMIZER.param_schedulers))
    _check_keys("config.OPTIMIZER.larc_config", config.OPTIMIZER.larc_config, dict.fromkeys(_LARC))
    plain = AttrDict(OmegaConf.to_container(config))
    if cfg.engine_name in EXTRACTING:
        _check_extraction(cfg.engine_name, config)
    elif cfg.engine_name == "train":
        _check_training(plain)
    check_config(plain, training=cfg.engine_name == "train")
    check_layers(plain.MODEL)
    check_heads(plain.MODEL)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _check_types(given: dict[str, Any]) -> None:
    """Check that overrides of numbers are numbers and overrides of booleans are booleans."""
    for key, value in given.items():
        default = OmegaConf.select(defaults().config, key)
        if is_number(default) and not is_number(value):
            raise UserError(f"config.{key} must be a number, got {value!r}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"config.{key} must be true or false, got {value!r}")


_ENGINES = {
    "SVM": "engine_name=svm, or engine_name=svm_low_shot",
    "IMG_RETRIEVAL": "engine_name=retrieval",
    "CLUSTERFIT": "engine_name=cluster",
}
"""Section of a configuration → the engine of a configuration that changes this section."""


def _evaluation_advice(config: Any) -> str:
    """Return what to do with a configuration of an evaluation without training."""
    for section, engine in _ENGINES.items():
        default = _plain(defaults().config[section])
        if any(config[section].get(key) != value for key, value in default.items()):
            return f"add {engine}"
    if config.MODEL.FEATURE_EVAL_SETTINGS.EVAL_TRUNK_AND_HEAD:
        return "add engine_name=extract_features, engine_name=knn, or engine_name=extract_cluster for SwAV's clusters"
    return "add engine_name=extract_features, or engine_name=knn"


def _check_training(config: Any) -> None:
    """Check that an evaluation trains something; otherwise the user has probably forgotten ``engine_name``."""
    settings = config.MODEL.FEATURE_EVAL_SETTINGS
    frozen = [key for key in ("EXTRACT_TRUNK_FEATURES_ONLY", "FREEZE_TRUNK_AND_HEAD") if settings[key]]
    if settings.EVAL_MODE_ON and frozen and not config.TEST_ONLY:
        raise UserError(
            f"config.MODEL.FEATURE_EVAL_SETTINGS.{frozen[0]}=true leaves nothing to train with engine_name=train; "
            f"{_evaluation_advice(config)}"
        )
    if not config.TEST_ONLY:
        _check_view_count(config)


_TWO_VIEWS = {"simclr_info_nce_loss", "barlow_twins_loss", "moco_loss"}
"""Stock losses that pair the first half of a batch with the second, or read two views of each image."""
_CROPS = {"multicrop_simclr_info_nce_loss", "swav_loss", "swav_momentum_loss", "deepclusterv2_loss", "dino_loss"}
"""Stock losses with the option ``num_crops``, which VISSL sets to ``total_num_crops`` of a transform that has it."""


def _check_view_count(config: Any) -> None:
    """Check that the transforms make as many views as a stock loss takes; VISSL would pair unrelated images."""
    name, transforms = config.LOSS.name, config.DATA.TRAIN.TRANSFORMS
    made = sum(count for _, count in resolutions(transforms))
    taken = 2 if name in _TWO_VIEWS else None
    if name in _CROPS and not any("total_num_crops" in transform for transform in transforms):
        taken = config.LOSS[name].get("num_crops")
    if taken is not None and made != taken:
        raise UserError(
            f"{name} takes {taken} views of each image, but config.DATA.TRAIN.TRANSFORMS makes {made}: change "
            "num_times of ImgReplicatePil or num_crops of ImgPilToMultiCrop"
        )


def check_outputs(config: DictConfig) -> None:
    """Check that the model has a head, and that it has an output for each class, if both numbers are known.

    Args:
        config: VISSL's configuration, below ``config``, after ``catalog.complete``.

    Raises:
        UserError: there is no head, or there are more classes than outputs.
    """
    if not config.MODEL.HEAD.PARAMS:
        raise UserError(
            "config.MODEL.HEAD.PARAMS is empty: the loss needs a head, such as [[mlp,{dims:[2048,128]}]], or, for a "
            "method of ssl-plugins, [[method_head,{in_dim:512}]]"
        )
    if not uses_class_labels(str(config.LOSS.name)):
        return
    ends = [head[-1] if isinstance(head[0], list) else head for head in _plain(config.MODEL.HEAD.PARAMS)]
    given = [part[1].get("num_classes") or (part[1].get("dims") or [None])[-1] for part in ends if len(part) > 1]
    widths = [width for width in given if type(width) is int]
    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        if (split == "TRAIN" and config.TEST_ONLY) or (split == "TEST" and not config.TEST_MODEL):
            continue
        count = class_count(data)
        if widths and count > min(widths):
            raise UserError(
                f"config.DATA.{split} has {count} classes, but the head in config.MODEL.HEAD.PARAMS has {min(widths)} "
                f"outputs; it needs at least {count}"
            )


def _check_extraction(engine: str, config: DictConfig) -> None:
    """Check that each image is read once, without views."""
    for split in ("TRAIN", "TEST"):
        if config.DATA[split].COLLATE_FUNCTION != "default_collate":
            raise UserError(
                f"engine_name={engine} requires config.DATA.{split}.COLLATE_FUNCTION=default_collate, got "
                f"{config.DATA[split].COLLATE_FUNCTION}, which creates views: start from a configuration such as "
                "config=benchmark/nearest_neighbor/... or config=feature_extraction/..."
            )
    if engine == "knn":
        if not config.TEST_MODEL:
            raise UserError("engine_name=knn classifies the test images: set config.TEST_MODEL=true")
        if config.NEAREST_NEIGHBOR.TOPK < 1 or config.NEAREST_NEIGHBOR.SIGMA <= 0:
            raise UserError("config.NEAREST_NEIGHBOR.TOPK must be at least 1, and SIGMA above 0")


def check_engine(engine: str, config: DictConfig) -> None:
    """Validate the section of an engine that evaluates features.

    Args:
        engine: name of the engine.
        config: VISSL's configuration, below ``config``, after ``catalog.complete``.

    Raises:
        UserError: a setting is invalid, or data are missing.
    """
    from vissl_ext.clusters import check_clusters
    from vissl_ext.retrieval import check_retrieval
    from vissl_ext.svm import check_svm

    if engine in ("svm", "svm_low_shot"):
        check_svm(engine, config)
    elif engine == "cluster":
        check_clusters(config)
    elif engine == "retrieval":
        check_retrieval(config)


def _head_names(params: list[Any]) -> Iterator[Any]:
    """Yield the names in MODEL.HEAD.PARAMS, whose elements are [name, options] or lists of such pairs."""
    for head in params:
        if isinstance(head, list) and head and isinstance(head[0], list):
            yield from _head_names(head)
        elif isinstance(head, list) and head:
            yield head[0]
        else:
            raise UserError(f"config.MODEL.HEAD.PARAMS must be a list of [NAME, {{OPTIONS}}], got the element {head!r}")


@cache
def _stock_losses() -> dict[str, Any]:
    return OmegaConf.to_container(defaults().config.LOSS)


def _check_loss(losses: dict[str, Any]) -> None:
    import torch.nn.modules.loss as torch_losses
    from classy_vision.losses import LOSS_REGISTRY

    of_torch = {name for name in dir(torch_losses) if name.endswith("Loss") and not name.startswith("_")}
    name = losses.get("name")
    check_choice("config.LOSS.name", name, LOSS_REGISTRY, of_torch, "the losses of torch.nn")
    for section in losses:
        if section not in {"name", *_MISPLACED}:
            check_choice("config.LOSS", section, {*_stock_losses(), *LOSS_REGISTRY}, of_torch, "the losses of torch.nn")
    if not isinstance(losses.get(name), dict):
        raise UserError(f"config.LOSS.name is {name}, but there is no section config.LOSS.{name} with its options")
    kind = LOSS_REGISTRY.get(name)
    if kind is not None and hasattr(kind, "check_config"):
        try:
            kind.check_config(dict(losses[name]))
        except ValueError as error:
            raise UserError(f"config.LOSS.{name}: {error}") from None
    elif kind is None:
        options = inspect.signature(getattr(torch_losses, name)).parameters
        _check_keys(f"config.LOSS.{name}", losses[name], dict.fromkeys(options))
    elif name in _stock_losses():
        optional = dict.fromkeys(_OPTIONAL.get(name, ()))
        _check_keys(f"config.LOSS.{name}", losses[name], {**_stock_losses()[name], **optional})


def _check_keys(above: str, given: Mapping[str, Any], allowed: dict[str, Any]) -> None:
    for key, value in given.items():
        if key == "name":
            continue
        check_choice(above, key, allowed)
        if isinstance(allowed[key], dict):
            check_mapping(f"{above}.{key}", value)
            _check_keys(f"{above}.{key}", value, allowed[key])
