"""The prototypes of SwAV (Caron et al. 2020, arXiv:2006.09882): the prediction is the cosine with each of them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, compute_dtype
from plugins.linalg import directions


class Prototypes(nn.Module):
    """K trained unit rows. In training, ``predict`` first normalises them in place, as the published code does.

    The normalisation has no gradient: the optimiser gets the gradient of the cosines with respect to the unit rows. It
    moves them off the sphere, and the next ``predict`` puts them back.

    Args:
        dim: width D of the projections.
        count: number K of prototypes.
        free: whether the rows keep any length. Then their directions are compared, with a gradient, they begin as
            normal numbers, and ``predict`` changes nothing.

    Raises:
        ValueError: an argument is below 1.

    Example:
        >>> prototypes = Prototypes(2, 3)
        >>> scores = prototypes.predict([torch.eye(2)])
        >>> scores[0].shape, bool(torch.allclose(prototypes.weight.norm(dim=1), torch.ones(3)))
        (torch.Size([2, 3]), True)
    """

    def __init__(self, dim: int, count: int, *, free: bool = False) -> None:
        super().__init__()
        check_range("dim", dim, low=1)
        check_range("count", count, low=1)
        self.free = free
        rows = torch.randn(count, dim) if free else nn.Linear(dim, count, bias=False).weight.detach()
        self.weight = nn.Parameter(rows)

    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Return the cosines of rows with the prototypes, in float32 (float64 for float64)."""
        dtype = compute_dtype(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            # a copy: autograd stores it for backward, and the next normalisation overwrites the parameter
            weight = self.weight.to(dtype, copy=True)
            in_place = self.training and not self.free
            return directions(z.to(dtype)) @ (weight if in_place else F.normalize(weight, dim=1)).T

    def predict(self, views: list[Float[Tensor, "_ D"]]) -> list[Float[Tensor, "_ K"]]:
        """Return the scores of all views, with unit prototypes."""
        if self.training and not self.free:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1))
        return [self(z) for z in views]
