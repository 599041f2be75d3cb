"""Validate transforms, schedules, feature layers and heads before the run starts, by constructing each of them once.

VISSL constructs them in the processes of the run, where an invalid setting ends with a traceback.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from plugins.tools.command import UserError, nearest

_STRING_OPTIONS = {"name", "update_interval", "interval_scaling", "scaling_type", "wave_type"}
_BOOLEAN_OPTIONS = {"auto_scale", "is_adaptive", "keep_warmup"}
"""Options of a schedule whose values are strings, and booleans; the values of all others are numbers."""
_WRAPPER_OPTIONS = {"name", "indices", "transform_receives_entire_batch", "transform_type"}
"""Keys of an entry of TRANSFORMS that VISSL reads and does not pass to the transform."""
NEED_GPU = ("regnet_v2", "regnet_fsdp")
"""Trunks that VISSL can build only on a GPU, in the processes of a run."""
_CONSTRUCTION_ERRORS = (TypeError, ValueError, LookupError, AssertionError, AttributeError, ZeroDivisionError)
"""Errors of a constructor that are due to invalid arguments."""


def check_choice(key: str, name: Any, allowed: Iterable[Any], others: Iterable[str] = (), described: str = "") -> None:
    """Require that a name is one of the allowed names.

    Args:
        key: key of the configuration, for the error message.
        name: the given name.
        allowed: the allowed names, which the error message lists.
        others: further allowed names, which the error message does not list.
        described: a description of ``others`` for the error message.

    Raises:
        UserError: the name is not allowed.
    """
    allowed, others = sorted(map(str, allowed)), set(others)
    if name not in allowed and name not in others:
        near = nearest(name, [*allowed, *others])
        guess = f", did you mean {near!r}?" if near else ""
        listed = ", ".join([*allowed, described] if described else allowed)
        raise UserError(f"{key}: {name!r} is unknown{guess}; allowed: {listed}")


def check_mapping(key: str, value: Any) -> None:
    """Require that a value is a mapping.

    Args:
        key: key of the configuration, for the error message.
        value: the value.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, dict):
        raise UserError(f"{key} must be a mapping, got {value!r}")


def is_number(value: Any) -> bool:
    """Return whether a value is an integer or a float, but not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_transforms(key: str, entries: Any) -> None:
    """Check the names and options of transforms, and construct each.

    Args:
        key: key of the list, for the error message.
        entries: the list.

    Raises:
        UserError: a transform is unknown, does not have an option, or cannot be constructed.
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
            raise UserError(f"{key}: each entry must be {{name: NAME, OPTION: VALUE, ...}}, got {entry!r}")
        name = entry["name"]
        if entry.get("transform_type") == "augly":
            continue
        class_name = name if name in of_torch else name.title().replace("_", "")
        if class_name not in of_torch:
            check_choice(key, name, TRANSFORM_REGISTRY, of_torch, "the transforms of torchvision")
        transform = TRANSFORM_REGISTRY.get(name) or getattr(transforms, class_name)
        options = {option: value for option, value in entry.items() if option not in _WRAPPER_OPTIONS}
        parameters = inspect.signature(transform).parameters
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            for option in options:
                check_choice(f"{key}: option of {name}", option, parameters)
        if any("://" in value or value.endswith((".npy", ".npz")) for value in _leaves(options, str)):
            continue  # its constructor reads a file
        with _construction(key, name, options):
            build_transform(deepcopy({"name": name, **options}))


def check_schedules(schedules: Any) -> None:
    """Check the options of the optimiser's schedules and the types of their values.

    Args:
        schedules: the section OPTIMIZER.param_schedulers.

    Raises:
        UserError: a schedule or an option is unknown, or a value has the wrong type.
    """
    key = "config.OPTIMIZER.param_schedulers"
    check_mapping(key, schedules)
    for name, schedule in schedules.items():
        if schedule is not None:
            _check_schedule(f"{key}.{name}", schedule)


def _check_schedule(key: str, schedule: Any) -> None:
    from classy_vision.optim.param_scheduler import PARAM_SCHEDULER_REGISTRY

    check_mapping(key, schedule)
    if "name" in schedule:
        check_choice(f"{key}.name", schedule["name"], PARAM_SCHEDULER_REGISTRY)
    allowed = {"auto_lr_scaling", "schedulers", "num_epochs", "value", "values", "milestones"}
    allowed |= _STRING_OPTIONS | _BOOLEAN_OPTIONS
    for kind in PARAM_SCHEDULER_REGISTRY.values():
        allowed |= set(inspect.signature(kind).parameters)
    scaling = schedule.get("auto_lr_scaling") or {}
    check_mapping(f"{key}.auto_lr_scaling", scaling)
    for option, value in {**schedule, **scaling}.items():
        place = f"{key}.{option}" if option not in scaling else f"{key}.auto_lr_scaling.{option}"
        if option == "schedulers":
            if not isinstance(value, list):
                raise UserError(f"{place} must be a list of schedules, got {value!r}")
            for number, part in enumerate(value):
                _check_schedule(f"{place}.{number}", part)
        elif option in _BOOLEAN_OPTIONS:
            if not isinstance(value, bool):
                raise UserError(f"{place} must be true or false, got {value!r}")
        elif option not in _STRING_OPTIONS and option != "auto_lr_scaling":
            if option not in scaling:
                check_choice(key, option, allowed)
            numbers = isinstance(value, list) and all(map(is_number, value))
            if value is not None and not numbers and not is_number(value):
                raise UserError(
                    f"{place} must be {'numbers' if isinstance(value, list) else 'a number'}, got {value!r}"
                )
    if scaling.get("auto_scale"):
        if scaling.get("base_lr_batch_size", 1) <= 0:
            raise UserError(f"{key}.auto_lr_scaling.base_lr_batch_size must be above 0")
        for part in (schedule, *schedule.get("schedulers", ())):
            if "cosine" in str(part.get("name")) and part.get("start_value") == 0:
                raise UserError(f"{key}: auto_lr_scaling cannot scale a cosine schedule with start_value=0")


