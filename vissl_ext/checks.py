"""Every check of a configuration that can be made before anything is started.

What VISSL leaves to an assertion deep inside a rank, or does not notice at all, is one sentence here.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from plugins.tools.command import UserError, nearest
from vissl_ext.catalog import class_count
from vissl_ext.compose import defaults
from vissl_ext.labels import uses_class_labels
from vissl_ext.parts import check_heads, check_layers, check_schedules, check_transforms, known, meant

_OPTIONAL = {
    "cross_entropy_multiple_output_single_target": {"label_smoothing"},
    "nce_loss_with_memory": {"ignore_index"},
    "dino_loss": {"num_crops"},
}
"""Keys that a stock loss reads and VISSL's defaults.yaml does not have."""
_LEAST = {
    "OPTIMIZER.num_epochs": (1, True),
    "DATA.TRAIN.BATCHSIZE_PER_REPLICA": (1, True),
    "DISTRIBUTED.NUM_PROC_PER_NODE": (1, True),
    "SEED_VALUE": (0, False),
    "DATA.NUM_DATALOADER_WORKERS": (0, False),
}
"""Number → its least value, and whether it must be a whole number."""
_LARC = ("clip", "eps", "trust_coefficient", "exclude_bias_and_norm")
_MISPLACED = {"ignore_index"}
"""Keys directly below LOSS in stock files (pretrain/rotnet/rotnet_8gpu_resnet), where VISSL does not look for them."""


def check_sections(cfg: DictConfig) -> None:
    """Look for sections and lists that are none, or gone, and for misspelt keys.

    Args:
        cfg: the composed configuration, with ``config`` on top.

    Raises:
        UserError: there is one.
    """
    _sections("config", _plain(cfg.config), _plain(defaults().config))
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{missing[0]} is ??? in the configuration: give it a value, {missing[0]}=VALUE")
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if type(cfg.node_id) is not int:
        raise UserError(f"node_id must be a whole number, got {cfg.node_id!r}")


def _sections(above: str, given: dict[str, Any], default: dict[str, Any]) -> None:
    for key in given:
        near = None if key in default else nearest(key, default, cutoff=0.8)
        if near:
            raise UserError(f"VISSL does not read {above}.{key}; did you mean {near}?")
    for key, value in default.items():
        if key not in given:
            if above != "config.LOSS":
                usual = "it must be a section" if isinstance(value, dict) else f"VISSL's default is {value}"
                raise UserError(f"{above}.{key} is missing; {usual}")
        elif isinstance(value, dict):
            if not isinstance(given[key], dict):
                raise UserError(f"{above}.{key} must be a section with entries of its own, got {given[key]!r}")
            if above != "config.LOSS":  # its sections are checked with the loss
                _sections(f"{above}.{key}", given[key], value)
        elif isinstance(value, list) and not isinstance(given[key], list):
            raise UserError(f"{above}.{key} must be a list, got {given[key]!r}")


