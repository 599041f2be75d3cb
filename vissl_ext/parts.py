"""Parts of a configuration that are made once, before anything is started, to see that they can be.

Transforms, layers whose features are asked for, and the schedules of the optimiser: VISSL makes them in a rank, where
a mistake is a traceback.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch

from plugins.tools.command import UserError, nearest

_WORDS = {"name", "update_interval", "interval_scaling", "scaling_type", "wave_type"}
_SWITCHES = {"auto_scale", "is_adaptive", "keep_warmup"}
"""What in a schedule is a word, and what is true or false; everything else is numbers."""
_OF_WRAPPER = {"name", "indices", "transform_receives_entire_batch", "transform_type"}
"""What VISSL itself reads of an entry of TRANSFORMS."""
NEED_GPU = ("regnet_v2", "regnet_fsdp")
"""Trunks that VISSL can build on a GPU alone, with its processes running."""
_WHY = (TypeError, ValueError, KeyError, AssertionError, AttributeError, IndexError, ZeroDivisionError)


def known(key: str, name: Any, names: Iterable[Any]) -> None:
    """Refuse a name that is none of those that are allowed.

    Args:
        key: where it stands, for the sentence.
        name: what was given.
        names: what is allowed.

    Raises:
        UserError: it is none of them; the sentence lists them.
    """
    names = list(map(str, names))
    if name not in names:
        raise UserError(f"{key}: {name!r} is unknown{meant(name, names)}; known are {', '.join(sorted(names))}")


def meant(name: Any, names: Iterable[str]) -> str:
    """A guess at what was meant, to go into a sentence."""
    near = nearest(name, names)
    return f", did you mean {near!r}?" if near else ""


def check_transforms(key: str, entries: Any) -> None:
    """Refuse a list of transforms that cannot be made, or an option that its transform does not read.

    Args:
        key: of the list, for the sentence.
        entries: what stands there.

    Raises:
        UserError: the sentence names the entry.
    """
    from classy_vision.dataset.transforms import TRANSFORM_REGISTRY, build_transform
    from torchvision import transforms

    if not isinstance(entries, list):
        raise UserError(f"{key} must be a list, [{{name: NAME}}, ...], got {entries!r}")
    of_torch = {
        name for name, kind in vars(transforms).items() if inspect.isclass(kind) and name != "InterpolationMode"
    }
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UserError(f"{key}: each entry is {{name: NAME, OPTION: VALUE, ...}}, got {entry!r}")
        name = entry["name"]
        if entry.get("transform_type") == "augly":
            continue
        spelt = name if name in of_torch else name.title().replace("_", "")
        if name not in TRANSFORM_REGISTRY and spelt not in of_torch:
            near = meant(name, [*TRANSFORM_REGISTRY, *of_torch])
            raise UserError(
                f"{key}: {name!r} is unknown{near}; known are {', '.join(sorted(TRANSFORM_REGISTRY))} and the "
                "transforms of torchvision"
            )
        kind = TRANSFORM_REGISTRY.get(name) or getattr(transforms, spelt)
        options = {option: value for option, value in entry.items() if option not in _OF_WRAPPER}
        parameters = inspect.signature(kind).parameters
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            for option in options:
                known(f"{key}: option of {name}", option, parameters)
        if any("://" in value or value.endswith((".npy", ".npz")) for value in _leaves(options, str)):
            continue  # reads a file
        try:
            build_transform(deepcopy({"name": name, **options}))
        except _WHY as error:
            raise UserError(f"{key}: {name} cannot be made of {options}: {_reason(error)}") from None


def check_schedules(schedules: Any) -> None:
    """Refuse schedules of the optimiser that have no numbers where numbers belong, or options that none reads.

    Args:
        schedules: the section OPTIMIZER.param_schedulers.

    Raises:
        UserError: the sentence names the entry.
    """
    key = "config.OPTIMIZER.param_schedulers"
    if not isinstance(schedules, dict):
        raise UserError(f"{key} must be a section with entries of its own, got {schedules!r}")
    for name, schedule in schedules.items():
        if schedule is not None:
            _check_schedule(f"{key}.{name}", schedule)


def _check_schedule(key: str, schedule: Any) -> None:
    from classy_vision.optim.param_scheduler import PARAM_SCHEDULER_REGISTRY

    if not isinstance(schedule, dict):
        raise UserError(f"{key} must be a section with entries of its own, got {schedule!r}")
    if "name" in schedule:
        known(f"{key}.name", schedule["name"], PARAM_SCHEDULER_REGISTRY)
    options = {"auto_lr_scaling", *_WORDS, *_SWITCHES, "schedulers", "num_epochs", "value", "values", "milestones"}
    for kind in PARAM_SCHEDULER_REGISTRY.values():
        options |= set(inspect.signature(kind).parameters)
    scaling = schedule.get("auto_lr_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{key}.auto_lr_scaling must be a section with entries of its own, got {scaling!r}")
    for option, value in {**schedule, **scaling}.items():
        place = f"{key}.{option}" if option not in scaling else f"{key}.auto_lr_scaling.{option}"
        if option == "schedulers":
            if not isinstance(value, list):
                raise UserError(f"{place} must be a list of schedules, got {value!r}")
            for number, part in enumerate(value):
                _check_schedule(f"{place}.{number}", part)
        elif option in _SWITCHES:
            if not isinstance(value, bool):
                raise UserError(f"{place} must be true or false, got {value!r}")
        elif option not in _WORDS and option != "auto_lr_scaling":
            if option not in scaling:
                known(f"{key}", option, options)
            wrong = [part for part in (value if isinstance(value, list) else [value]) if not _is_number(part)]
            if wrong and value is not None:
                raise UserError(
                    f"{place} must be {'numbers' if isinstance(value, list) else 'a number'}, got {value!r}"
                )
    if scaling.get("auto_scale"):
        if scaling.get("base_lr_batch_size", 1) <= 0:
            raise UserError(f"{key}.auto_lr_scaling.base_lr_batch_size must be above 0")
        for part in (schedule, *schedule.get("schedulers", ())):
            if "cosine" in str(part.get("name")) and part.get("start_value") == 0:
                raise UserError(f"{key}: a cosine whose start_value is 0 cannot be scaled by auto_lr_scaling")


def check_layers(model_config: Any) -> None:
    """Refuse layers that the trunk does not have, or not in this order, and pooling that cannot be made.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: the sentence names the layer.
    """
    from vissl.models.model_helpers import is_feature_extractor_model
    from vissl.models.trunks.feature_extractor import POOL_OPS

    key = "config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP"
    wanted = model_config.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP
    if not isinstance(wanted, list):
        raise UserError(f"{key} must be a list, [[LAYER, [POOLING, [ARGUMENTS]]], ...], got {wanted!r}")
    if not is_feature_extractor_model(model_config):
        return
    for entry in wanted:
        match entry:
            case [str(), [str() as pooling, list() as arguments]]:
                known(key, pooling, POOL_OPS)
                if any(_leaves(arguments, str)):
                    raise UserError(f"{key}: the arguments of {pooling} must be numbers, got {arguments}")
                try:
                    POOL_OPS[pooling](*arguments)
                except _WHY as error:
                    raise UserError(f"{key}: {pooling} cannot be made of {arguments}: {_reason(error)}") from None
            case _:
                raise UserError(f"{key}: each entry is [LAYER, [POOLING, [ARGUMENTS]]], got {entry!r}")
    name = model_config.TRUNK.NAME
    trunk = _trunk(model_config)
    if trunk is None:
        return
    layers = [entry[0] for entry in wanted]
    blocks = getattr(trunk, "_feature_blocks", None)
    if hasattr(trunk, "get_intermediate_features"):
        _check_tokens(key, name, layers, trunk)
    elif blocks is None:  # forward() gives the last features, whatever their name
        other = [layer for layer in layers if layer.startswith(("blkCLS", "concatCLS"))]
        if len(layers) > 1 or other:
            raise UserError(f"{key}: {name} has its last features alone: one entry, lastCLS, got {', '.join(layers)}")
    elif isinstance(blocks, torch.nn.ModuleDict):
        blocks = list(blocks)
        names = getattr(trunk, "feat_eval_mapping", None) or {block: block for block in blocks}
        for layer in layers:
            known(f"{key}: layer of {name}", layer, names)
        if set(names.values()) <= set(blocks):
            places = [blocks.index(names[layer]) for layer in layers]
            if places != sorted(places):
                # VISSL gives the features in the order of the network, and would call them by the wrong names
                right = [layer for _, layer in sorted(zip(places, layers, strict=True))]
                raise UserError(
                    f"{key} must name the layers from the input on, {', '.join(right)}, got {', '.join(layers)}"
                )


def _trunk(model_config: Any) -> Any:
    """The trunk, to see its layers; None where only a rank can build it.

    It costs nothing on the meta device. Trunks that read the values of tensors while they are built (VISSL's ViT and
    ConViT) cannot be built there: these are built for good.
    """
    from vissl.models.trunks import get_model_trunk

    name = model_config.TRUNK.NAME
    if name in NEED_GPU:
        return None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return get_model_trunk(name)(deepcopy(model_config), name)
        except Exception as error:
            if device == "cpu" and isinstance(error, _WHY):
                raise UserError(f"config.MODEL.TRUNK: {name} cannot be made: {_reason(error)}") from None
    return None


def _check_tokens(key: str, name: str, layers: list[str], trunk: Any) -> None:
    """Check the names of a transformer's features, of which VISSL leaves out those that it does not know."""
    depth = len(trunk.blocks)
    for layer in layers:
        match = re.fullmatch(r"lastCLS|(blkCLS|concatCLS)(\d+)", layer)
        first = 1 if match and match[1] == "concatCLS" else 0
        if not match or (match[2] and not first <= int(match[2]) < depth + first):
            raise UserError(
                f"{key}: layer of {name}: {layer!r} is unknown; known are lastCLS, blkCLS0 to blkCLS{depth - 1}, and "
                f"concatCLS1 to concatCLS{depth} (the last blocks' class tokens)"
            )


