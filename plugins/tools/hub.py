"""Backbones with the weights of a file, for scripts and for ``hubconf.py``::

    model = load_weights("trained_models/ssl_ey/first")            # the folder of a run, a checkpoint, or an export
    model = torch.hub.load(REPOSITORY, "ssl_ey_resnet50", weights="backbone.pth")

The file may be of any of the three frameworks.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from plugins.methods import METHODS
from plugins.tools.cpc_encoders import ENCODERS
from plugins.tools.export import build_network, checkpoint_file, fit, read_backbone
from plugins.tools.weights import check_digest

ARCHITECTURES = ("resnet18", "resnet50", "resnet50x2", "resnet200x2")
"""Networks of the constructors; those with a factor are in :mod:`plugins.tools.backbones`."""
OWN_ARCHITECTURES = {"amdim": ("amdim_encoder",), "cpc": tuple(ENCODERS)}
"""Method → further networks of its constructors, the encoders of its paper."""


def load_weights(
    source: str | Path, arch: str | None = None, *, sha256: str | None = None, **options: Any
) -> nn.Module:
    """Load the backbone in a file that a method was trained to, in any of the frameworks.

    Args:
        source: a checkpoint, with or without the other parts of the method, the folder of a run, or a file of
            ``plugins.tools.export``. The files of VICReg's and SSL-EY's scripts are read too: model.pth, resnet50.pth
            and the checkpoint.pth of evaluate.py.
        arch: name of the network in torchvision or in ``plugins.tools.backbones``; None selects the ResNet that fits.
        sha256: hexadecimal SHA-256 of the file; None does not compare it.
        options: of the network ``arch``, such as ``size=64, ndf=192`` of ``amdim_encoder``.

    Returns:
        The network ``[B, 3, H, W] → [B, F]`` in evaluation mode, on the CPU. A ResNet that was trained with a stem
        for small images has that stem, with its padding and max-pool.

    Raises:
        UserError: there is no such file, it contains no backbone, its SHA-256 differs, or a tensor is missing,
            unexpected or of another shape. No code in the file is executed.
    """
    path = checkpoint_file(Path(source).expanduser())
    if sha256 is not None and path.is_file():
        check_digest(path, sha256)
    return fit(read_backbone(path), "torchvision", arch, **options)[2].eval()


def constructors(names: Iterable[str] = METHODS) -> dict[str, Callable[..., nn.Module]]:
    """Return the functions of ``hubconf.py``: ``<method>_<arch>(weights=None, *, sha256=None, **options)``.

    Every method has ARCHITECTURES; AMDIM and CPC have the encoders of their papers too.

    Args:
        names: of the methods.

    >>> "ssl_ey_resnet50x2" in constructors()
    True
    """
    return {
        f"{name}_{arch}": _constructor(name, arch)
        for name in names
        for arch in (*ARCHITECTURES, *OWN_ARCHITECTURES.get(name, ()))
    }


def _constructor(name: str, arch: str) -> Callable[..., nn.Module]:
    def make(weights: str | Path | None = None, *, sha256: str | None = None, **options: Any) -> nn.Module:
        if weights is None:
            return build_network("torchvision", arch, **options)
        return load_weights(weights, arch, sha256=sha256, **options)

    make.__name__ = f"{name}_{arch}"
    make.__doc__ = (
        f"{arch} without its classifier, with the weights of a file of {METHODS[name].title}, a checkpoint or an "
        "export; untrained without weights. sha256 is that of the file, the options are those of the network."
    )
    return make
