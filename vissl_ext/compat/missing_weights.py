"""Weights that a file of MODEL.WEIGHTS_INIT.PARAMS_FILE lacks, or that are left over.

vissl/utils/checkpoint.py:888 leaves weights of the model that the file lacks as they were drawn, and drops those of the
file that the model lacks; only log.txt says so: a checkpoint of a ResNet-18 can be evaluated as a ResNet-34.
vissl/utils/checkpoint.py:877 asserts that shapes agree.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.fitting import differences, mismatch, plain_names

_KEY = "config.MODEL.WEIGHTS_INIT"


def activate() -> None:
    """Require that a file of weights and the trunk agree in every tensor, and report heads that are not loaded."""
    from vissl.models import base_ssl_model

    stock = base_ssl_model.init_model_from_consolidated_weights
    if not hasattr(stock, "__wrapped__"):
        base_ssl_model.init_model_from_consolidated_weights = wraps(stock)(partial(_checked, stock))


def _checked(load: Callable[..., Any], config: Any, model: Any, state_dict: Any, **how: Any) -> Any:
    from vissl.utils.checkpoint import append_module_prefix, get_checkpoint_model_state_dict, replace_module_prefix

    path, key = config.MODEL.WEIGHTS_INIT.PARAMS_FILE, how.get("state_dict_key_name")
    check_content(state_dict, key, path)
    found = state_dict[key] if key else state_dict
    if key == "classy_state_dict":
        parts = found["base_model"]["model"]
        trunk = plain_names(parts["trunk"])
        if trunk and all(name.startswith("base_model.") for name in trunk):  # of a linear evaluation
            trunk = {name.removeprefix("base_model."): value for name, value in trunk.items()}
        parts.update(trunk=trunk, heads=plain_names(parts["heads"]))
        found = get_checkpoint_model_state_dict(config, found)
    else:
        if how.get("replace_prefix"):
            found = replace_module_prefix(found, how["replace_prefix"])
        if how.get("append_prefix"):
            found = append_module_prefix(found, how["append_prefix"])
    _compare(config, model, found, how.get("skip_layers") or [])
    return load(config, model, state_dict, **how)


def check_content(content: Any, key: str | None, path: str) -> None:
    """Check that what a file holds are weights, before they are compared with the trunk's.

    Args:
        content: of the file.
        key: STATE_DICT_KEY_NAME.
        path: of the file.

    Raises:
        UserError: it holds no weights, or none under the key.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{_KEY}.PARAMS_FILE holds a {type(content).__name__}, no weights by name: {path}")
    if content.get("type") in ("shard_list", "sliced"):
        return  # of FullyShardedDataParallel, which VISSL reads by parts
    if key and not isinstance(content.get(key), Mapping):
        has = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise UserError(
            f"{_KEY}.STATE_DICT_KEY_NAME is {key}, which {path} does not have; it has {has}. Give the name of its "
            "weights, or an empty one if they are not nested"
        )
    if key == "classy_state_dict":
        model = content[key].get("base_model")
        parts = model.get("model") if isinstance(model, Mapping) else None
        if not isinstance(parts, Mapping) or not all(
            isinstance(parts.get(part), Mapping) for part in ("trunk", "heads")
        ):
            raise UserError(f"{_KEY}.PARAMS_FILE is no whole checkpoint of VISSL: {path}")


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
        raise UserError(
            f"{path} is a checkpoint of another trunk than config.MODEL.TRUNK ({config.MODEL.TRUNK.NAME}) says: "
            f"{reason}"
        )
    settings, heads = config.MODEL.FEATURE_EVAL_SETTINGS, part(found, "heads.")
    if settings.EVAL_MODE_ON and not settings.EVAL_TRUNK_AND_HEAD:
        if heads:
            print_on_rank_zero(f"the heads in {path} ({len(heads)} tensors) are not used by this evaluation")
        return
    differ = differences(heads, part(ours, "heads."))
    if "of another shape" in differ:
        reason = mismatch(heads, part(ours, "heads."))
        raise UserError(
            f"{path} has other heads than config.MODEL.HEAD says: {reason}; to begin with new heads add "
            f"{_KEY}.SKIP_LAYERS=[num_batches_tracked,heads]"
        )
    for kind, names in differ.items():
        print_on_rank_zero(f"heads in {path}: {len(names)} tensors are {kind}, such as {names[0]}")