def check_heads(model_config: Any) -> None:
    """Refuse heads that cannot be made of their options; those of our methods are checked with the method.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: the sentence names the head.
    """
    for head in model_config.HEAD.PARAMS:
        for part in head if isinstance(head[0], list) else [head]:
            _check_head(part, model_config)


def _check_head(part: Any, model_config: Any) -> None:
    from vissl.models.heads import get_model_head

    from vissl_ext.methods import HEAD

    # VISSL reads no more than two; stock files (pretrain/pirl/models) have a third
    if len(part) < 2 or not isinstance(part[1], dict):
        raise UserError(f"config.MODEL.HEAD.PARAMS must be a list of [NAME, {{OPTIONS}}], got {part} in it")
    name, options = part[:2]
    if name == HEAD:
        return
    try:
        with torch.device("meta"):
            get_model_head(name)(deepcopy(model_config), **deepcopy(options))
    except _WHY as error:
        raise UserError(f"config.MODEL.HEAD.PARAMS: {name} cannot be made of {options}: {_reason(error)}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(value: Any, kind: type) -> Iterator[Any]:
    """The values of a kind in nested lists and dictionaries."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part, kind)
    elif isinstance(value, kind):
        yield value


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{error} is missing" if isinstance(error, KeyError) else text[0] if text else type(error).__name__
