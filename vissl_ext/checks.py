"""Every check of a configuration that can be made before anything is started.

What VISSL leaves to an assertion deep inside a rank, or does not notice at all, is one sentence here.
"""

import difflib
import inspect
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from plugins.tools.command import UserError

_OPTIONAL = {
    "cross_entropy_multiple_output_single_target": {"label_smoothing"},
    "nce_loss_with_memory": {"ignore_index"},
    "dino_loss": {"num_crops"},
}
"""Keys that a stock loss reads and VISSL's defaults.yaml does not have."""
_WHOLE = ("OPTIMIZER.num_epochs", "DATA.TRAIN.BATCHSIZE_PER_REPLICA", "DISTRIBUTED.NUM_PROC_PER_NODE")
"""Whole numbers above 0."""
_MISPLACED = {"ignore_index"}
"""Keys directly below LOSS in stock files (pretrain/rotnet/rotnet_8gpu_resnet), where VISSL does not look for them."""


def check(cfg: DictConfig, given: dict[str, Any]) -> None:
    """Look for names that nothing is registered under, values of another kind, and keys that a loss does not read.

    Args:
        cfg: the composed configuration, with ``config`` on top.
        given: keys, below ``config``, that the command line names, and their values.

    Raises:
        UserError: there is one.
    """
    from classy_vision.dataset.transforms import TRANSFORM_REGISTRY
    from classy_vision.optim import OPTIMIZER_REGISTRY
    from torchvision import transforms
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
    for key in ("LOSS", "MODEL", "MODEL.TRUNK", "DATA.TRAIN", "DATA.TEST", "OPTIMIZER", "CHECKPOINT"):
        if not OmegaConf.is_dict(OmegaConf.select(config, key)):
            raise UserError(f"config.{key} must be a section with entries of its own")
    _kinds(given)
    _known("config.MACHINE.DEVICE", OmegaConf.select(config, "MACHINE.DEVICE", default="gpu"), ("cpu", "gpu"))
    _known("engine_name", cfg.engine_name, _ENGINE_REGISTRY)
    _known("config.MODEL.BASE_MODEL_NAME", config.MODEL.BASE_MODEL_NAME, MODEL_REGISTRY)
    _known("config.MODEL.TRUNK.NAME", config.MODEL.TRUNK.NAME, MODEL_TRUNKS_REGISTRY)
    for head in _heads(OmegaConf.to_container(config.MODEL.HEAD.PARAMS)):
        _known("config.MODEL.HEAD.PARAMS", head, MODEL_HEADS_REGISTRY)
    _known("config.OPTIMIZER.name", config.OPTIMIZER.name, OPTIMIZER_REGISTRY)
    _known("config.TRAINER.TRAIN_STEP_NAME", config.TRAINER.TRAIN_STEP_NAME, TRAIN_STEP_REGISTRY)
    _loss(OmegaConf.to_container(config.LOSS))
    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        for source in data.DATA_SOURCES:
            _known(f"config.DATA.{split}.DATA_SOURCES", source, DATASET_SOURCE_MAP)
        _known(f"config.DATA.{split}.COLLATE_FUNCTION", data.COLLATE_FUNCTION, {"default_collate", *COLLATOR_REGISTRY})
        for transform in data.TRANSFORMS:
            name = str(transform.get("name"))
            if not any(hasattr(transforms, form) for form in (name, name.title().replace("_", ""))):
                key = f"config.DATA.{split}.TRANSFORMS"
                _known(key, name, TRANSFORM_REGISTRY, transform.get("transform_type") == "augly")
    for key in _WHOLE:
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.{key} must be a whole number, at least 1, got {value!r}")
    for key in ("LOG_FREQUENCY", "CHECKPOINT.CHECKPOINT_FREQUENCY"):
        if OmegaConf.select(config, key) == 0:
            raise UserError(f"config.{key} must not be 0; -1 is never")
    if not 0 <= cfg.node_id < config.DISTRIBUTED.NUM_NODES:
        raise UserError(f"node_id must be below config.DISTRIBUTED.NUM_NODES={config.DISTRIBUTED.NUM_NODES}")
    if cfg.engine_name in ("knn", "extract_features"):
        _check_extraction(cfg.engine_name, config)
    check_config(AttrDict(OmegaConf.to_container(config)), training=cfg.engine_name == "train")


def _kinds(given: dict[str, Any]) -> None:
    """Refuse a value of another kind than VISSL's default has."""
    for key, value in given.items():
        default = OmegaConf.select(_defaults(), key)
        numbers = isinstance(default, int | float) and not isinstance(default, bool)
        if numbers and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"config.{key} must be a number, got {value!r}")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"config.{key} must be true or false, got {value!r}")


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


def _known(key: str, name: Any, names: Iterable[str], trusted: bool = False) -> None:
    names = list(names)
    if trusted or name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1)
    raise UserError(f"{key}: {name!r} is unknown{_meant(near)}; known are {', '.join(sorted(names))}")


def _meant(near: list[str]) -> str:
    return f", did you mean {near[0]!r}?" if near else ""


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
def _defaults() -> DictConfig:
    return OmegaConf.create(yaml.safe_load(files("vissl.config").joinpath("defaults.yaml").read_text())["config"])


@cache
def _stock() -> dict[str, Any]:
    return OmegaConf.to_container(_defaults().LOSS)


def _loss(losses: dict[str, Any]) -> None:
    import torch.nn.modules.loss as torch_losses
    from classy_vision.losses import LOSS_REGISTRY

    of_torch = {name for name in dir(torch_losses) if name.endswith("Loss") and not name.startswith("_")}
    name, known = losses.get("name"), {*LOSS_REGISTRY, *of_torch}
    if name not in known:
        near = difflib.get_close_matches(str(name), sorted(known), n=1)
        raise UserError(
            f"config.LOSS.name: {name!r} is unknown{_meant(near)}; known are {', '.join(sorted(LOSS_REGISTRY))} "
            "and the losses of torch.nn"
        )
    for section in losses:
        if section not in {"name", *_MISPLACED}:
            _known("config.LOSS", section, {*_stock(), *known})
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


def _keys(above: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    for key, value in given.items():
        if key == "name":
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{above} has no key {key!r}{_meant(near)}; it knows {', '.join(sorted(known))}")
        if isinstance(known[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"{above}.{key} must have entries, such as {', '.join(known[key])}, got {value!r}")
            _keys(f"{above}.{key}", value, known[key])