def check_layers(model_config: Any) -> None:
    """Check the names and the order of the layers whose features are extracted, and construct the pooling of each.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: a layer is unknown or out of order, or its pooling is invalid.
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
                check_choice(key, pooling, POOL_OPS)
                if any(_leaves(arguments, str)):
                    raise UserError(f"{key}: the arguments of {pooling} must be numbers, got {arguments}")
                with _construction(key, pooling, arguments):
                    POOL_OPS[pooling](*arguments)
            case _:
                raise UserError(f"{key}: each entry must be [LAYER, [POOLING, [ARGUMENTS]]], got {entry!r}")
    name = model_config.TRUNK.NAME
    trunk = _trunk(model_config)
    if trunk is None:
        return
    layers = [entry[0] for entry in wanted]
    blocks = getattr(trunk, "_feature_blocks", None)
    if hasattr(trunk, "get_intermediate_features"):
        _check_tokens(key, name, layers, trunk)
    elif blocks is None:  # forward() returns the last features for any name
        other = [layer for layer in layers if layer.startswith(("blkCLS", "concatCLS"))]
        if len(layers) > 1 or other:
            raise UserError(f"{key}: {name} returns only its last features, lastCLS, got {', '.join(layers)}")
    elif isinstance(blocks, torch.nn.ModuleDict):
        blocks = list(blocks)
        names = getattr(trunk, "feat_eval_mapping", None) or {block: block for block in blocks}
        for layer in layers:
            check_choice(f"{key}: layer of {name}", layer, names)
        if set(names.values()) <= set(blocks):
            places = [blocks.index(names[layer]) for layer in layers]
            if places != sorted(places):
                # VISSL returns the features in the order of the network, and would assign the wrong names
                right = [layer for _, layer in sorted(zip(places, layers, strict=True))]
                raise UserError(
                    f"{key} must name the layers in the order of the network, {', '.join(right)}, got "
                    f"{', '.join(layers)}"
                )


def _trunk(model_config: Any) -> Any:
    """Build the trunk to find its layers, or return None if only a process of the run can build it.

    It is built on the meta device, or, if its constructor reads the values of tensors (VISSL's ViT and ConViT), on the
    CPU.
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
            if device == "cpu" and isinstance(error, _CONSTRUCTION_ERRORS):
                raise UserError(f"config.MODEL.TRUNK: {name} cannot be constructed: {_reason(error)}") from None
    return None


def _check_tokens(key: str, name: str, layers: list[str], trunk: Any) -> None:
    """Check the names of a transformer's features. VISSL ignores unknown names."""
    depth = len(trunk.blocks)
    for layer in layers:
        match = re.fullmatch(r"lastCLS|(blkCLS|concatCLS)(\d+)", layer)
        first = 1 if match and match[1] == "concatCLS" else 0
        if not match or (match[2] and not first <= int(match[2]) < depth + first):
            raise UserError(
                f"{key}: layer of {name}: {layer!r} is unknown; allowed: lastCLS, blkCLS0 to blkCLS{depth - 1}, "
                f"concatCLS1 to concatCLS{depth} (the class tokens of the last blocks)"
            )


def check_heads(model_config: Any) -> None:
    """Construct each head on the meta device; ``task.check_config`` checks ``method_head``.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: a head cannot be constructed.
    """
    for head in model_config.HEAD.PARAMS:
        for part in head if isinstance(head[0], list) else [head]:
            _check_head(part, model_config)


def _check_head(part: Any, model_config: Any) -> None:
    from vissl.models.heads import get_model_head

    from vissl_ext.methods import HEAD

    # VISSL ignores further elements, which stock files (pretrain/pirl/models) have
    if len(part) < 2 or not isinstance(part[1], dict):
        raise UserError(f"config.MODEL.HEAD.PARAMS must be a list of [NAME, {{OPTIONS}}], got the element {part}")
    name, options = part[:2]
    if name == HEAD:
        return
    with _construction("config.MODEL.HEAD.PARAMS", name, options), torch.device("meta"):
        get_model_head(name)(deepcopy(model_config), **deepcopy(options))


@contextmanager
def _construction(key: str, name: str, arguments: Any) -> Iterator[None]:
    """Convert the errors of a constructor to a UserError."""
    try:
        yield
    except _CONSTRUCTION_ERRORS as error:
        raise UserError(f"{key}: {name} cannot be constructed with {arguments}: {_reason(error)}") from None


def _leaves(value: Any, kind: type) -> Iterator[Any]:
    """Yield the values of a type in nested lists and dictionaries."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part, kind)
    elif isinstance(value, kind):
        yield value


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{error} is missing" if isinstance(error, KeyError) else text[0] if text else type(error).__name__
