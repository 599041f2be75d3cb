"""The heads of DISSL and CISSL: an expressive teacher head, and a student head with the form of the downstream probe.

Dubois, Hashimoto, Ermon & Liang (NeurIPS 2022, arXiv:2209.06235). ``KINDS`` lists the heads of both published
repositories: the TinyImageNet code ("issl"), initialised by :func:`plugins.heads.init.issl_init_`, and the VISSL fork
for ImageNet ("fork"), with torch's default initialisation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_range, compute_dtype
from plugins.heads.init import issl_init_, projection_init_
from plugins.linalg import directions

KINDS = {
    "dissl": "issl: z → 1024 → low-rank C; low-rank C",
    "dissl_mlp": "issl: z → 2048 → 2048 → low-rank C, twice",
    "cissl": "issl: z → 1024 → 128, batch norm; linear 128, batch norm",
    "cissl_mlp": "issl: z → 2048 → 2048 → 128, batch norm, twice",
    "simclr": "issl: z → 1024 → 128, batch norm, one for both sides",
    "dino": "issl: z → 1024 → 256 → weight-normed C, twice",
    "fork_dissl": "fork: residual z → 2048 → z, 512, C (z > 2048: 512, residual 2048 → 2048 → 512, C); low-rank C",
    "fork_dissl_linear": "fork: low-rank C, twice",
    "fork_dissl_mlp": "fork: the teacher head of fork_dissl, twice",
    "fork_dissl_v2": "fork: residual z → 2048 → z, C; linear C",
    "fork_cissl": "fork: z → 2048 → 2048 → 128, batch norm; linear 128, batch norm; random projections",
}


class Heads(NamedTuple):
    """Maps from representations ``[B, z]`` to logits or projections; the same module twice if both sides share it."""

    teacher: nn.Module
    student: nn.Module


def dissl_heads(kind: str, in_dim: int, out_dim: int) -> Heads:
    """Build the teacher and student head of a published configuration.

    Args:
        kind: a key of KINDS.
        in_dim: width z of the representation.
        out_dim: C, the number of pseudo-classes (16384), or the width of the projections (128).

    Raises:
        ValueError: the kind is unknown, or a width is below 1.

    >>> [type(module).__name__ for module in dissl_heads("dissl", 512, 16384).student]
    ['Linear', 'BatchNorm1d', 'Linear']
    """
    check_choice("kind", kind, tuple(KINDS))

    def head(layers: int = 0, hidden_dim: int = 2048, **options) -> nn.Module:
        return issl_head(in_dim, out_dim, layers=layers, hidden_dim=hidden_dim, **options)

    if kind == "dissl":
        return Heads(head(1, 1024, bottleneck=512), head(bottleneck=512))
    if kind == "dissl_mlp":
        return Heads(head(2, bottleneck=512), head(2, bottleneck=512))
    if kind == "cissl":
        return Heads(head(1, 1024, final_norm=True), head(final_norm=True))
    if kind == "cissl_mlp":
        return Heads(head(2, final_norm=True), head(2, final_norm=True))
    if kind == "simclr":
        return Heads(*[head(1, 1024, final_norm=True)] * 2)
    if kind == "dino":
        one, two = (
            head(1, 1024, activation="gelu", bottleneck=256, bottleneck_norm=False, last="cosine") for _ in "ab"
        )
        return Heads(one, two)
    return _fork_heads(kind, in_dim, out_dim)


def _fork_heads(kind: str, in_dim: int, out_dim: int) -> Heads:
    def expressive() -> nn.Module:
        if in_dim > 2048:
            inner = Residual(*_hidden(512, 2048), *_hidden(2048, 2048), *_hidden(2048, 512))
            return nn.Sequential(*_hidden(in_dim, 512), inner, nn.Linear(512, out_dim))
        inner = Residual(*_hidden(in_dim, 2048), *_hidden(2048, in_dim))
        return nn.Sequential(inner, *_hidden(in_dim, 512), nn.Linear(512, out_dim))

    def linear() -> nn.Module:
        return nn.Sequential(nn.Linear(in_dim, 512, bias=False), nn.BatchNorm1d(512), nn.Linear(512, out_dim))

    def normed(*layers: nn.Module, width: int) -> nn.Module:
        return nn.Sequential(*layers, nn.Linear(width, out_dim, bias=False), nn.BatchNorm1d(out_dim))

    check_range("in_dim", in_dim, low=1)
    check_range("out_dim", out_dim, low=1)
    if kind == "fork_cissl":
        layers = *_hidden(in_dim, 2048), *_hidden(2048, 2048)
        teacher, student = normed(*layers, width=2048), normed(width=in_dim)
        return Heads(projection_init_(teacher), projection_init_(student))
    if kind == "fork_dissl_v2":
        inner = Residual(*_hidden(in_dim, 2048), *_hidden(2048, in_dim))
        return Heads(nn.Sequential(inner, nn.Linear(in_dim, out_dim)), nn.Linear(in_dim, out_dim))
    return Heads(
        linear() if kind == "fork_dissl_linear" else expressive(),
        expressive() if kind == "fork_dissl_mlp" else linear(),
    )


def issl_head(
    in_dim: int,
    out_dim: int,
    *,
    layers: int = 0,
    hidden_dim: int = 2048,
    activation: str = "relu",
    bottleneck: int | None = None,
    bottleneck_norm: bool = True,
    last: str = "linear",
    final_norm: bool = False,
) -> nn.Sequential:
    """Build a head of the TinyImageNet code: hidden layers, then one linear map, optionally of low rank.

    Args:
        in_dim: width of the representation.
        out_dim: width of the output.
        layers: number of hidden layers (Linear without bias, BatchNorm, activation), ≥ 0; 0 makes the head linear.
        hidden_dim: width of the hidden layers.
        activation: "relu" or "gelu".
        bottleneck: rank of the last map (Linear without bias, BatchNorm, Linear); None uses one Linear layer.
        bottleneck_norm: whether the bottleneck has a BatchNorm.
        last: "linear", or "cosine": weights with unit rows, no bias, and input rows of unit length. With a bottleneck
            the input of the bottleneck is normalised, as in the published code.
        final_norm: whether a BatchNorm follows.

    Raises:
        ValueError: a width is below 1, ``layers`` is negative, or a choice is unknown.
    """
    sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim, "bottleneck": bottleneck or 1}
    for name, size in sizes.items():
        check_range(name, size, low=1)
    check_range("layers", layers, low=0)
    check_choice("activation", activation, ("relu", "gelu"))
    check_choice("last", last, ("linear", "cosine"))
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += _hidden(in_dim, hidden_dim, activation)
        in_dim = hidden_dim
    if last == "cosine":
        modules.append(UnitRows())
    if bottleneck is not None:
        modules.append(nn.Linear(in_dim, bottleneck, bias=False))
        if bottleneck_norm:
            modules.append(nn.BatchNorm1d(bottleneck))
        in_dim = bottleneck
    modules.append(nn.Linear(in_dim, out_dim) if last == "linear" else UnitLinear(in_dim, out_dim, bias=False))
    if final_norm:
        modules.append(nn.BatchNorm1d(out_dim))
    head = nn.Sequential(*modules)
    issl_init_(head)
    return head


def _hidden(in_dim: int, out_dim: int, activation: str = "relu") -> list[nn.Module]:
    act = nn.GELU() if activation == "gelu" else nn.ReLU()
    return [nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), act]


class Residual(nn.Sequential):
    """A sequence of modules with a skip connection: the input is added to the output."""

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return super().forward(x) + x


class UnitRows(nn.Module):
    """Normalise each row to unit length, in float32 or more. A zero row stays zero and has no gradient."""

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        with torch.autocast(x.device.type, enabled=False):
            return directions(x.to(compute_dtype(x.dtype))).to(x.dtype)


class UnitLinear(nn.Linear):
    """A Linear layer with weight rows normalised to length 1: weight normalisation with a fixed gain."""

    def forward(self, input: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        return F.linear(input, F.normalize(self.weight, dim=1), self.bias)
