"""The MLP projection head: blocks of Linear, BatchNorm and ReLU, and a last Linear layer.

=================================  ==================================================================================
BYOL family (BYOL 2006.07733)      ``mlp_head(512, 4096, 256)``
SSL-EY in solo-learn's form        ``mlp_head(512, 2048, 2048, layers=3)``
SSL-EY as VICReg's expander        ``mlp_head(2048, 8192, 8192, layers=3, final_bias=False)``
SSL-EY in lightly's form           ``mlp_head(2048, 8192, 8192, bias=False)``
SimSiam (2011.10566), Matrix-SSL   ``mlp_head(2048, 2048, 2048, layers=3, bias=False, final_norm="plain",
                                   final_bias="frozen")``
=================================  ==================================================================================
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from plugins.checks import check_choice, check_range


def mlp_head(
    in_dim: int,
    hidden_dim: int | Sequence[int],
    out_dim: int,
    *,
    layers: int = 2,
    final_norm: Literal["affine", "plain"] | None = None,
    bias: bool = True,
    final_bias: bool | Literal["frozen"] = True,
) -> nn.Sequential:
    """Build a projection head ``[B, in_dim] → [B, out_dim]`` as a flat sequence with solo-learn's state-dict keys.

    The keys are ``0.weight`` (Linear), ``1.*`` (BatchNorm), ``3.weight`` (the next Linear, after a ReLU), and so on.

    Args:
        in_dim: width of the backbone's features.
        hidden_dim: width of the hidden layers, or the width of each.
        out_dim: width of the embedding.
        layers: number of Linear layers, ≥ 1; not used if ``hidden_dim`` has the width of each hidden layer.
        final_norm: BatchNorm after the last Linear: ``"affine"`` with scale and shift, ``"plain"`` without, or None.
        bias: whether the hidden Linear layers, each followed by BatchNorm, have a bias (BatchNorm cancels it).
        final_bias: whether the last Linear layer has a bias. ``"frozen"`` keeps it at its initial value, as in
            published SimSiam checkpoints; the BatchNorm that follows cancels it.

    Raises:
        ValueError: fewer than one layer, a width below 1, or an unknown ``final_norm``.

    Example:
        >>> [type(module).__name__ for module in mlp_head(512, 4096, 256)]
        ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    check_range("layers", layers, low=1)
    hidden = [hidden_dim] * (layers - 1) if isinstance(hidden_dim, int) else list(hidden_dim)
    for name, width in (("in_dim", in_dim), *(("hidden_dim", width) for width in hidden), ("out_dim", out_dim)):
        check_range(name, width, low=1)
    if final_norm is not None:
        check_choice("final_norm", final_norm, ("affine", "plain"))
    modules: list[nn.Module] = []
    for width in hidden:
        modules += [nn.Linear(in_dim, width, bias=bias), nn.BatchNorm1d(width), nn.ReLU()]
        in_dim = width
    last = nn.Linear(in_dim, out_dim, bias=bool(final_bias))
    if final_bias == "frozen":
        last.bias.requires_grad_(False)
    modules.append(last)
    if final_norm is not None:
        modules.append(nn.BatchNorm1d(out_dim, affine=final_norm == "affine"))
    return nn.Sequential(*modules)


def plain_head(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    *,
    layers: int = 2,
    activation: type[nn.Module] = nn.ReLU,
    norm: bool = False,
    final_bias: bool = True,
) -> nn.Sequential:
    """Build a projection head, by default without BatchNorm, as in MoCo, SEER and DINO: ``[B, in_dim] → [B, out_dim]``.

    Args:
        in_dim: width of the backbone's features.
        hidden_dim: width of the hidden layers.
        out_dim: width of the embedding.
        layers: number of Linear layers, ≥ 1.
        activation: the module between two of them.
        norm: whether a BatchNorm follows each hidden Linear layer.
        final_bias: whether the last Linear layer has a bias.

    Raises:
        ValueError: fewer than one layer, or a width below 1.

    Example:
        >>> [type(module).__name__ for module in plain_head(512, 2048, 128)]
        ['Linear', 'ReLU', 'Linear']
    """
    for name, count in {"layers": layers, "in_dim": in_dim, "hidden_dim": hidden_dim, "out_dim": out_dim}.items():
        check_range(name, count, low=1)
    widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
    modules: list[nn.Module] = []
    for place, (before, after) in enumerate(pairwise(widths), 1):
        bias = final_bias or place < layers
        modules += [nn.Linear(before, after, bias=bias), *([nn.BatchNorm1d(after)] if norm else []), activation()]
    return nn.Sequential(*modules[: -2 if norm else -1])
