"""Comparison of the weights in MODEL.WEIGHTS_INIT.PARAMS_FILE, and of their stem, with the model.

vissl/utils/checkpoint.py:888 keeps the initial values of weights that are missing in the file, and ignores unexpected
weights of the file. Only log.txt reports it, so a checkpoint of a ResNet-18 can be evaluated as a ResNet-34.
vissl/utils/checkpoint.py:877 asserts that shapes agree.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from plugins.sobel import restore_sobel_
from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.fitting import differences, mismatch, plain_names
from plugins.tools.overrides import hydra_value
from plugins.tools.records import read_json
from plugins.tools.stems import Stem, stem_of, stem_of_file
from vissl_ext.compat.saved_types import unknown_types

_KEY = "config.MODEL.WEIGHTS_INIT"


def activate() -> None:
    """Require that the file and the trunk have the same tensors, and report weights of heads that are not loaded."""
    from vissl.models import base_ssl_model

    stock = base_ssl_model.init_model_from_consolidated_weights
    if not hasattr(stock, "__wrapped__"):
        base_ssl_model.init_model_from_consolidated_weights = wraps(stock)(partial(_checked, stock))


def _checked(load: Callable[..., Any], config: Any, model: Any, state_dict: Any, **how: Any) -> Any:
    from vissl.utils.checkpoint import append_module_prefix, get_checkpoint_model_state_dict, replace_module_prefix

    path, key = config.MODEL.WEIGHTS_INIT.PARAMS_FILE, how.get("state_dict_key_name")
    check_content(state_dict, key, path)
    # VISSL's loader adds the entry "type" to weights that are not nested
    found = state_dict[key] if key else {name: value for name, value in state_dict.items() if name != "type"}
    if key == "classy_state_dict":
        parts = found["base_model"]["model"]
        trunk = plain_names(parts["trunk"])
        if trunk and all(name.startswith("base_model.") for name in trunk):  # from a linear evaluation
            trunk = {name.removeprefix("base_model."): value for name, value in trunk.items()}
        parts.update(trunk=trunk, heads=plain_names(parts["heads"]))
        found = get_checkpoint_model_state_dict(config, found)
    else:
        if how.get("replace_prefix"):
            found = replace_module_prefix(found, how["replace_prefix"])
        if how.get("append_prefix"):
            found = append_module_prefix(found, how["append_prefix"])
    restore_sobel_(model.trunk, found)
    _compare(config, model, found, how.get("skip_layers") or [])
    _check_stem(config, model, state_dict, found)
    return load(config, model, state_dict, **how)


def _check_stem(config: Any, model: Any, content: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that the trunk has the stem of the file, which its tensors do not determine.

    Args:
        config: VISSL's configuration, below ``config``.
        model: the model.
        content: content of the file.
        found: its weights, with the names of the model.

    Raises:
        UserError: the stems differ; the message has the options of the trunk that give it that of the file.
    """
    from vissl_ext.trunks import STEM

    names = {name.removeprefix("trunk.").removeprefix("base_model."): value for name, value in found.items()}
    names = {name.removeprefix("_feature_blocks."): value for name, value in names.items()}
    theirs, ours = stem_of_file(content, names), stem_of(model.trunk)
    if theirs is None or ours is None or theirs == ours:
        return
    where = "config.MODEL.TRUNK.RESNETS"
    options = zip(("CIFAR_STEM", *STEM), (True, *theirs), strict=True)
    settings = " ".join(f"{where}.{key}={str(value).lower()}" for key, value in options)
    plain = config.MODEL.TRUNK.NAME == "plain_resnet"
    raise UserError(
        f"{config.MODEL.WEIGHTS_INIT.PARAMS_FILE} was trained with another stem ({_described(theirs)}) than that of "
        f"config.MODEL.TRUNK ({_described(ours)}), so its features would be others; "
        + (f"add {settings} to the command" if plain else f"the trunk {config.MODEL.TRUNK.NAME} has no option for it")
    )


def _described(stem: Stem) -> str:
    return f"stride {stem.stride}, padding {stem.padding}, {'a' if stem.pool else 'no'} max-pool"