def check(cfg: DictConfig, given: dict[str, Any]) -> None:
    """Look for names that nothing is registered under, values of another kind, and keys that a loss does not read.

    Args:
        cfg: the composed configuration, with ``config`` on top.
        given: keys, below ``config``, that the command line names, and their values.

    Raises:
        UserError: there is one.
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
    _kinds(given)
    known("engine_name", cfg.engine_name, _ENGINE_REGISTRY)
    names = {
        "MACHINE.DEVICE": ("cpu", "gpu"),
        "MODEL.BASE_MODEL_NAME": MODEL_REGISTRY,
        "MODEL.TRUNK.NAME": MODEL_TRUNKS_REGISTRY,
        "OPTIMIZER.name": OPTIMIZER_REGISTRY,
        "TRAINER.TRAIN_STEP_NAME": TRAIN_STEP_REGISTRY,
        **{f"DATA.{split}.COLLATE_FUNCTION": {"default_collate", *COLLATOR_REGISTRY} for split in ("TRAIN", "TEST")},
    }
    for key, allowed in names.items():
        known(f"config.{key}", OmegaConf.select(config, key), allowed)
    for key, (least, whole_number) in _LEAST.items():
        value = OmegaConf.select(config, key)
        kinds = int if whole_number else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
            kind = "a whole number, at least" if whole_number else "at least"
            raise UserError(f"config.{key} must be {kind} {least}, got {value!r}")
    for head in _heads(OmegaConf.to_container(config.MODEL.HEAD.PARAMS)):
        known("config.MODEL.HEAD.PARAMS", head, MODEL_HEADS_REGISTRY)
    for meter in (config.METERS.get("name"), *config.METERS.get("names", ())):
        if meter:
            known("config.METERS", meter, METER_REGISTRY)
    _loss(OmegaConf.to_container(config.LOSS))
    for key in given:
        section = key.removeprefix("LOSS.").partition(".")[0]
        if key.startswith("LOSS.") and section not in {"name", config.LOSS.name}:
            raise UserError(f"config.{key} has no effect: config.LOSS.name is {config.LOSS.name}")
    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        for source in data.DATA_SOURCES:
            known(f"config.DATA.{split}.DATA_SOURCES", source, DATASET_SOURCE_MAP)
        if split == "TRAIN" or config.TEST_MODEL:
            check_transforms(f"config.DATA.{split}.TRANSFORMS", _plain(data.TRANSFORMS))
    for key in ("LOG_FREQUENCY", "CHECKPOINT.CHECKPOINT_FREQUENCY"):
        if OmegaConf.select(config, key) == 0:
            raise UserError(f"config.{key} must not be 0; -1 is never")
    if not 0 <= cfg.node_id < config.DISTRIBUTED.NUM_NODES:
        raise UserError(f"node_id must be below config.DISTRIBUTED.NUM_NODES={config.DISTRIBUTED.NUM_NODES}")
    check_schedules(_plain(config.OPTIMIZER.param_schedulers))
    _keys("config.OPTIMIZER.larc_config", config.OPTIMIZER.larc_config, dict.fromkeys(_LARC))
    whole = AttrDict(OmegaConf.to_container(config))
    if cfg.engine_name in ("knn", "extract_features"):
        _check_extraction(cfg.engine_name, config)
    elif cfg.engine_name == "train":
        _check_training(whole)
    check_config(whole, training=cfg.engine_name == "train")
    check_layers(whole.MODEL)
    check_heads(whole.MODEL)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _kinds(given: dict[str, Any]) -> None:
    """Refuse a value of another kind than VISSL's default has."""
    for key, value in given.items():
        default = OmegaConf.select(defaults().config, key)
        numbers = isinstance(default, int | float) and not isinstance(default, bool)
        if numbers and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"config.{key} must be a number, got {value!r}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"config.{key} must be true or false, got {value!r}")


_ENGINES = {
    "SVM": "add engine_name=extract_features, then fit the SVM to the folder of the features: "
    "python -m plugins.tools.linear_eval --features FOLDER --config dissl_transfer",
    "IMG_RETRIEVAL": "instance retrieval is no engine, but VISSL's tools/instance_retrieval_test.py, which needs a GPU",
    "CLUSTERFIT": "add engine_name=extract_features; then run VISSL's tools/cluster_features_and_label.py",
}
"""What a configuration with entries of its own in one of these sections is for."""


def _engine(config: Any) -> str:
    """What to do with a configuration that trains nothing."""
    for section, advice in _ENGINES.items():
        default = _plain(defaults().config[section])
        if any(config[section].get(key) != value for key, value in default.items()):
            return advice
    if config.MODEL.FEATURE_EVAL_SETTINGS.EVAL_TRUNK_AND_HEAD:
        return "add engine_name=extract_features, engine_name=knn, or engine_name=extract_cluster for SwAV's clusters"
    return "add engine_name=extract_features, or engine_name=knn"


def _check_training(config: Any) -> None:
    """Refuse an evaluation that leaves nothing to train, which is what a forgotten engine looks like."""
    settings = config.MODEL.FEATURE_EVAL_SETTINGS
    frozen = [key for key in ("EXTRACT_TRUNK_FEATURES_ONLY", "FREEZE_TRUNK_AND_HEAD") if settings[key]]
    if settings.EVAL_MODE_ON and frozen and not config.TEST_ONLY:
        raise UserError(
            f"config.MODEL.FEATURE_EVAL_SETTINGS.{frozen[0]}=true leaves nothing to train with engine_name=train; "
            f"{_engine(config)}"
        )


