"""Compare the weights of a file with those of a network, and load them.

Every loader reports missing and unexpected weights, since a partially loaded backbone gives random features.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from plugins.tools.command import UserError

_WRAPPER = re.compile(r"(?:^|(?<=\.))_orig_mod\.")
"""Matches the prefix that torch.compile adds to the names of a module, at any depth."""


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that torch.compile and DistributedDataParallel add to the names of a state dict.

    Args:
        state: name → tensor.

    Returns:
        The state dict without ``_orig_mod.`` at any depth, and without ``module.`` if every name starts with it.

    >>> sorted(plain_names({"module._orig_mod.fc.weight": 0, "module._orig_mod.fc.bias": 1}))
    ['fc.bias', 'fc.weight']
    """
    plain = {_WRAPPER.sub("", name): value for name, value in state.items()}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Compare the names and shapes of weights with those of a network.

    Args:
        given: name → tensor of a file.
        wanted: name → tensor of the network.

    Returns:
        "missing", "unexpected" and "of another shape" → names; a kind without names is omitted.
    """
    found = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [name for name in wanted if name in given and wanted[name].shape != given[name].shape],
    }
    return {kind: names for kind, names in found.items() if names}


def mismatch(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Describe why weights do not fit a network, for an error message.

    Args:
        given: name → tensor of a file.
        wanted: name → tensor of the network.

    Returns:
        The first name of each kind, and the likely reason; an empty string if every tensor fits.

    >>> import torch
    >>> one, two = torch.zeros(1), torch.zeros(2)
    >>> mismatch({"a": one, "b": one}, {"a": two, "c": one})
    'missing c; unexpected b; of another shape a (1 in the file, 2 here). It is probably another architecture'
    >>> mismatch({"layer1.0.w": one, "layer1.1.w": one}, {"layer1.0.w": one})
    'unexpected layer1.1.w. It is probably a network of another depth'
    """
    found = differences(given, wanted)
    if not found:
        return ""
    words = []
    for kind, names in found.items():
        text = f"{kind} {names[0]}"
        if kind == "of another shape":
            shapes = ("x".join(map(str, each[names[0]].shape)) or "a number" for each in (given, wanted))
            text += " ({} in the file, {} here)".format(*shapes)
        words.append(text + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return f"{'; '.join(words)}. It is probably {_reason(found, given, wanted)}"


def load_fitting(network: nn.Module, weights: Mapping[str, Tensor], source: str | Path, kind: str) -> None:
    """Load weights into a network; every name and shape must match.

    Args:
        network: receives the weights.
        weights: name → tensor of a file.
        source: the file, for the error.
        kind: what the network is, for the error, such as "backbone", or "backbone than resnet18".

    Raises:
        UserError: a weight is missing, unexpected or of another shape.

    >>> load_fitting(nn.Linear(1, 2), nn.Linear(3, 2).state_dict(), "a.pt", "head")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    plugins.tools.command.UserError: a.pt contains another head: of another shape weight (2x3 in the file, 2x1 here)...
    """
    if reason := mismatch(weights, network.state_dict()):
        raise UserError(f"{source} contains another {kind}: {reason}")
    network.load_state_dict(weights)


def _reason(found: dict[str, list[str]], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    odd = [name for names in found.values() for name in names]
    if "missing" in found and not set(given) & set(wanted):
        return "another architecture, or the names have another prefix"
    if all(re.search(r"(^|\.)(resizer|avgpool)\.", name) for name in odd):
        return "a representation of another width"
    if all(re.search(r"(^|\.)(conv1|patch_embed|stem)\.", name) for name in odd):
        return "a network with another stem"
    if all("pos_embed" in name for name in odd):
        return "a network for another image size"
    depth = re.compile(r"(^|\.)(layer\d|blocks?\d*|layers|stages)\.")
    if set(found) != {"of another shape"} and all(depth.search(name) for name in odd):
        return "a network of another depth"
    return "another architecture" if len(found) > 1 else "a network with other settings"
