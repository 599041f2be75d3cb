"""Load the network of a run: one of solo_ext, or ``best_model.pt`` of Self-Supervised-Vision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plugins.tools.command import UserError
from plugins.tools.fitting import mismatch, plain_names
from plugins.tools.unpickle import checkpoint_errors
from solo_ext.checkpoint import find_checkpoint, read_checkpoint
from solo_ext.ssv.metrics import EVALUATED

BEST = "best_model.pt"


class Layout(NamedTuple):
    """Prefixes of the names of weights in a ``best_model.pt``, whose nested names are joined by dots.

    Args:
        backbone: of the trunk.
        projector: of the parts of the projection head, in the order of ours.
        predictor: of the prediction head; None if there is none.
    """

    backbone: str
    projector: tuple[str, ...]
    predictor: str | None = None


_PREDICTING = Layout("encoder.encoder.", ("encoder.proj_head.",), "encoder.pred_head.")
_ONE_MODULE = Layout("encoder.encoder.", ("encoder.proj_head.",))
_TWO_MODULES = Layout("encoder.", ("proj_head.",))
LAYOUTS = {
    **dict.fromkeys(("byol", "relic", "simsiam"), _PREDICTING),
    **dict.fromkeys(("moco", "swav"), _ONE_MODULE),
    **dict.fromkeys(("simclr", "barlow"), _TWO_MODULES),
    "pirl": Layout(
        "encoder.encoder.", ("encoder.f_proj_head.", "encoder.g_proj_head_initial.", "encoder.g_proj_head_final.")
    ),
    "dino": Layout("encoder.encoder.", ("encoder.proj_head.", "encoder.fc_out.")),
    "deep_cluster": Layout("encoder.", ("clf_head.",)),
    "sela": Layout("backbone.", ("cluster_heads.",)),
}
"""Algorithm → layout of its file."""


def load_network(place: Path, algo: str, method: Any) -> Path:
    """Load the parts of a method that are evaluated; every weight must match.

    Args:
        place: a checkpoint, or a folder: that of a run of solo_ext, or one with ``best_model.pt``.
        algo: the algorithm, a key of :data:`LAYOUTS` if the file is a ``best_model.pt``.
        method: the method that receives the weights.

    Returns:
        The file.

    Raises:
        UserError: there is no checkpoint, it is not safe to load, or it contains another network.
    """
    original = place / BEST if place.is_dir() else place
    if original.name == BEST and original.is_file():
        file, weights = original, _translated(original, algo, method)
    else:
        if place.is_dir() and not any(place.glob("*.ckpt")):
            raise UserError(f"--load {place} contains neither {BEST} nor a checkpoint of a run (*.ckpt)")
        file = find_checkpoint(place)
        weights = _select(plain_names(read_checkpoint(file)["state_dict"]), parts(method))
    wanted = _select(method.state_dict(), parts(method))
    if reason := mismatch(weights, wanted):
        raise UserError(f"{file} contains another network than --algo, --arch and --config: {reason}")
    method.load_state_dict(weights, strict=False)  # the names have been compared
    return file


def parts(method: Any) -> tuple[str, ...]:
    """Return the parts of a method that are evaluated: backbone, projector and, of some methods, the predictor."""
    predicts = EVALUATED.get(method.spec.name) == "prediction"
    return ("backbone", "projector", *(["predictor"] if predicts else []))


def _select(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.partition(".")[0] in names}


def _translated(file: Path, algo: str, method: Any) -> dict[str, Tensor]:
    """Return the weights of a ``best_model.pt`` with our names.

    Heads have the same layers in both, with other names: their weights are assigned in order.
    """
    if algo not in LAYOUTS:
        raise UserError(f"{file}: the original has no {algo}; --load a run of {', '.join(sorted(LAYOUTS))}, or of ours")
    layout, state = LAYOUTS[algo], _flat(file)
    heads = {"projector": layout.projector, "predictor": (layout.predictor,) if layout.predictor else ()}
    prefixes = (layout.backbone, *(prefix for head in heads.values() for prefix in head))
    given: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, value in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            raise UserError(f"{file} is not a checkpoint of {algo}: it contains {name}")
        given[prefix][name.removeprefix(prefix)] = value
    weights = {f"backbone.{name}": value for name, value in given[layout.backbone].items()}
    for part, head in heads.items():
        theirs = [tensor for prefix in head for tensor in _layers(prefix, given[prefix])]
        ours = [name for name in method.state_dict() if name.startswith(f"{part}.")] if head else []
        if len(ours) != len(theirs):
            counts = f"{len(theirs)} weights of the {part} in the file, {len(ours)} here"
            raise UserError(f"{file} contains another network than --algo, --arch and --config: {counts}")
        weights.update(zip(ours, theirs, strict=True))
    return weights


def _flat(file: Path) -> dict[str, Tensor]:
    """Load a file of one or two state dicts, and join the names by dots."""
    with checkpoint_errors(file):
        content = torch.load(file, map_location="cpu", weights_only=True)
    flat = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        flat.update(
            {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        )
    if not flat or not all(isinstance(value, Tensor) for value in flat.values()):
        raise UserError(f"{file} is not a checkpoint of Self-Supervised-Vision: it contains other things than weights")
    return flat


def _layers(prefix: str, state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the weights of a part of a head, in the order of its layers."""
    if prefix == "cluster_heads." and state:  # one Linear layer for each head; ours is one layer for all
        heads = range(1 + max(int(name.partition(".")[0]) for name in state))
        return [torch.cat([state[f"{head}.{kind}"] for head in heads]) for kind in ("weight", "bias")]
    return [*state.values()]