def check_weights_file(weights: Any) -> None:
    """Check that the weights file exists, is complete, and contains weights and no code.

    Args:
        weights: the section MODEL.WEIGHTS_INIT.

    Raises:
        UserError: the file does not exist, torch cannot read it, or it has other content.
    """
    path, key = weights.PARAMS_FILE, f"{_KEY}.PARAMS_FILE"
    if not path or "://" in path:
        return
    if not Path(path).is_file():
        if path == "specify the model weights":
            raise UserError(f"{key} must be the checkpoint to evaluate, got {path!r}")
        raise UserError(f"{key}: there is no file {path}")
    try:
        unknown = unknown_types(path)
    except RuntimeError:
        raise UserError(f"{key}: {path} is incomplete, or was not written by torch.save") from None
    if unknown:
        raise UserError(
            f"{key}: {path} contains {', '.join(unknown)}, which could run code, and is not loaded; save a file that "
            "contains only the tensors"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = "it is text, a plain pickle or another format"
        if "Unsupported global" in str(error):
            reason = "it contains code or objects other than tensors"
        raise UserError(f"{key}: {path} is not a file of torch.save that contains only weights: {reason}") from None
    check_content(content, weights.STATE_DICT_KEY_NAME, path)


def check_content(content: Any, key: str | None, path: str) -> None:
    """Check that a file contains weights.

    Args:
        content: content of the file.
        key: STATE_DICT_KEY_NAME.
        path: path of the file.

    Raises:
        UserError: it contains no weights, or none under the key.
    """
    if not isinstance(content, Mapping):
        raise UserError(
            f"{_KEY}.PARAMS_FILE: {path} must contain a mapping name → weight, got a {type(content).__name__}"
        )
    if content.get("type") in ("shard_list", "sliced"):
        return  # a checkpoint of FullyShardedDataParallel, which VISSL reads part by part
    if key and not isinstance(content.get(key), Mapping):
        has = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise UserError(
            f"{_KEY}.STATE_DICT_KEY_NAME is {key}, but {path} has the keys {has}. Set the key of the weights, or an "
            "empty key if they are not nested"
        )
    if key == "classy_state_dict":
        model = content[key].get("base_model")
        parts = model.get("model") if isinstance(model, Mapping) else None
        if not isinstance(parts, Mapping) or not all(
            isinstance(parts.get(part), Mapping) for part in ("trunk", "heads")
        ):
            raise UserError(f"{_KEY}.PARAMS_FILE: {path} is not a complete checkpoint of VISSL")


def _recorded_trunk(path: str) -> Any:
    """Return the section MODEL.TRUNK of the run that wrote a checkpoint, None if its folder has no record."""
    try:
        return read_json(Path(path).parent / "run.json")["config.MODEL.TRUNK"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _other_entries(theirs: Any, ours: Any, above: str = "") -> Iterator[str]:
    """Yield the entries of a section that have other values in a second one, as overrides of the command line."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key, value in theirs.items():
            yield from _other_entries(value, ours.get(key), f"{above}.{key}")
    elif theirs is not None and theirs != ours:
        yield f"{above}={hydra_value(theirs) if isinstance(theirs, str) else json.dumps(theirs, separators=(',', ':'))}"


def _compare(config: Any, model: Any, found: Mapping[str, Any], skipped: list[str]) -> None:
    resized = hasattr(model.trunk, "interpolate_position_embedding")

    def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix).removeprefix("base_model."): value
            for name, value in state.items()
            if name.startswith(prefix)
            and not any(layer in name for layer in skipped)
            and not (resized and "pos_embedding" in name)  # VISSL interpolates them
        }

    path, ours = config.MODEL.WEIGHTS_INIT.PARAMS_FILE, model.state_dict()
    if reason := mismatch(part(found, "trunk."), part(ours, "trunk.")):
        theirs = [f"config.MODEL.TRUNK{entry}" for entry in _other_entries(_recorded_trunk(path), config.MODEL.TRUNK)]
        if theirs:
            reason = f"its run had {' '.join(theirs)}; add this to the command"
        raise UserError(
            f"{path} is a checkpoint of another trunk than config.MODEL.TRUNK ({config.MODEL.TRUNK.NAME}): {reason}"
        )
    settings, heads = config.MODEL.FEATURE_EVAL_SETTINGS, part(found, "heads.")
    if settings.EVAL_MODE_ON and not settings.EVAL_TRUNK_AND_HEAD:
        if heads:
            print_on_rank_zero(f"the heads in {path} ({len(heads)} tensors) are not used by this evaluation")
        return
    differ = differences(heads, part(ours, "heads."))
    uses_heads = settings.EVAL_MODE_ON and "missing" in differ  # without training they would stay random
    if uses_heads or "of another shape" in differ:
        reason = mismatch(heads, part(ours, "heads."))
        advice = f"to start with new heads add {_KEY}.SKIP_LAYERS=[num_batches_tracked,heads]"
        if settings.EVAL_MODE_ON:
            advice = (
                "this evaluation uses the heads, which would be untrained; take the features of the trunk, as "
                "config=benchmark/nearest_neighbor/imagenet1k/eval_resnet50_knn does, or set config.MODEL.HEAD.PARAMS "
                "to the heads of the file"
            )
        raise UserError(f"{path} has other heads than config.MODEL.HEAD: {reason}; {advice}")
    for kind, names in differ.items():
        print_on_rank_zero(f"heads in {path}: {len(names)} tensors are {kind}, such as {names[0]}")
