"""Normalisation layers of a backbone that do not mix the images of a batch."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = ("batch", "per_sample")
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def per_sample_norm_(backbone: nn.Module) -> nn.Module:
    """Replace each batch norm of a backbone, in place, by a group norm with one group, which normalises each image.

    The features of an image then do not depend on the other images of the batch, nor those of a patch on the other
    patches. Scale and shift are kept. There are no running statistics, so the state dict has fewer entries:
    ``torchvision.models.resnet18(norm_layer=lambda width: nn.GroupNorm(1, width))`` has the same.

    Args:
        backbone: images → features; changed in place, unless it is a batch norm itself.

    Returns:
        The backbone.

    Raises:
        ValueError: the backbone has no batch norm to replace and no group norm, so the setting would have no effect; or
            it has one of another library, which may do more.

    Reference:
        Hénaff et al. 2019, arXiv:1905.09272, section 3: batch norm lets a network compare patches by their statistics.

    >>> per_sample_norm_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))[1].num_groups
    1
    """
    found = [(parent, name) for parent in backbone.modules() for name, child in parent.named_children() if _is(child)]
    if not found and not any(isinstance(module, nn.GroupNorm | nn.LayerNorm) for module in backbone.modules()):
        raise ValueError("norm=per_sample replaces batch norms, but the backbone has no normalisation; set norm=batch")
    for parent, name in found:
        old = parent.get_submodule(name)
        if not isinstance(old, _BatchNorm) or type(old) not in _PLAIN:
            raise ValueError(f"norm=per_sample cannot replace the {type(old).__name__} of the backbone; set norm=batch")
        new = nn.GroupNorm(1, old.num_features, eps=old.eps, affine=old.affine)
        if old.affine:
            new.weight, new.bias = old.weight, old.bias
        setattr(parent, name, new.train(old.training))
    return backbone


def fit_norms_(backbone: nn.Module, names: Iterable[str]) -> nn.Module:
    """Give a new backbone the normalisation that weights were trained with.

    Args:
        backbone: images → features; changed in place by :func:`per_sample_norm_` if its batch norms have running
            statistics and the weights have none.
        names: names of the weights.

    Returns:
        The backbone.

    >>> fit_norms_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), ["1.weight", "1.bias"])[1].num_groups
    1
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    replaceable = bool(norms) and all(type(module) in _PLAIN for module in norms)
    known = any(name.endswith(("running_mean", "running_var")) for name in names)
    return per_sample_norm_(backbone) if replaceable and not known else backbone


def _is(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)