def check_outputs(config: DictConfig) -> None:
    """Check that a training has a head, with an output for each class where both are known before the start.

    Args:
        config: VISSL's configuration, below ``config``, with its data completed.

    Raises:
        UserError: there is no head, or there are more classes than outputs.
    """
    if not config.MODEL.HEAD.PARAMS:
        raise UserError(
            "config.MODEL.HEAD.PARAMS is empty: the loss needs a head, such as [[mlp,{dims:[2048,128]}]], or "
            "[[method_head,{in_dim:512}]] for one of our methods"
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
    """Features are those of images as they are, not of views."""
    for split in ("TRAIN", "TEST"):
        if config.DATA[split].COLLATE_FUNCTION != "default_collate":
            raise UserError(
                f"engine_name={engine} reads each image once, config.DATA.{split}.COLLATE_FUNCTION="
                f"{config.DATA[split].COLLATE_FUNCTION} makes views; begin with config=benchmark/nearest_neighbor/... "
                "or config=feature_extraction/..."
            )
    if engine == "knn":
        if not config.TEST_MODEL:
            raise UserError("engine_name=knn classifies the test images: set config.TEST_MODEL=true")
        if config.NEAREST_NEIGHBOR.TOPK < 1 or config.NEAREST_NEIGHBOR.SIGMA <= 0:
            raise UserError("config.NEAREST_NEIGHBOR.TOPK must be at least 1, and SIGMA above 0")


def _heads(params: list[Any]) -> Iterable[Any]:
    """The names in MODEL.HEAD.PARAMS, where a head is [name, options] or a list of such."""
    for head in params:
        if isinstance(head, list) and head and isinstance(head[0], list):
            yield from _heads(head)
        elif isinstance(head, list) and head:
            yield head[0]
        else:
            raise UserError(f"config.MODEL.HEAD.PARAMS must be a list of [NAME, {{OPTIONS}}], got {head!r} in it")


@cache
def _stock() -> dict[str, Any]:
    return OmegaConf.to_container(defaults().config.LOSS)


def _loss(losses: dict[str, Any]) -> None:
    import torch.nn.modules.loss as torch_losses
    from classy_vision.losses import LOSS_REGISTRY

    of_torch = {name for name in dir(torch_losses) if name.endswith("Loss") and not name.startswith("_")}
    name, names = losses.get("name"), {*LOSS_REGISTRY, *of_torch}
    if name not in names:
        raise UserError(
            f"config.LOSS.name: {name!r} is unknown{meant(name, names)}; known are {', '.join(sorted(LOSS_REGISTRY))} "
            "and the losses of torch.nn"
        )
    for section in losses:
        if section not in {"name", *_MISPLACED}:
            known("config.LOSS", section, {*_stock(), *names})
    if not isinstance(losses.get(name), dict):
        raise UserError(f"config.LOSS names {name}, but has no section {name} with its options")
    kind = LOSS_REGISTRY.get(name)
    if kind is not None and hasattr(kind, "check_config"):
        try:
            kind.check_config(dict(losses[name]))
        except ValueError as error:
            raise UserError(f"config.LOSS.{name}: {error}") from None
    elif kind is None:
        options = set(inspect.signature(getattr(torch_losses, name)).parameters)
        _keys(f"config.LOSS.{name}", losses[name], {option: None for option in options})
    elif name in _stock():
        optional = dict.fromkeys(_OPTIONAL.get(name, ()))
        _keys(f"config.LOSS.{name}", losses[name], {**_stock()[name], **optional})


def _keys(above: str, given: Mapping[str, Any], allowed: dict[str, Any]) -> None:
    for key, value in given.items():
        if key == "name":
            continue
        if key not in allowed:
            raise UserError(f"{above} has no key {key!r}{meant(key, allowed)}; it knows {', '.join(sorted(allowed))}")
        if isinstance(allowed[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"{above}.{key} must have entries, such as {', '.join(allowed[key])}, got {value!r}")
            _keys(f"{above}.{key}", value, allowed[key])
