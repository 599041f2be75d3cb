"""The stem of a network for small images, which its tensors do not determine.

A 3×3 convolution has the same weights with padding 1 as with padding 2, and a max-pool has none. solo-learn's networks
for CIFAR have padding 2 (32 pixels become 34), lightly's have padding 1. A checkpoint therefore contains the stem, and
for a file without it :func:`stem_of_file` infers it from the framework of the file.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

KEY = "stem"
"""Key of the stem in a checkpoint, and in the metadata of an exported state dict."""
_EXPANDED = "expanded_"
"""Prefix of the names of solo_ext's networks whose stem for CIFAR has padding 1."""


class Stem(NamedTuple):
    """The first layers of a network whose first convolution is 3×3."""

    stride: int = 1
    """Stride of the convolution."""
    padding: int = 1
    """Padding of the convolution, in pixels."""
    pool: bool = False
    """Whether the network has a max-pool."""


def stem_of(network: nn.Module) -> Stem | None:
    """Return the stem of a network; None if its first convolution is not 3×3 or is not square.

    >>> stem_of(nn.Sequential(nn.Conv2d(3, 8, 3, padding=2), nn.ReLU()))
    Stem(stride=1, padding=2, pool=False)
    """
    conv = _first_convolution(network)
    if conv is None or isinstance(conv.padding, str) or len({*conv.stride}) + len({*conv.padding}) != 2:
        return None
    pool = any(isinstance(module, nn.MaxPool2d) for module in network.modules())
    return Stem(conv.stride[0], conv.padding[0], pool)


def stem_record(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the entry of a checkpoint for the stem of its network; it is empty without a 3×3 convolution."""
    stem = stem_of(network)
    return {} if stem is None else {KEY: stem._asdict()}


def stem_of_file(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Stem | None:
    """Return the stem that a file records; for a ResNet without a record, the one of the file's framework.

    Args:
        content: of a checkpoint, or an exported state dict.
        state: the state dict of its backbone, with torchvision's names if that is a ResNet.

    Returns:
        The stem; None if it is unknown or the first convolution is not 3×3.

    >>> import torch
    >>> state = {"conv1.weight": torch.zeros(8, 3, 3, 3), "layer4.0.conv1.weight": torch.zeros(1)}
    >>> stem_of_file({"state_dict": {"backbone.conv1.weight": 0, "classifier.weight": 0}}, state)
    Stem(stride=1, padding=2, pool=False)
    """
    for holder in (content, content.get("classy_state_dict"), getattr(content, "_metadata", None)):
        record = holder.get(KEY) if isinstance(holder, Mapping) else None
        if isinstance(record, Mapping) and {*Stem._fields} == {*record}:
            return Stem(int(record["stride"]), int(record["padding"]), bool(record["pool"]))
    first = state.get("conv1.weight")
    if first is None or first.shape[2:] != (3, 3) or not any(name.startswith("layer4.") for name in state):
        return None
    if "classy_state_dict" in content:
        return Stem(padding=2)
    backbone = content.get("solo_ext", {}).get("backbone", {})
    if (chosen := backbone.get("kwargs", {}).get("stem")) or backbone.get("name", "").startswith(_EXPANDED):
        return Stem(pool=chosen == "3x3")
    parts = {str(name).split(".")[0] for name in content.get("state_dict", ())}
    if "online_classifier" in parts:
        return Stem()
    return Stem(padding=2) if backbone or ("classifier" in parts and parts & {"backbone", "encoder"}) else None


def with_stem(state: Mapping[str, Tensor], stem: Stem | None) -> Mapping[str, Tensor]:
    """Return a state dict whose metadata contain the stem; torch.save writes them, and ``load_state_dict`` ignores it.

    Args:
        state: name → tensor.
        stem: of the network; with None the state dict is returned unchanged.
    """
    if stem is None:
        return state
    state = OrderedDict(state)
    setattr(state, "_metadata", {KEY: stem._asdict()})  # noqa: B010 - an attribute that torch adds too
    return state


def fit_stem_(network: nn.Module, stem: Stem | None) -> nn.Module:
    """Give a network with a 3×3 convolution the stem of its weights, in place.

    Args:
        network: of any library.
        stem: of the weights; None changes nothing.

    Returns:
        The network.
    """
    conv = _first_convolution(network)
    if stem is None or conv is None:
        return network
    conv.stride, conv.padding = (stem.stride,) * 2, (stem.padding,) * 2
    if isinstance(getattr(network, "maxpool", None), nn.Module) and stem.pool is not (stem_of(network) or stem).pool:
        network.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem.pool else nn.Identity()
    return network


def _first_convolution(network: nn.Module) -> nn.Conv2d | None:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return first if first is not None and first.kernel_size == (3, 3) else None
